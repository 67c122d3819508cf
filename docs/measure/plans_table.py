"""Print the tables of plans/README.md and README.md from the plans in plans/: python docs/measure/plans_table.py."""

from __future__ import annotations

from pathlib import Path

from remoe_cli.artifacts import read_json
from remoe_cli.plan.document import Baseline, BaselineName, Plan
from remoe_cli.plan.wording import HOURS_PER_MONTH, bought, dollars, figure

PLANS = Path(__file__).parents[2] / "plans"
AWS = "aws-us-east-1, 20 requests an hour"
# By plan: the model, its routing, and what it was planned for.
SHIPPED = {
    "demo-local": ("the demo model", "profiled, 64 prompts", "local"),
    "deepseek-v2-lite-paper": ("DeepSeek-V2-Lite", "recorded", "paper"),
    "deepseek-v2-lite-aws": ("DeepSeek-V2-Lite", "recorded", AWS),
    "gpt-oss-20b-aws": ("gpt-oss-20b, MXFP4", "recorded", AWS),
    "mixtral-8x7b-v0.1-aws-synthetic": ("Mixtral-8x7B", "synthetic", AWS),
    "qwen3-30b-a3b-aws-synthetic": ("Qwen3-30B-A3B", "synthetic", AWS),
    "deepseek-v3-aws-synthetic": ("DeepSeek-V3, FP8", "synthetic", f"{AWS}, functions kept warm"),
}
IN_README = ("gpt-oss-20b-aws", "deepseek-v2-lite-aws", "qwen3-30b-a3b-aws-synthetic", "mixtral-8x7b-v0.1-aws-synthetic", "demo-local")
_GPUS = (BaselineName.STORED_GPU, BaselineName.GPU)


def plan_of(name: str) -> Plan:
    return read_json(PLANS / f"{name}.json", Plan)


def row(name: str) -> str:
    """Write one row of plans/README.md."""
    plan = plan_of(name)
    remote, on_gpu = (sum(len(getattr(layer, where)) for layer in plan.layers) for where in ("remote", "gpu"))
    local, traffic = plan.baselines.get(BaselineName.ALL_LOCAL), plan.break_even_traffic
    against = "none holds them"
    if local is not None and local.cost_usd_per_request is not None:
        against = f"{plan.cost_usd_per_request / local.cost_usd_per_request - 1:+.1%} ({bought(local.spec, local.instances)})"
    cells = (
        f"[{name}]({name}.json)",
        *SHIPPED[name],
        bought(plan.main.name, plan.instances),
        f"{remote:,}" + (f" ({on_gpu:,} on the GPU)" if on_gpu else ""),
        dollars(plan.cost_usd_per_request),
        f"{plan.tpot_s:.3g} s",
        against,
        "-" if traffic is None else figure(traffic.requests_per_hour),
        "-" if plan.gap is None else f"{plan.gap:.2%}",
        plan.verdict.replace("-", " "),
    )
    return f"| {' | '.join(cells)} |"


def money_row(name: str) -> str:
    """Write one row of the table of money in README.md."""
    plan = plan_of(name)
    gpus = (plan.baselines[each] for each in _GPUS if each in plan.baselines)
    gpu = min(gpus, key=lambda one: one.usd_per_hour or 0.0, default=None)
    cells = (
        SHIPPED[name][0],
        _costs(plan, plan.cost_usd_per_request, bought(plan.main.name, plan.instances), plan.tpot_s),
        _of_baseline(plan, plan.baselines.get(BaselineName.ALL_LOCAL)),
        _of_baseline(plan, gpu),
        "pays" if plan.verdict == "recommended" else "does not pay",
    )
    return f"| {' | '.join(cells)} |"


def _of_baseline(plan: Plan, one: Baseline | None) -> str:
    if one is None:
        return "-"
    if one.cost_usd_per_request is None:
        return f"{dollars(one.instances * (one.usd_per_hour or 0.0) * HOURS_PER_MONTH)} a month, {one.spec}, {one.tpot_s:.2g} s"
    return _costs(plan, one.cost_usd_per_request, bought(one.spec, one.instances), one.tpot_s)


def _costs(plan: Plan, usd: float, spec: str, tpot_s: float) -> str:
    per_hour = plan.workload.requests_per_hour
    price = f"{dollars(usd * 1e6)} a million requests" if per_hour is None else f"{dollars(usd * per_hour * HOURS_PER_MONTH)} a month"
    return f"{price}, {spec}, {tpot_s:.2g} s"


def main() -> None:
    print("\n".join(map(row, SHIPPED)))
    print()
    print("\n".join(map(money_row, IN_README)))


if __name__ == "__main__":
    main()

"""What a plan is compared with, by the titles that people read."""

from __future__ import annotations

from remoe_cli.plan.document import Baseline, BaselineName, Plan, Unquantised

BASELINE_TITLES = {
    BaselineName.CPU: "whole model in CPU memory",
    BaselineName.GPU: "whole model in GPU memory",
    BaselineName.STORED_CPU: "quantised model in CPU memory",
    BaselineName.STORED_GPU: "quantised model in GPU memory",
    BaselineName.FETCH: "ideal offloading (cannot be bought)",
    BaselineName.MIX: "all experts local, smallest main function",
    BaselineName.ALL_LOCAL: "all experts local",
}


def copy_title(copy: Unquantised) -> str:
    """Name the plan for a copy that is not quantised, beside a quantised checkpoint's."""
    return f"the same for a copy in {copy.dtype}"


def unlike_baselines(plan: Plan) -> dict[BaselineName, Baseline]:
    """List the baselines of a plan, of equal ones only the first."""
    unlike: dict[tuple[object, ...], BaselineName] = {}
    for name in sorted(plan.baselines, key=list(BaselineName).index):
        b = plan.baselines[name]
        unlike.setdefault((b.cost_usd_per_request, b.usd_per_hour, b.ttft_s, b.tpot_s, b.spec, b.instances), name)
    return {name: plan.baselines[name] for name in unlike.values()}


def beside(plan: Plan) -> dict[str, Baseline | Unquantised]:
    """List what a plan is compared with, by title.

    That is the plan for a copy that is not quantised, and of baselines that are alike only the first.
    """
    copies: dict[str, Baseline | Unquantised] = {} if plan.unquantised is None else {copy_title(plan.unquantised): plan.unquantised}
    return copies | {BASELINE_TITLES[name]: one for name, one in unlike_baselines(plan).items()}

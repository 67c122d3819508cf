"""A plan in rows of text for people. Pure functions; the command line decides how to draw them."""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING

from remoe_cli.plan.document import (
    WIDEST_FACTOR,
    BaselineName,
    BreakEven,
    MainSpec,
    Plan,
    PredictedRouting,
    Scenario,
    ScenarioKind,
)
from remoe_cli.plan.wording import bought, id_ranges, per_million

if TYPE_CHECKING:
    from remoe_cli.plan.catalog.catalog import Catalog
    from remoe_cli.plan.problem.request import PlanRequest
    from remoe_cli.profile.record import Profile

HEADER = ("layer", "remote experts", "count", "memory MB", "functions", "replicas")
BASELINES = ("", "requests", "TTFT", "TPOT", "on", "plan / it")
TITLES = {
    BaselineName.CPU: "whole model on CPUs",
    BaselineName.GPU: "whole model on a GPU",
    BaselineName.FETCH: "ideal offloading",
    BaselineName.MIX: "all experts local, smallest",
    BaselineName.ALL_LOCAL: "all experts local, cheapest",
}
AGAINST = {**TITLES, BaselineName.MIX: "all experts local", BaselineName.ALL_LOCAL: "all experts local"}
_FIGURES = {  # what a scenario multiplies, one and many
    ScenarioKind.CALL_OVERHEAD: ("call overhead", "call overheads"),
    ScenarioKind.FUNCTION_PRICE: ("price of expert functions", "prices of expert functions"),
}
SECTIONS = {
    "inputs": "Where the numbers come from",
    "money": "Where the money goes (a million requests)",
    "limits": "What binds, and what more of it is worth",
    "layers": "Why experts went remote",
    "scenarios": "Under other circumstances",
}
Rows = tuple[tuple[str, ...], ...]


def layer_rows(plan: Plan) -> Rows:
    """One row per MoE layer, under HEADER; runs of expert ids are written as `3-7`."""
    return tuple(
        (
            str(layer.layer),
            id_ranges(layer.remote),
            str(len(layer.remote)),
            str(layer.memory_mb),
            str(len(layer.parts)),
            str(layer.replicas),
        )
        if layer.remote
        else (str(layer.layer), "none", "0", "", "", "")
        for layer in plan.layers
    )


def summary_rows(plan: Plan) -> tuple[tuple[str, str], ...]:
    """(name, value) lines: verdict first, then money, latency, specs, and the certificate."""
    remote, with_remote = sum(len(layer.remote) for layer in plan.layers), sum(bool(layer.remote) for layer in plan.layers)
    workload, targets = plan.workload, plan.targets
    lengths = f"{workload.n_in:.4g} + {workload.n_out:.4g} tokens" + (" on average" if workload.kinds else "")
    budget = "" if targets.budget_usd is None else f" (budget {per_million(targets.budget_usd)})"
    main = f"{plan.main.name}: {plan.main.memory_mb} MB, {_vcpus(plan.main)}"
    rows = [
        ("verdict", plan.verdict.replace("-", " ")),
        ("reason", plan.reason),
        ("cost", f"{per_million(plan.cost_usd_per_request)} requests of {lengths}{budget}"),
        ("TTFT", _against(plan.ttft_s, 1, "s", targets.ttft_s)),
        ("TPOT", _against(plan.tpot_s, 1000, "ms", targets.tpot_s)),
        ("main function", main if plan.instances == 1 else f"{plan.instances} x {main}"),
        ("remote experts", f"{remote} in {with_remote} of {len(plan.layers)} layers"),
        ("certificate", _certificate(plan)),
    ]
    if (traffic := plan.break_even_traffic) is not None:
        text = f"above {traffic.requests_per_hour:g} requests an hour an always-on {traffic.instance} is cheaper than {traffic.by_use}"
        rows.append(("traffic", f"{text}, which is paid by use"))
    rows += [("break-even", break_even_text(one)) for one in plan.break_evens]
    rows.append(("prices", f"of {plan.prices_of}, {(date.today() - date.fromisoformat(plan.prices_of)).days} days old"))
    return tuple(rows)


def baseline_rows(plan: Plan) -> Rows:
    """Under BASELINES: every other way to run the model, and what the plan costs relative to it."""
    rows = [
        (
            TITLES[name] + ("" if b.meets else ", misses a target"),
            per_million(b.cost_usd_per_request),
            f"{b.ttft_s:.3g} s",
            f"{b.tpot_s * 1e3:.4g} ms",
            bought(b.spec, b.instances) + (f" ({b.assumed})" if b.assumed else ""),
            f"{plan.cost_usd_per_request / b.cost_usd_per_request:.3f}" if b.cost_usd_per_request > 0 else "",
        )
        for name, b in plan.baselines.items()
    ]
    return tuple([*rows, *((TITLES[name], "none", "", "", why, "") for name, why in plan.missing.items())])


def break_even_text(found: BreakEven) -> str:
    """Say where remote experts and another way to run the model cost the same, or that they nowhere do."""
    against = f"'{AGAINST[found.against]}'"
    if found.parameter == ScenarioKind.EVEN_ROUTING:
        if found.at is None:
            return f"No break-even against {against}, however many tokens are routed evenly."
        return f"Break-even against {against} if {found.at:.3g} of the tokens were routed evenly."
    one, many = _FIGURES[found.parameter]
    if found.at is None:
        return f"No break-even against {against} for {many} from 1/{WIDEST_FACTOR} to {WIDEST_FACTOR} times."
    return f"Break-even against {against} at {found.at:g} times the {one}."


def _certificate(plan: Plan) -> str:
    if plan.gap is None:
        return f"{plan.status}: no bound"
    least = per_million(plan.lower_bound_usd) if plan.lower_bound_usd is not None else f"{plan.lower_bound_s or 0.0:.4g} s"
    return f"{plan.status}: at least {least}, gap {plan.gap:.2%}"


def _vcpus(main: MainSpec) -> str:
    gpu = f", GPU of {main.gpu_memory_mb} MB, ${main.usd_per_hour:g} an hour" if main.gpu_memory_mb else ""
    return ("all cores of the profile's machine" if main.vcpus is None else f"{main.vcpus:.3g} vCPUs") + gpu


def _against(value_s: float, factor: float, unit: str, target_s: float | None) -> str:
    return f"{value_s * factor:.4g} {unit}" + ("" if target_s is None else f" (target {target_s * factor:.4g} {unit})")


# --explain


def explanation(plan: Plan, profile: Profile, catalog: Catalog, request: PlanRequest) -> dict[str, Rows]:
    """Explain a plan in sections of (name, text), by the names of SECTIONS."""
    from remoe_cli.plan.explain.why import binding_rows, layer_reasons, money_rows
    from remoe_cli.plan.problem.request import make_problem

    problem = make_problem(profile, catalog, request)
    return {
        "inputs": _inputs(plan, profile, catalog),
        "money": tuple(money_rows(problem, plan)),
        "limits": tuple(binding_rows(problem, request.aim, plan)),
        "layers": tuple(layer_reasons(problem, plan)),
        "scenarios": scenario_rows(plan),
    }


def _inputs(plan: Plan, profile: Profile, catalog: Catalog) -> Rows:
    record, workload = profile.record, plan.workload
    latency = record.latency
    traced = len(profile.arrays["trace_ids"])
    sources = sorted({(entry.date.isoformat(), entry.source, ", ".join(entry.of)) for entry in catalog.provenance})
    traffic = "unknown" if workload.requests_per_hour is None else f"{workload.requests_per_hour:.4g} requests an hour"
    return (
        (
            "routing",
            f"{record.routing.source}, {len(profile.arrays['prompt_tokens'])} prompts of {record.dataset.source}, {traced} tokens traced",
        ),
        *((("prompts", _predicted(workload.routing)),) if workload.routing else ()),
        ("times", f"{latency.source}: {latency.machine}, {latency.measured_on}"),
        ("warm invocation", latency.invocation.target if latency.invocation else f"catalog {catalog.name}"),
        ("requests", f"{workload.n_in:.4g} + {workload.n_out:.4g} tokens; traffic {traffic}; {workload.cold_share:.1%} cold"),
        *((f"{day} {fields}", source) for day, source, fields in sources),
    )


def _predicted(routing: PredictedRouting) -> str:
    off = "unknown" if routing.validation_bits is None else f"{routing.validation_bits:.3f} bits"
    total = sum(routing.weights)
    most = sorted(zip(routing.weights, routing.recorded, strict=True), key=lambda pair: (-pair[0], pair[1]))[:3]
    return (
        f"{routing.count} of {routing.prompts.path} (sha256 {routing.prompts.sha256[:12]}), predicted by {routing.predictor}: divergence "
        f"on held-out prompts {off}. Priced as a mixture of {len(routing.recorded)} recorded prompts, {routing.mixture_bits:g} bits from "
        f"the prediction; most of all of prompts {', '.join(f'{prompt} ({weight / total:.0%})' for weight, prompt in most)}"
    )


def scenario_rows(plan: Plan) -> Rows:
    """One row per scenario: what differs, and what the plan then costs."""
    return tuple((_scenario_name(scenario), _scenario_text(scenario)) for scenario in plan.scenarios)


def _scenario_name(scenario: Scenario) -> str:
    match scenario.kind:
        case ScenarioKind.EVEN_ROUTING:
            return f"{scenario.value:.0%} of tokens routed evenly"
        case ScenarioKind.PROFILE_ROUTING:
            return "routed as all of the profile's prompts"
        case ScenarioKind.HELD_OUT_PROMPTS:
            return f"planned on {scenario.planned_prompts} prompts, judged on {scenario.judged_prompts} others (by scan)"
        case kind:
            return f"{_FIGURES[kind][0]} x {scenario.value:g}"


def _scenario_text(scenario: Scenario) -> str:
    figures = f"{per_million(scenario.cost_usd_per_request)}, TTFT {scenario.ttft_s:.3g} s, TPOT {scenario.tpot_s * 1e3:.4g} ms"
    best = "" if scenario.best_usd is None else f"; the best plan known for them costs {per_million(scenario.best_usd)}"
    return figures + ("" if scenario.meets else "; misses a target") + best

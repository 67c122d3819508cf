"""A plan in rows of text for people. Pure functions; the command line decides how to draw them.

Money and the verdict come first. What programs read in a plan as an enum becomes words here.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date

from remoe_cli.plan.document import WIDEST_FACTOR, BaselineName, BreakEven, MainSpec, Method, Plan, Scenario, ScenarioKind
from remoe_cli.plan.wording import BASELINE_NAMES, VERDICT_WORDS, bought, id_ranges, millions, per_million

LAYER_COLUMNS = ("layer", "remote experts", "count", "memory MB", "functions", "replicas")
BASELINE_COLUMNS = ("", "per million", "TTFT", "TPOT", "runs on", "this plan,\nagainst it")
BASELINE_TITLES = {
    BaselineName.CPU: "whole model on CPUs",
    BaselineName.GPU: "whole model on a GPU",
    BaselineName.STORED_CPU: "quantised model on CPUs",
    BaselineName.STORED_GPU: "quantised model on a GPU",
    BaselineName.FETCH: "ideal offloading (cannot be bought)",
    BaselineName.MIX: "all local, smallest main function",
    BaselineName.ALL_LOCAL: "all local, cheapest main function",
}
_UNPROVEN: dict[Method, str] = {
    "scan": "found by the fast scan",
    "paper": "found by the paper's heuristic",
    "given": "given in a file",
}
_MULTIPLIED = {  # what a scenario multiplies
    ScenarioKind.CALL_OVERHEAD: "call overhead",
    ScenarioKind.FUNCTION_PRICE: "price of expert functions",
}
Rows = tuple[tuple[str, ...], ...]


def layer_rows(plan: Plan) -> Rows:
    """Write one row per MoE layer, under LAYER_COLUMNS."""
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


def summary_rows(plan: Plan) -> Rows:
    """Write lines of (name, text): money and the verdict first, then latency and what is bought."""
    remote, with_remote = sum(len(layer.remote) for layer in plan.layers), sum(bool(layer.remote) for layer in plan.layers)
    workload, targets = plan.workload, plan.targets
    lengths = f"{workload.n_in:.4g} + {workload.n_out:.4g} tokens" + (" on average" if workload.kinds else "")
    budget = "" if targets.budget_usd is None else f" (budget: {per_million(targets.budget_usd)})"
    main = bought(plan.main.name, plan.instances)
    rows = [
        ("cost", f"{per_million(plan.cost_usd_per_request)} requests of {lengths}{budget}"),
        ("verdict", VERDICT_WORDS[plan.verdict]),
        ("why", plan.reason),
        ("TTFT", f"{plan.ttft_s:.4g} s to the first token{_ttft_target(plan)}"),
        ("TPOT", f"{plan.tpot_s * 1e3:.4g} ms for each further token{_target(targets.tpot_s, 1e3, 'ms')}"),
        *(("times", text) for text in _spread_text(plan)),
        *(("requests", text) for text in served_texts(plan)),
        ("main function", f"{main}: {plan.main.memory_mb} MB, {_vcpus(plan.main)}"),
        ("remote experts", f"{remote} in {with_remote} of {len(plan.layers)} layers" if remote else "none"),
        ("optimality", _optimality(plan)),
    ]
    if (traffic := plan.break_even_traffic) is not None:
        start = f"Above {traffic.requests_per_hour:g} requests an hour, an always-on {traffic.instance}"
        rows.append(("traffic", f"{start} costs less than {traffic.by_use}, which is paid by use."))
    rows += [("break-even", text) for text in break_even_texts(plan)]
    rows.append(("prices", f"of {plan.prices_of}, {(date.today() - date.fromisoformat(plan.prices_of)).days} days old"))
    return tuple(rows)


def baseline_rows(plan: Plan) -> Rows:
    """Write one row per other way to run the model, under BASELINE_COLUMNS."""
    rows = [
        (
            BASELINE_TITLES[name] + ("" if b.meets else ", misses a target"),
            millions(b.cost_usd_per_request),
            f"{b.ttft_s:.3g} s",
            f"{b.tpot_s * 1e3:.4g} ms",
            bought(b.spec, b.instances),
            _compared(plan.cost_usd_per_request, b.cost_usd_per_request),
        )
        for name, b in plan.baselines.items()
    ]
    return tuple([*rows, *((BASELINE_TITLES[name], "none", "", "", why, "") for name, why in plan.missing.items())])


def break_even_texts(plan: Plan) -> Iterator[str]:
    """Say where remote experts and another way to run the model cost the same.

    There is a sentence for each way, or one that says that they never do.
    """
    found = [one for one in plan.break_evens if one.at is not None]
    yield from map(_break_even_text, found)
    if plan.break_evens and not found:
        against = plan.break_evens[0].against
        yield (
            f"Remote experts {_relation(plan, against)} '{BASELINE_NAMES[against]}' at call overheads and prices from 1/{WIDEST_FACTOR} to "
            f"{WIDEST_FACTOR} times today's, and even if all tokens used all experts equally."
        )


def _break_even_text(found: BreakEven) -> str:
    where = (
        f"if {found.at:.1%} of the tokens were routed evenly"
        if found.parameter == ScenarioKind.EVEN_ROUTING
        else f"at {found.at:g} times the {_MULTIPLIED[found.parameter]}"
    )
    return f"Remote experts and '{BASELINE_NAMES[found.against]}' cost the same {where}."


def _relation(plan: Plan, against: BaselineName) -> str:
    """Say which of both is cheaper everywhere, where there is no break-even and so no change."""
    if any(layer.remote for layer in plan.layers):
        cheaper = plan.cost_usd_per_request < plan.baselines[against].cost_usd_per_request
        return "stay cheaper than" if cheaper else "stay dearer than"
    # A plan for speed may leave out remote experts that would be cheaper.
    return "stay dearer than" if plan.objective == "cost" else "never cost the same as"


def scenario_rows(plan: Plan) -> Rows:
    """Write one row per scenario: what differs, and what the plan then costs."""
    return tuple((_scenario_name(scenario), _scenario_text(scenario)) for scenario in plan.scenarios)


def _scenario_name(scenario: Scenario) -> str:
    match scenario.kind:
        case ScenarioKind.EVEN_ROUTING:
            return f"{scenario.value:.0%} of tokens routed evenly"
        case ScenarioKind.PROFILE_ROUTING:
            return "routed as all of the profile's prompts"
        case ScenarioKind.HELD_OUT_PROMPTS:
            return f"a test: planned on half of the prompts ({scenario.planned_prompts}), priced on the other {scenario.judged_prompts}"
        case kind:
            return f"{_MULTIPLIED[kind]} x {scenario.value:g}"


def _scenario_text(scenario: Scenario) -> str:
    figures = f"{per_million(scenario.cost_usd_per_request)}, TTFT {scenario.ttft_s:.3g} s, TPOT {scenario.tpot_s * 1e3:.4g} ms"
    best = "" if scenario.best_usd is None else f"; the best known plan for them costs {per_million(scenario.best_usd)}"
    return figures + ("" if scenario.meets else "; misses a target") + best


def _optimality(plan: Plan) -> str:
    if plan.gap is None:
        return f"not proven: {_UNPROVEN[plan.method]}"
    if plan.lower_bound_usd is not None:
        bound = f"no plan costs less than {per_million(plan.lower_bound_usd)} requests"
    else:
        bound = f"no plan has a {plan.objective.upper()} below {plan.lower_bound_s or 0.0:.4g} s"
    if plan.status == "optimal":
        return f"optimal: {bound}"
    if plan.status == "forced":
        return f"not optimal, because you forced experts out (--remote-share); without that, {bound}"
    start = "stopped by the time limit, " if plan.status == "time-limit" else ""
    return f"{start}within {plan.gap:.2%} of the optimum: {bound}"


def _compared(plan_usd: float, other_usd: float) -> str:
    change = plan_usd / other_usd - 1 if other_usd > 0 else 0.0
    return "the same" if abs(change) < 5e-4 else f"{abs(change):.1%} {'less' if change < 0 else 'more'}"


def _vcpus(main: MainSpec) -> str:
    gpu = f", GPU of {main.gpu_memory_mb} MB, ${main.usd_per_hour:g} an hour" if main.gpu_memory_mb else ""
    return ("all cores of the profile's machine" if main.vcpus is None else f"{main.vcpus:.3g} vCPUs") + gpu


def _ttft_target(plan: Plan) -> str:
    target_s, percentile = plan.targets.ttft_s, plan.targets.ttft_percentile
    if percentile is None:
        return _target(target_s, 1, "s")
    held = f"; {percentile:g}% of the requests: at most {plan.outcome.held_ttft_s:.4g} s"
    return held + _target(target_s, 1, "s")


def _spread_text(plan: Plan) -> Iterator[str]:
    """Say what half of the requests, 95% and 99% take at most, where they differ."""
    if len({one.total_s for one in plan.spread} | {one.ttft_s for one in plan.spread}) < 3:
        return
    shares = " / ".join(f"{one.share:.0%}" for one in plan.spread)
    ttft, whole = (" / ".join(f"{getattr(one, name):.3g}" for one in plan.spread) for name in ("ttft_s", "total_s"))
    yield f"{shares} of the requests have their first token within {ttft} s and their last within {whole} s"


def served_texts(plan: Plan) -> Iterator[str]:
    """Say which requests are answered and which are refused, where a file of requests was given."""
    if (served := plan.workload.served) is None:
        return
    left = f": {1 - served.share:.2%} of the file's" if served.share < 1 else ""
    most = f"requests of up to {served.tokens:,} tokens, with prompts of up to {served.n_in:,}"
    yield f"The plan holds for {most}. Longer ones are refused{left}."


def _target(target_s: float | None, factor: float, unit: str) -> str:
    return "" if target_s is None else f" (target: {target_s * factor:.4g} {unit})"

"""A plan in rows of text for people. Pure functions; the command line decides how to draw them.

Money and the verdict come first. What programs read in a plan as an enum becomes words here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date

from remoe_cli.plan.document import (
    WIDEST_FACTOR,
    Baseline,
    BaselineName,
    BreakEven,
    KindOutcome,
    LayerPlan,
    MainKind,
    MainSpec,
    Method,
    Plan,
    Scenario,
    ScenarioKind,
    WorkloadRef,
)
from remoe_cli.plan.explain.alternatives import BASELINE_TITLES, copy_title, unlike_baselines
from remoe_cli.plan.wording import (
    BASELINE_NAMES,
    HOURS_PER_MONTH,
    KIND_NAMES,
    VERDICT_WORDS,
    alone,
    amount,
    bought,
    capitalized,
    dollars,
    drafts_text,
    figure,
    form_text,
    id_ranges,
    prices,
    request_tokens,
    seconds,
    warm_and_cold,
)
from remoe_cli.units import size

LAYER_COLUMNS = ("layer", "remote experts", "count", "memory MB", "functions", "replicas")
GPU_COLUMNS = ("experts on the GPU", "count", "on the CPU")  # where a plan has experts there
HOW_TO = {  # what to do for an alternative
    BaselineName.CPU: "run it with a server such as vLLM; remoe does not deploy it",
    BaselineName.GPU: "run it with a server such as vLLM; remoe does not deploy it",
    BaselineName.STORED_CPU: "run it with a server that reads its format; remoe does not deploy it",
    BaselineName.STORED_GPU: "run it with a server that reads its format; remoe does not deploy it",
    BaselineName.ALL_LOCAL: "add --remote-share 0 to the command of this plan, then deploy that plan",
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
    """Write one row per MoE layer, under the names of `layer_columns`."""
    return tuple(
        (
            *(
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
            ),
            *((id_ranges(layer.gpu) or "none", str(len(layer.gpu)), str(_on_cpu(plan, layer))) if _has_gpu_experts(plan) else ()),
        )
        for layer in plan.layers
    )


def layer_columns(plan: Plan) -> tuple[str, ...]:
    """Name the columns of `layer_rows`."""
    return LAYER_COLUMNS + (GPU_COLUMNS if _has_gpu_experts(plan) else ())


def _has_gpu_experts(plan: Plan) -> bool:
    return any(layer.gpu for layer in plan.layers)


def _on_cpu(plan: Plan, layer: LayerPlan) -> int:
    return plan.model.experts_per_layer - len(layer.remote) - len(layer.gpu)


def summary_rows(plan: Plan) -> Rows:
    """Write lines of (name, text): the answer, money and time first, then what is bought."""
    remote, with_remote = sum(len(layer.remote) for layer in plan.layers), sum(bool(layer.remote) for layer in plan.layers)
    experts = plan.model.experts_per_layer * len(plan.layers)
    workload, targets = plan.workload, plan.targets
    size = request_tokens(workload.n_in, workload.n_out) + (" on average" if workload.kinds else "")
    budget = "" if targets.budget_usd is None else f" (budget: {dollars(targets.budget_usd)})"
    main = bought(plan.main.name, plan.instances)
    rows = [
        ("verdict", VERDICT_WORDS[plan.verdict]),
        ("why", plan.reason),
        ("cost", f"{prices(plan.cost_usd_per_request, workload)} of {size}{budget}"),
        ("TTFT", f"{_ttft(plan)} to the first token{_ttft_target(plan)}"),
        ("TPOT", f"{plan.tpot_s * 1e3:.4g} ms for each further token{_target(targets.tpot_s, 1e3, 'ms')}"),
        *(("times", text) for text in _spread_text(plan)),
        *(("requests", text) for text in served_texts(plan)),
        ("main function", f"{main}: {plan.main.memory_mb} MB, {_vcpus(plan.main)}{_at_once(plan)}"),
        *(("drafts", text) for text in drafts_text(plan)),
        ("remote experts", f"{remote:,} of {experts:,}, in {with_remote} of {len(plan.layers)} layers" if remote else "none"),
        *(("expert form", text) for text in form_text(plan)),
        *(("local experts", text) for text in _local_text(plan)),
        ("optimality", _optimality(plan)),
    ]
    by_use = plan.main.usd_per_hour is None and plan.verdict != "depends-on-traffic"  # whose reason says it
    if by_use and (traffic := plan.break_even_traffic) is not None:
        start = f"Above {figure(traffic.requests_per_hour)} requests an hour, an always-on {traffic.instance}"
        month = f"{dollars(traffic.usd_per_hour * HOURS_PER_MONTH)} a month"
        rows.append(("traffic", f"{start} ({month}) costs less than paying by use.{alone(traffic, plan.workload.concurrency)}"))
    rows += [("beside it", kind_text(plan, other)) for other in plan.kinds if other.kind != plan.main.kind]
    if text := break_even_text(plan):
        rows.append(("break-even", text))
    age = (date.today() - date.fromisoformat(plan.prices_of)).days
    rows.append(("prices", f"of {plan.prices_of}, {age} days old ('remoe catalog update' looks them up)"))
    return tuple(rows)


def _at_once(plan: Plan) -> str:
    return "" if plan.workload.concurrency == 1 else f"; {plan.concurrency} request{'s' * (plan.concurrency > 1)} at once"


def _local_text(plan: Plan) -> Iterator[str]:
    """Say how many local experts are on the GPU and in CPU memory, where some are on the GPU."""
    if _has_gpu_experts(plan):
        on_gpu, on_cpu = sum(len(layer.gpu) for layer in plan.layers), sum(_on_cpu(plan, layer) for layer in plan.layers)
        yield f"{on_gpu:,} on the GPU ({size(on_gpu * plan.model.expert_bytes)} of its memory), {on_cpu:,} in CPU memory"


def _ttft(plan: Plan) -> str:
    """Write the mean TTFT, and those of warm and cold requests where some are cold."""
    if plan.main.scales_to_zero and (waking := plan.workload.waking) is not None:
        woken = f"the {waking.wake_share:.1%} of the requests that wake the main function wait {seconds(plan.cold_start_s)} more"
        return f"{seconds(plan.ttft_s)} on average; {woken}"
    share = plan.workload.cold_share
    if not share or not plan.cold_start_s:
        return seconds(plan.ttft_s)
    return f"{warm_and_cold(plan.ttft_s, plan.cold_start_s, share)}, {seconds(plan.ttft_s)} on average"


def kind_text(plan: Plan, other: KindOutcome) -> str:
    """Say what the best known plan with another kind of main function costs, and how fast it is."""
    cold = f", {other.cold_start_s:.0f} s more where it has to start" if other.cold_start_s >= 1 else ""
    usd, on = amount(other.cost_usd_per_request, plan.workload), bought(other.spec, other.instances)
    return (
        f"{capitalized(KIND_NAMES[other.kind])}, on {on}: at best {usd} a month, TTFT {seconds(other.ttft_s)} on average{cold}, "
        f"TPOT {other.tpot_s * 1e3:.4g} ms{_why_dearer(plan, other)}"
    )


def _why_dearer(plan: Plan, other: KindOutcome) -> str:
    """Say why an instance that scales to zero costs more than one that is always on, where it does."""
    always_on = next((one for one in plan.kinds if one.kind == MainKind.ALWAYS_ON), None)
    waking, per_hour = plan.workload.waking, plan.workload.requests_per_hour
    if other.kind != MainKind.TO_ZERO or always_on is None or waking is None or per_hour is None:
        return ""
    to_zero_usd, always_usd = (one.cost_usd_per_request * per_hour for one in (other, always_on))
    if to_zero_usd <= always_usd:
        return ""
    return (
        f"; dearer than always on, as it is up {waking.up_share:.1%} of the time, and an hour of that costs "
        f"{dollars(to_zero_usd / waking.up_share)} in all instead of {dollars(always_usd)}"
    )


def baseline_rows(plan: Plan) -> Rows:
    """Write one row for each other way to run the model that has a price; equal ways share a row.

    The first is the plan for a copy that is not quantised, where there is one. `baseline_columns` names the columns.
    """
    rows = [
        (
            copy_title(copy),
            amount(copy.cost_usd_per_request, plan.workload),
            seconds(copy.ttft_s),
            f"{copy.tpot_s * 1e3:.4g} ms",
            bought(copy.spec, copy.instances),
            _compared(plan.cost_usd_per_request, copy.cost_usd_per_request),
        )
        for copy in ([] if plan.unquantised is None else [plan.unquantised])
    ] + [
        (
            BASELINE_TITLES[name] + ("" if b.meets else ", misses a target"),
            _cost(b, plan.workload),
            seconds(b.ttft_s),
            f"{b.tpot_s * 1e3:.4g} ms",
            bought(b.spec, b.instances),
            "" if b.cost_usd_per_request is None else _compared(plan.cost_usd_per_request, b.cost_usd_per_request),
        )
        for name, b in unlike_baselines(plan).items()
    ]
    return tuple(rows)


def baseline_columns(plan: Plan) -> tuple[str, ...]:
    """Name the columns of `baseline_rows`."""
    unit = "USD per million\noutput tokens" if plan.workload.requests_per_hour is None else "USD\na month"
    return ("", unit, "TTFT", "TPOT", "runs on", "this plan,\nagainst it")


def _cost(baseline: Baseline, workload: WorkloadRef) -> str:
    """Write what a baseline costs: in the unit of its column, or the month of an instance whose requests have no price."""
    if baseline.cost_usd_per_request is not None:
        return amount(baseline.cost_usd_per_request, workload)
    return f"{dollars((baseline.usd_per_hour or 0.0) * baseline.instances * HOURS_PER_MONTH)} a month"


def alternative_texts(plan: Plan) -> Iterator[str]:
    """Say how to have each alternative, and why others have no price.

    One instance may have two speeds; then a sentence says why.
    """
    if (copy := plan.unquantised) is not None:
        whole = plan.model.nonexpert_bytes + plan.model.expert_bytes * plan.model.experts_per_layer * len(plan.layers)
        yield (
            f"{copy_title(copy)}: the best plan for it that the fast scan finds. Its functions have "
            f"{_functions_mb(copy.layers):,} MB in all, not {_functions_mb(plan.layers):,}, and a cold start takes "
            f"{seconds(copy.cold_start_s)}, not {seconds(plan.cold_start_s)}. To have it, plan for that copy, of {size(whole)}."
        )
    is_local = not any(layer.remote for layer in plan.layers)
    for name in unlike_baselines(plan):  # those of the table
        if name in HOW_TO and not (is_local and name == BaselineName.ALL_LOCAL):
            yield f"{BASELINE_TITLES[name]}: {HOW_TO[name]}."
    gpu, local = plan.baselines.get(BaselineName.GPU), plan.baselines.get(BaselineName.ALL_LOCAL)
    if gpu is not None and local is not None and gpu.spec == local.spec:
        yield (
            f"On {gpu.spec}, 'all experts local' takes each layer's hidden states from the GPU to the CPUs and back; 'whole model' "
            "computes all on the GPU, which is faster."
        )
    reasons: dict[str, BaselineName] = {}
    for name in sorted(plan.missing, key=list(BaselineName).index):
        reasons.setdefault(plan.missing[name], name)
    yield from (f"{BASELINE_TITLES[name]}: {reason}." for reason, name in reasons.items())


def _functions_mb(layers: Sequence[LayerPlan]) -> int:
    """Count the memory of all expert functions, with their replicas."""
    return sum(layer.memory_mb * len(layer.parts) * layer.replicas for layer in layers)


def break_even_text(plan: Plan) -> str:
    """Say at which changes remote experts and another way to run the model cost the same.

    Empty where none was looked for.
    """
    if not plan.break_evens:
        return ""
    against = plan.break_evens[0].against
    found = [_break_even_at(one) for one in plan.break_evens if one.at is not None]
    if found:
        return f"Remote experts and '{BASELINE_NAMES[against]}' cost the same {_listed(found)}."
    return (
        f"Robust: remote experts {_relation(plan, against)} '{BASELINE_NAMES[against]}' at call overheads and prices from "
        f"1/{WIDEST_FACTOR} to {WIDEST_FACTOR} times today's, and even if all tokens used all experts equally."
    )


def _break_even_at(found: BreakEven) -> str:
    if found.parameter == ScenarioKind.EVEN_ROUTING:
        return f"if {found.at:.1%} of the tokens were routed evenly"
    return f"at {found.at:g} times the {_MULTIPLIED[found.parameter]}"


def _listed(texts: Sequence[str]) -> str:
    *start, last = texts
    return f"{', '.join(start)}, or {last}" if start else last


def _relation(plan: Plan, against: BaselineName) -> str:
    """Say which of both is cheaper everywhere, where there is no break-even and so no change."""
    if any(layer.remote for layer in plan.layers):
        cheaper = plan.cost_usd_per_request < (plan.baselines[against].cost_usd_per_request or 0.0)
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
    figures = f"{dollars(scenario.cost_usd_per_request)} a request, TTFT {scenario.ttft_s:.3g} s, TPOT {scenario.tpot_s * 1e3:.4g} ms"
    best = "" if scenario.best_usd is None else f"; the best known plan for them costs {dollars(scenario.best_usd)}"
    return figures + ("" if scenario.meets else "; misses a target") + best


def _optimality(plan: Plan) -> str:
    if plan.gap is None:
        return f"not proven: {_UNPROVEN[plan.method]}"
    none = "no plan of the kind that the notes name" if _has_gpu_experts(plan) else "no plan"
    if plan.lower_bound_usd is not None:
        bound = f"{none} costs less than {dollars(plan.lower_bound_usd)} a request"
    else:
        bound = f"{none} has a {plan.objective.upper()} below {plan.lower_bound_s or 0.0:.4g} s"
    if plan.status == "optimal":
        return f"optimal: {bound}"
    if plan.status == "forced":
        what = "forced experts out" if any(layer.remote for layer in plan.layers) else "kept all experts local"
        return f"not optimal, because you {what} (--remote-share); without that, {bound}"
    start = "stopped by the time limit, " if plan.status == "time-limit" else ""
    return f"{start}within {plan.gap:.2%} of the optimum: {bound}"


def _compared(plan_usd: float, other_usd: float) -> str:
    change = plan_usd / other_usd - 1 if other_usd > 0 else 0.0
    return "the same" if abs(change) < 5e-4 else f"{abs(change):.1%} {'less' if change < 0 else 'more'}"


def _vcpus(main: MainSpec) -> str:
    up = " while it is up" if main.scales_to_zero else ""
    gpu = f", GPU of {main.gpu_memory_mb} MB, ${main.usd_per_hour:g} an hour{up}" if main.gpu_memory_mb else ""
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
    most = f"requests of up to {served.tokens + 1:,} tokens, with prompts of up to {served.n_in:,}"  # with the first token of an answer
    yield f"The plan holds for {most}. Longer ones are refused{left}."


def _target(target_s: float | None, factor: float, unit: str) -> str:
    return "" if target_s is None else f" (target: {figure(target_s * factor)} {unit})"

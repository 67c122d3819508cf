"""Whether a plan is worth it: the verdict, what it is based on, and a sentence that says why.

`_basis` decides. `_sentence` words the decision for people; tests/plan/test_verdict.py holds its wording.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from remoe_cli.plan.assess.baselines import Baselines
from remoe_cli.plan.cost import main_function
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.cost.prompts import cold_wait_s
from remoe_cli.plan.document import Baseline, BaselineName, Basis, BreakEvenTraffic, MainSpec, Method, Outcome, Verdict
from remoe_cli.plan.problem.aim import SLACK, Aim, meets
from remoe_cli.plan.problem.problem import GB_MB, MB, Placement, Problem
from remoe_cli.plan.problem.workload import Workload
from remoe_cli.plan.solve.candidates import ENUMERATED_EXPERTS, gpu_sizes, remote_sizes_beside_gpu
from remoe_cli.plan.solve.columns import build_columns, fewest_functions
from remoe_cli.plan.wording import (
    BASELINE_NAMES,
    HOURS_PER_MONTH,
    alone,
    amount,
    bought,
    capitalized,
    dollars,
    figure,
    price,
    seconds,
    warm_and_cold,
)
from remoe_cli.units import size

MIN_TRACE_TOKENS = 200  # below, a hit probability of 1% rests on fewer than two tokens
WORTHWHILE = 1e-3  # a plan must be cheaper than what it is compared with by more than this share
VERDICTS: dict[Basis, Verdict] = {
    Basis.TOO_FEW_TOKENS: "insufficient-evidence",
    Basis.MISSES_TARGET: "not-recommended",
    Basis.NOTHING_ELSE_FITS: "recommended",
    Basis.OTHERS_MISS_TARGETS: "recommended",
    Basis.CHEAPER: "recommended",
    Basis.DEPENDS_ON_TRAFFIC: "depends-on-traffic",
    Basis.DEARER_THAN_WHOLE_MODEL: "not-recommended",
    Basis.DEARER_THAN_ALL_LOCAL: "not-recommended",
    Basis.ALL_LOCAL_IS_CHEAPEST: "not-recommended",
}


@dataclass(frozen=True)
class Judgement:
    """The verdict, what it is based on, and a sentence that tells people why."""

    verdict: Verdict
    basis: Basis
    reason: str


def judge(
    problem: Problem,
    aim: Aim,
    placement: Placement,
    outcome: Outcome,
    others: Baselines,
    traffic: BreakEvenTraffic | None,
    *,
    asked: bool = False,
) -> Judgement:
    """Recommend a plan only if it meets the targets and every alternative that meets them too costs more.

    `asked` tells that the user said which experts are remote, so that no cheaper plan was looked for.
    """
    name = cheapest_rival(others.priced)
    basis = _basis(problem, aim, placement, outcome, others, name)
    if problem.workload.requests_per_hour is None and traffic is not None and VERDICTS[basis] == "recommended":
        basis = Basis.DEPENDS_ON_TRAFFIC
    return Judgement(VERDICTS[basis], basis, _sentence(basis, problem, placement, outcome, others, name, traffic, asked))


def _basis(problem: Problem, aim: Aim, placement: Placement, outcome: Outcome, others: Baselines, rival: BaselineName | None) -> Basis:
    if len(problem.workload.trace) < MIN_TRACE_TOKENS:
        return Basis.TOO_FEW_TOKENS
    if not meets(aim, outcome):
        return Basis.MISSES_TARGET
    if rival is None:
        return Basis.OTHERS_MISS_TARGETS if BaselineName.ALL_LOCAL in others.priced else Basis.NOTHING_ELSE_FITS
    if outcome.cost_usd_per_request < _usd(others, rival) * (1 - WORTHWHILE):
        return Basis.CHEAPER
    if rival in (BaselineName.CPU, BaselineName.GPU, BaselineName.STORED_CPU, BaselineName.STORED_GPU):
        return Basis.DEARER_THAN_WHOLE_MODEL
    return Basis.DEARER_THAN_ALL_LOCAL if _remote_experts(placement) else Basis.ALL_LOCAL_IS_CHEAPEST


def _usd(others: Baselines, name: BaselineName) -> float:
    usd = others.priced[name].cost_usd_per_request
    assert usd is not None, "only baselines with a price are compared"
    return usd


def _sentence(
    basis: Basis,
    problem: Problem,
    placement: Placement,
    outcome: Outcome,
    others: Baselines,
    name: BaselineName | None,
    traffic: BreakEvenTraffic | None,
    asked: bool,
) -> str:
    """Say why the verdict is what it is: money and time. Nothing compares this text, so it may be reworded at any time."""
    workload = problem.workload
    own = price(outcome.cost_usd_per_request, workload)
    if basis == Basis.TOO_FEW_TOKENS:
        traced = f"The profile traced {len(workload.trace)} decode tokens"
        return f"{traced}; at least {MIN_TRACE_TOKENS} are needed to tell how often experts are used."
    if basis == Basis.MISSES_TARGET:
        return (
            f"It misses a target: its TTFT is {outcome.ttft_s:.4g} s, its TPOT {outcome.tpot_s:.4g} s, "
            f"its cost {dollars(outcome.cost_usd_per_request)} a request."
        )
    if basis == Basis.DEPENDS_ON_TRAFFIC and traffic is not None:
        what = "remote experts beside it" if traffic.against is None else BASELINE_NAMES[traffic.against]
        month = dollars(traffic.usd_per_hour * HOURS_PER_MONTH)
        return (
            f"Below {figure(traffic.requests_per_hour)} requests an hour it costs less than an always-on {traffic.instance} with {what}, "
            f"which costs {month} a month however many requests come; above, rent that.{alone(traffic, problem.concurrency)} "
            f"{_slower(workload, outcome, traffic, cold_wait_s(problem, placement))} "
            "Give --requests-per-hour for the cost of a month."
        )
    if name is None:
        late = others.priced.get(BaselineName.ALL_LOCAL)
        if late is None:
            return f"{capitalized(others.missing[BaselineName.ALL_LOCAL])}. This plan costs {own}."
        return (
            f"With all experts local, no main function meets the targets (on {bought(late.spec, late.instances)}: "
            f"TTFT {late.ttft_s:.4g} s, TPOT {late.tpot_s:.4g} s{_each(late)}). This plan costs {own}."
        )
    rival, usd = others.priced[name], _usd(others, name)
    rivals, on = price(usd, workload), bought(rival.spec, rival.instances)
    change = outcome.cost_usd_per_request / usd - 1 if usd > 0 else 0.0
    if basis == Basis.CHEAPER:
        name = _fastest_of_equals(others.priced, usd)
        rival = others.priced[name]
        on = bought(rival.spec, rival.instances)
        # Beside an instance that scales to zero there are two waits, and the mean has both.
        extra_s = cold_wait_s(problem, placement) if workload.cold_share and not placement.main.scales_to_zero else None
        return (
            f"It costs {amount(outcome.cost_usd_per_request, workload)} instead of {rivals} for {BASELINE_NAMES[name]} on {on}, the best "
            f"alternative: {-change:.1%} less. "
            f"{_slower(workload, outcome, rival, extra_s)}"
        )
    if basis == Basis.DEARER_THAN_WHOLE_MODEL:
        cheaper = f"{capitalized(BASELINE_NAMES[name])}, {on}, is cheaper: {amount(usd, workload)} instead of {own}."
        return f"{cheaper} {_slower(workload, outcome, rival, cold_s=None)}"
    if basis == Basis.ALL_LOCAL_IS_CHEAPEST and asked:
        return (
            f"All experts are local, on {bought(placement.main.name, placement.instances)}, because you asked for that: {own}. "
            "Without --remote-share or --placement, 'remoe plan' looks for a cheaper plan."
        )
    if basis == Basis.DEARER_THAN_ALL_LOCAL:
        compared = "about the same as" if abs(change) < WORTHWHILE else f"{abs(change):.1%} more than"
        start = (
            f"With {_remote_experts(placement)} experts remote, it costs {own}, {compared} {BASELINE_NAMES[name]} on {on} "
            f"({amount(usd, workload)})."
        )
    else:
        start = f"Keeping all experts local, on {placement.main.name}, is the cheapest plan: {own}."
        name = _fastest_of_equals(others.priced, usd)
        faster = others.priced[name]
        if faster.tpot_s < outcome.tpot_s * (1 - WORTHWHILE):
            start += f" {capitalized(BASELINE_NAMES[name])}, {bought(faster.spec, faster.instances)}, costs the same and is faster."
            return f"{start} {_slower(workload, outcome, faster, cold_s=None)}"
    local = None if others.all_local is None else others.all_local.placement.main
    smallest = min(spec.memory_mb for spec in problem.menu)
    if local is not None and local.usd_per_hour is not None:
        if placement.main.usd_per_hour is None:
            return f"{start} {_slower(workload, outcome, rival, cold_s=None)}"
        return f"{start} Memory that is rented by the hour costs the same whether experts are in it or not."
    if local is not None and local.memory_mb == smallest:
        return (
            f"{start} All experts fit the smallest main function there is ({smallest} MB), so moving some out frees no memory that is paid."
        )
    return f"{start} {_cheapest_remote_expert(problem, others.priced.get(BaselineName.ALL_LOCAL, rival))}"


def _each(baseline: Baseline) -> str:
    """Write what a request costs, where that is known: a budget may be what is missed."""
    return "" if baseline.cost_usd_per_request is None else f", {dollars(baseline.cost_usd_per_request)} a request"


def _fastest_of_equals(priced: dict[BaselineName, Baseline], usd: float) -> BaselineName:
    """Name the fastest baseline that can be bought, meets the targets and costs `usd`."""
    equals = [name for name, each_usd in _able(priced).items() if each_usd <= usd * (1 + SLACK)]
    return min(equals, key=lambda name: (priced[name].tpot_s, priced[name].ttft_s))


def _slower(workload: Workload, outcome: Outcome, rival: Baseline | BreakEvenTraffic, cold_s: float | None) -> str:
    """Compare how long whole answers take: mean ones, or warm and cold ones where `cold_s` says what a cold start adds."""
    own_s, rival_s = (one.ttft_s + workload.n_out * one.tpot_s for one in (outcome, rival))
    start = f"An answer of {figure(workload.n_out + 1)} tokens takes"
    if not cold_s:
        return f"{start} {seconds(own_s)} instead of {seconds(rival_s)}."
    if not workload.cold_share:  # as the traffic is unknown
        return f"{start} {seconds(own_s)} warm, {seconds(own_s + cold_s)} where nothing is, instead of {seconds(rival_s)}."
    return f"{start} {warm_and_cold(own_s, cold_s, workload.cold_share)}, instead of {seconds(rival_s)}."


def _remote_experts(placement: Placement) -> int:
    return sum(len(layer.remote) for layer in placement.layers)


def cheapest_rival(priced: dict[BaselineName, Baseline]) -> BaselineName | None:
    """Name the cheapest baseline that can be bought and meets the targets.

    Of equals, all experts local goes first.
    """
    able = _able(priced)
    least = min(able.values(), default=0.0)
    return next((name for name, usd in able.items() if usd <= least * (1 + SLACK)), None)


def _able(priced: dict[BaselineName, Baseline]) -> dict[BaselineName, float]:
    """Find what a request costs on each baseline that can be bought, has a price and meets the targets; all experts local first."""
    order = [BaselineName.ALL_LOCAL, *(name for name in priced if name != BaselineName.ALL_LOCAL)]
    ways = {name: priced[name] for name in order if name in priced and priced[name].meets and not priced[name].ideal}
    return {name: way.cost_usd_per_request for name, way in ways.items() if way.cost_usd_per_request is not None}


def notes(problem: Problem, placement: Placement, method: Method, gain: float) -> Iterator[str]:
    """Say in sentences what was assumed, and what the figures leave out."""
    workload, catalog = problem.workload, problem.catalog
    is_some = method in ("exact", "forced") and problem.spec.experts_per_layer > ENUMERATED_EXPERTS
    if is_some:
        searched = f"; exchanging single experts then saves {gain:.2%} more" if method == "exact" else ""
        yield f"The lower bound is for plans that make each layer's least used experts remote{searched}."
    if method in ("exact", "forced") and (most := main_function.most_gpu_experts(problem)):
        yield _gpu_note(problem, most, "The bound is also" if is_some else "The lower bound is")
    yield from _more_functions(problem.at_main(placement.main), placement)
    yield from workload.assumptions
    latency = problem.latency_of(placement.main)
    if latency is not problem.latency:
        yield f"Times of {placement.main.name} are those of the description '{latency.machine}', not measured."
    elif latency.source == "described":
        yield f"Times are those of the description '{latency.machine}', not measured."
    elif latency.gpu_expert is not None and not main_function.on_gpu(problem, placement.main):
        yield f"Times of all but the experts were measured on a GPU, which {placement.main.name} does not have: profile with --device cpu."
    yield from latency.warnings
    yield from _unpaid_cores(problem, placement.main)
    if problem.latency.invocation is None and any(layer.remote for layer in placement.layers):
        yield "The call overhead is the catalog's, not measured; 'remoe profile measure' measures it."
    if workload.requests_per_hour is None:
        hours = " and the idle hours of rented instances" if any(spec.usd_per_hour is not None for spec in catalog.main.menu) else ""
        cold = (
            ""
            if workload.cold_share
            else f"Cold starts{hours} are not in the cost, because the traffic is unknown: give --requests-per-hour."
        )
        yield cold or f"The plan assumes that {workload.cold_share:.1%} of the requests are cold."
    elif workload.cold_share >= 5e-4 and cold_wait_s(problem, placement):
        yield (
            f"At {figure(workload.requests_per_hour)} requests an hour, {workload.cold_share:.1%} of them wait for a cold start "
            f"(a function is gone after {catalog.function.idle_ttl_s:g} s without a call)."
        )
    if placement.main.scales_to_zero and (waking := workload.waking) is not None and (zero := catalog.zero) is not None:
        yield (
            f"The main function is given back after {zero.idle_s:g} s without a request: it is up {waking.up_share:.1%} of the time, and "
            f"{waking.wake_share:.1%} of the requests wake it. That takes {cold_wait_s(problem, placement):.0f} s, an estimate, and fails "
            "while AWS has no such GPU."
        )
    yield from _served_at_once(problem, placement)
    yield from _with_drafts(problem)
    if placement.instances > 1 and problem.concurrency == 1:
        yield "An instance answers one request at a time here; a server that batches requests may need fewer."
    if catalog.storage.usd_per_gb_month:
        month = catalog.storage.usd_per_gb_month * problem.spec.read_bytes / 2**30
        yield f"Storing the model costs another {dollars(month)} a month."


def _more_functions(problem: Problem, placement: Placement) -> Iterator[str]:
    """Say how many layers have more functions than memory needs, and what for."""
    numbers = [(len(layer.parts), fewest_functions(problem, index, layer)) for index, layer in enumerate(placement.layers)]
    if more := sum(one > fewest for one, fewest in numbers):
        functions, needed = (sum(each) for each in zip(*numbers, strict=True))
        yield (
            f"{more} of {len(numbers)} layers have more expert functions than memory needs, {functions} in all instead of {needed}: they "
            "compute a token's experts at the same time, for more calls."
        )


def _unpaid_cores(problem: Problem, main: MainSpec) -> Iterator[str]:
    """Say where a main function has cores that its price is not for, as on this machine's twin."""
    per_vcpu, cores = problem.catalog.function.mb_per_vcpu, problem.latency_of(main).main_vcpus
    if main.vcpus is not None or main.usd_per_hour is not None or main.memory_mb >= cores * per_vcpu:
        return
    yield (
        f"{main.name} has all {cores:g} cores of the profile's machine, and is billed for {main.memory_mb:,} MB alone. "
        f"On AWS Lambda so many "
        f"cores come with {cores * per_vcpu:,.0f} MB, whose time costs {cores * per_vcpu / main.memory_mb:.1f} times as much."
    )


def _served_at_once(problem: Problem, placement: Placement) -> Iterator[str]:
    """Say what several requests at once mean, and how many there really are."""
    asked, here = problem.concurrency, problem.at_main(placement.main)
    if asked == 1:
        return
    if here.concurrency < asked:
        yield f"{placement.main.name} serves {here.concurrency} request at a time: its platform starts another one for the next request."
        return
    yield (
        f"Cost and times are those of {asked} requests that each instance serves at once, all the time. Their tokens share each decode "
        "step and its calls; a prompt is computed between two steps, while the others wait."
    )
    if (per_hour := problem.workload.requests_per_hour) is None:
        return
    outcome = evaluate(here, placement)
    mean = per_hour / 3600 * (outcome.ttft_s + problem.workload.n_out * outcome.tpot_s) / placement.instances
    if mean < asked / 2:
        yield (
            f"At {figure(per_hour)} requests an hour, an instance has {figure(mean)} of them at once in the mean, not {asked}: they are "
            "answered sooner, but fewer share a call, so calls cost more than this plan says. Plan for fewer with --concurrency."
        )


def _with_drafts(problem: Problem) -> Iterator[str]:
    """Say what the plan takes drafts for."""
    if problem.speculate == "off":
        return
    drafting = problem.drafting
    routed = (
        "are taken to use the experts of recorded tokens that follow each other"
        if problem.workload.consecutive is not None
        else "are taken to choose experts independently, because the profile has no recorded tokens that follow each other: real "
        "ones share more experts, so calls are fewer"
    )
    yield (
        f"With such drafts the recorded answers would have taken {1 - drafting.passes:.1%} fewer passes, each of "
        f"{drafting.mean_rows:.2f} rows in the mean; the plan assumes the same. The rows of a pass {routed}."
    )
    if (assistant := problem.loaded_assistant) is not None:
        yield (
            f"The assistant takes {size(assistant.bytes)} of the main function's memory. It reads every prompt, and drafts "
            f"{drafting.drafted:.2f} tokens for a pass in the mean, for each request by itself."
        )


def _gpu_note(problem: Problem, most: int, bound: str) -> str:
    """Say among which plans with experts on a GPU the bound holds."""
    experts, layers = problem.spec.experts_per_layer, len(problem.spec.moe_layers)
    sizes = " / ".join(map(str, gpu_sizes(experts, layers, most)))
    beside = remote_sizes_beside_gpu(experts)
    steps = f", beside {' / '.join(map(str, beside))} remote ones" if experts > ENUMERATED_EXPERTS else ""
    return f"{bound} for plans with each layer's most used experts on the GPU, {sizes} or all that are not remote{steps}."


def _cheapest_remote_expert(problem: Problem, local: Baseline) -> str:
    """Compare what one remote expert saves in memory with what its invocations cost."""
    problem = next((problem.at_main(spec) for spec in problem.menu if spec.name == local.spec), problem)
    seconds = (local.ttft_s + problem.workload.n_out * local.tpot_s) / problem.concurrency
    saved = seconds * problem.catalog.main_usd_per_gb_second * problem.spec.expert_bytes / (GB_MB * MB)
    experts = problem.spec.experts_per_layer
    columns = build_columns(problem, (np.eye(experts, dtype=bool),) * len(problem.spec.moe_layers))
    if not len(columns.count):
        return "No expert fits an expert function."
    best = int(columns.bill_usd.argmin())
    layer, index = problem.spec.moe_layers[columns.layer[best]], int(columns.layer[best])
    expert = int(np.flatnonzero(columns.sets[columns.at_set[best]])[0])
    share = float(problem.workload.decode_hits[index, expert])
    return (
        f"In a million requests, moving one expert out saves {dollars(saved * 1e6)} of main memory; its calls cost at least "
        f"{dollars(float(columns.bill_usd[best]) * 1e6)} (the cheapest: layer {layer}, used by {share:.1%} of decode tokens), and "
        "each call takes time."
    )

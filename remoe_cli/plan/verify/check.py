"""A second opinion on a plan: what it states is worked out again from profile and catalog.

verify/cost.py prices it, verify/baselines.py the alternatives and scenarios. None of the three imports anything of the planner (no
solver, no cost model, no workload), so that an error there is not repeated here. Sentences are not looked at. What only a search could
find is taken as stated: the bound, the held-out scenario, `break_evens`, and `break_even_traffic` where the traffic is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

from remoe_cli.blas import one_thread
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import (
    Baseline,
    BaselineName,
    Basis,
    Outcome,
    Plan,
    PlannedAssistant,
    PlannedModel,
    PredictedRouting,
    ScenarioKind,
    Verdict,
    WorkloadRef,
)
from remoe_cli.plan.verify import waking
from remoe_cli.plan.verify.baselines import Way, baselines, break_even_per_hour, missed, scenarios
from remoe_cli.plan.verify.cost import (
    TOLERANCE,
    cold_wait_s,
    outcome_and_costs,
)
from remoe_cli.plan.verify.finding import Finding, outcomes, require, same, same_or_none
from remoe_cli.plan.verify.inputs import VerifierInputs, verifier_inputs
from remoe_cli.plan.verify.limits import in_time, limits, placement
from remoe_cli.plan.verify.requests import SHARES, Request, spread, times, too_long
from remoe_cli.plan.verify.unquantised import unquantised
from remoe_cli.profile.record import Profile

ENOUGH_TOKENS = 200
WORTHWHILE = 1e-3  # a plan must be cheaper than what it is compared with by more than this share
IDEAL = {BaselineName.FETCH}  # baselines that nobody can buy
VERDICTS: dict[Basis, Verdict] = {
    Basis.TOO_FEW_TOKENS: "insufficient-evidence",
    Basis.NOTHING_ELSE_FITS: "recommended",
    Basis.OTHERS_MISS_TARGETS: "recommended",
    Basis.CHEAPER: "recommended",
    Basis.DEPENDS_ON_TRAFFIC: "depends-on-traffic",
}  # "not-recommended" on every other basis


@one_thread()
def verify(plan: Plan, profile: Profile, catalog: Catalog, requests: Iterable[Request] = ()) -> tuple[Finding, ...]:
    """Find every statement of the plan that does not hold; empty when all agree to 1e-9 relative.

    Limits are checked for the longest requests that the plan names, and one by one for the `requests` of its file, if they are given.
    """
    profile = profile.in_form(plan.model.packed)
    structure = (*_sources(plan, profile, catalog), *_structure(plan, profile, catalog))
    if structure:  # numbers of a plan that is not well formed mean nothing
        return structure
    inputs = verifier_inputs(plan, profile, catalog)
    listed = tuple(requests)
    return (*limits(inputs), *_numbers(inputs, listed), *_uncovered(plan, listed))


def _sources(plan: Plan, profile: Profile, catalog: Catalog) -> Iterator[Finding]:
    yield from require(plan.profile.sha256 == profile.sha256, "profile.sha256", plan.profile.sha256, profile.sha256)
    yield from require(plan.catalog.sha256 == catalog.file.sha256, "catalog.sha256", plan.catalog.sha256, catalog.file.sha256)
    model, spec = profile.record.model, profile.record.spec
    profiled = PlannedModel(
        name=model.path,
        revision=model.revision,
        experts_per_layer=spec.experts_per_layer,
        expert_bytes=spec.expert_bytes,
        nonexpert_bytes=spec.nonexpert_bytes,
        read_expert_bytes=spec.stored.expert_bytes if spec.stored is not None and spec.stored.served else None,
        read_nonexpert_bytes=spec.stored.nonexpert_bytes if spec.stored is not None and spec.stored.served else None,
        packed=spec.remote is not None or (spec.stored is not None and spec.stored.served and spec.stored.packed),
        experts=None if spec.remote is None else spec.remote.form,
        fetched_bytes=None if spec.remote is None else spec.remote.expert_bytes,
    )
    for field, found in profiled:
        stated = getattr(plan.model, field)
        yield from require(stated == found, f"model.{field}", stated, found)


def _structure(plan: Plan, profile: Profile, catalog: Catalog) -> Iterator[Finding]:
    """Check the requests, the kinds of main functions, and the placement."""
    workload = plan.workload
    yield from _workload(workload)
    yield from (
        Finding(field, str(stated), str(found))
        for field, stated, found in (*waking.shares(catalog, workload), *waking.kinds(catalog, plan))
    )
    if workload.routing is not None:
        yield from _mixture(workload.routing, profile)
    chosen = (plan.speculate,) if workload.speculate == "auto" else (workload.speculate,)
    yield from require(plan.speculate in chosen, "speculate", plan.speculate, workload.speculate)
    drafting = profile.record.assistant
    known = drafting and PlannedAssistant(name=drafting.path, revision=drafting.revision, bytes=drafting.spec.bytes)
    sound = plan.assistant is None or (plan.assistant == known and plan.speculate != "off")
    yield from require(sound, "assistant", plan.assistant, known)
    passes = profile.arrays.get("draft_passes")
    measured = passes is not None and bool(passes.any()) and (plan.speculate in ("auto", "off") or plan.speculate < passes.shape[1])
    yield from require(plan.speculate == "off" or bool(measured), "speculate", plan.speculate, "no such drafts in the profile")
    yield from placement(plan, profile, catalog)


def _workload(workload: WorkloadRef) -> Iterator[Finding]:
    kinds = workload.lengths
    sound = all(kind.n_in >= 1 and kind.n_out >= 1 and kind.share > 0 for kind in kinds) and math.isclose(sum(k.share for k in kinds), 1)
    name = "workload.kinds" if workload.kinds else "workload"
    yield from require(sound, name, kinds, "lengths of 1 or more, shares above 0 that sum to 1")
    front = workload.longest
    sound = all(least[0] < most[0] and least[1] > most[1] for least, most in pairwise(front)) and all(min(size) >= 1 for size in front)
    most_in, most_out = max(n_in for n_in, _ in workload.front), max(n_out for _, n_out in workload.front)
    above = all(kind.n_in <= most_in and kind.n_out <= most_out for kind in kinds) and (bool(front) or not workload.kinds)
    yield from require(sound and above, "workload.longest", front, "no Pareto front of the kinds")
    if (served := workload.served) is not None:
        for size in ((served.n_in, served.tokens - served.n_in), (served.tokens - served.n_out, served.n_out)):
            found = f"{size[0]} prompt + {size[1] + 1} output tokens are answered"  # as the three numbers let them through
            yield from require(_is_covered(workload, *size), "workload.longest", front, found)
        most = (max(map(sum, workload.front)), most_in, most_out)
        yield from require((served.tokens, served.n_in, served.n_out) == most, "workload.served", served, most)
        shares = 0 < served.cover <= 1 and served.cover * (1 - TOLERANCE) <= served.share <= 1
        yield from require(shares, "workload.served", served, "a share above 0 that was asked for, and one as large")
    for name in ("n_in", "n_out"):
        stated, mean = getattr(workload, name), sum(kind.share * getattr(kind, name) for kind in kinds)
        yield from require(math.isclose(stated, mean), f"workload.{name}", stated, f"mean {mean}")
    yield from require(0 <= workload.cold_share <= 1, "workload.cold_share", workload.cold_share, "not within 0 and 1")
    per_hour = workload.requests_per_hour
    yield from require(per_hour is None or per_hour > 0, "workload.requests_per_hour", per_hour, "not above 0")


def _mixture(routing: PredictedRouting, profile: Profile) -> Iterator[Finding]:
    """Check the prompts of the profile that are mixed: each can be priced, occurs once, and has a weight."""
    recorded, weights, counts = routing.recorded, routing.weights, profile.counts("prefill")
    traced = set(profile.arrays["trace_prompt"].tolist())
    whole = [p for p in recorded if 0 <= p < len(counts) and p in traced and counts[p].sum(axis=1).all()]
    sound = bool(recorded) and whole == sorted(set(recorded)) == list(recorded)
    yield from require(sound, "workload.routing.recorded", recorded, "prompts of the profile with routing, ascending")
    sound = len(weights) == len(recorded) and all(weight > 0 for weight in weights)
    yield from require(sound, "workload.routing.weights", weights, "one above 0 for each prompt")


def _uncovered(plan: Plan, requests: tuple[Request, ...]) -> Iterator[Finding]:
    """Find a request that is longer than all that the plan says it is for."""
    for _, n_in, n_out in requests:
        if not _is_covered(plan.workload, n_in, n_out):
            yield Finding("workload.longest", repr(plan.workload.front), f"a request of {n_in} prompt + {n_out + 1} output tokens")
            return


def _is_covered(workload: WorkloadRef, n_in: int, n_out: int) -> bool:
    return any(n_in <= most_in and n_out <= most_out for most_in, most_out in workload.front)


def _missed(plan: Plan, found: Outcome) -> Iterator[Finding]:
    """Report the targets that an outcome misses."""
    for name, value in missed(plan, found).items():
        yield Finding(f"targets.{name}", repr(getattr(plan.targets, name)), repr(value))


def _numbers(inputs: VerifierInputs, requests: tuple[Request, ...]) -> Iterator[Finding]:
    """Check cost and latency, bound and gap, the baselines, and the verdict that follows from them."""
    plan = inputs.plan
    found, costs = outcome_and_costs(inputs, plan.main, plan.instances, plan.layers)
    yield from same("costs.main_usd", plan.costs.main_usd, costs.main_usd)
    if len(plan.costs.layers_usd) != len(costs.layers_usd):
        yield Finding("costs.layers_usd", f"{len(plan.costs.layers_usd)} layers", f"{len(costs.layers_usd)}")
    for index, (stated_usd, usd) in enumerate(zip(plan.costs.layers_usd, costs.layers_usd, strict=False)):
        yield from same(f"costs.layers_usd[{index}]", stated_usd, usd)
    yield from outcomes("", plan.outcome, found)
    yield from same("cold_start_s", plan.cold_start_s, cold_wait_s(inputs, plan.main, plan.layers))
    if plan.method != "given":
        yield from _missed(plan, found)
    bought, stated = ("main", plan.main) if plan.main.usd_per_hour is None else ("instances", plan.instances)
    yield from require(in_time(inputs, found), bought, stated, f"a request takes {found.ttft_s + inputs.n_out * found.tpot_s} s")
    yield from _each(inputs, found, requests)
    yield from _bound(plan, found)
    yield from _baselines(inputs)
    yield from unquantised(inputs)
    yield from _traffic(inputs)
    yield from _scenarios(inputs)
    basis = _basis(inputs, found)
    yield from require(plan.basis == basis, "basis", plan.basis, basis)
    verdict = VERDICTS.get(basis, "not-recommended")
    yield from require(plan.verdict == verdict, "verdict", plan.verdict, verdict)


def _basis(inputs: VerifierInputs, found: Outcome) -> Basis:
    """Decide the verdict's basis, from the outcome worked out here and the baselines that the plan states."""
    plan = inputs.plan
    if inputs.tokens < ENOUGH_TOKENS:
        return Basis.TOO_FEW_TOKENS
    if missed(plan, found):
        return Basis.MISSES_TARGET
    able = {
        name: b.cost_usd_per_request
        for name, b in plan.baselines.items()
        if name not in IDEAL and not missed(plan, b) and b.cost_usd_per_request is not None
    }
    if not able or found.cost_usd_per_request < min(able.values()) * (1 - WORTHWHILE):
        if plan.workload.requests_per_hour is None and plan.break_even_traffic is not None:
            return Basis.DEPENDS_ON_TRAFFIC
        if able:
            return Basis.CHEAPER
        return Basis.OTHERS_MISS_TARGETS if BaselineName.ALL_LOCAL in plan.baselines else Basis.NOTHING_ELSE_FITS
    local = min((usd for name, usd in able.items() if name in (BaselineName.ALL_LOCAL, BaselineName.MIX)), default=math.inf)
    if local > min(able.values()) * (1 + TOLERANCE):
        return Basis.DEARER_THAN_WHOLE_MODEL
    return Basis.DEARER_THAN_ALL_LOCAL if any(layer.remote for layer in plan.layers) else Basis.ALL_LOCAL_IS_CHEAPEST


def _each(inputs: VerifierInputs, found: Outcome, requests: tuple[Request, ...]) -> Iterator[Finding]:
    """Check the longest requests, and every one that is given; and what shares of the requests do not exceed."""
    plan = inputs.plan
    longest = [(0.0, n_in, n_out) for n_in, n_out in inputs.longest]
    known = requests or (() if plan.workload.served else tuple((kind.share, kind.n_in, kind.n_out) for kind in inputs.kinds))
    took = times(inputs, sorted({n_in for _, n_in, _ in (*longest, *known)}))
    all_findings = (*took.broken, *too_long(inputs, took, (*longest, *known), found.tpot_s))
    for field, stated, is_found in (*all_findings, *(spread(inputs, took, known, found.tpot_s) if known else ())):
        yield Finding(field, str(stated), is_found)
    shares = tuple(one.share for one in plan.spread)
    yield from require(shares == SHARES, "spread", shares, SHARES)
    yield from _deciding(plan, known)


def _deciding(plan: Plan, requests: tuple[Request, ...]) -> Iterator[Finding]:
    """Check the request whose TTFT a percentile is held against."""
    percentile, at, cold = plan.targets.ttft_percentile, plan.targets.ttft_at, plan.workload.cold_share
    yield from require((percentile is None) == (at is None), "targets.ttft_at", at, f"percentile {percentile}")
    if percentile is None or at is None:
        return
    is_cold = percentile / 100 > 1 - cold
    yield from require(at.cold == is_cold and 0 < percentile <= 100, "targets.ttft_at", at, f"cold {is_cold}")
    share = percentile / 100 if is_cold else percentile / 100 / (1 - cold)
    total = math.fsum(part for part, _, _ in requests)
    within, shorter = (math.fsum(part for part, n_in, _ in requests if n_in <= at.n_in - less) for less in (0, 1))
    sound = not requests or (shorter <= share * total * (1 + TOLERANCE) and within >= share * total * (1 - TOLERANCE))
    yield from require(sound, "targets.ttft_at", at, f"{within / total if total else 0} of the requests, not {share}")


def _way(field: str, stated: Baseline, found: Way) -> Iterator[Finding]:
    """Compare what a baseline states with one way to run it: price, times, and the rent of an instance."""
    for name in ("ttft_s", "tpot_s", "ttft_percentile_s"):
        yield from same_or_none(f"{field}.{name}", getattr(stated, name), getattr(found.outcome, name))
    yield from same(f"{field}.cold_start_s", stated.cold_start_s, found.cold_start_s)
    rent = found.main.usd_per_hour
    yield from require(stated.usd_per_hour == rent, f"{field}.usd_per_hour", stated.usd_per_hour, rent)
    usd = found.outcome.cost_usd_per_request if found.priced else None
    yield from same_or_none(f"{field}.cost_usd_per_request", stated.cost_usd_per_request, usd)


def _baselines(inputs: VerifierInputs) -> Iterator[Finding]:
    plan = inputs.plan
    quantised = {BaselineName.STORED_CPU, BaselineName.STORED_GPU} if inputs.profile.record.spec.stored is None else set()
    names = sorted(set(BaselineName) - quantised)
    yield from require(sorted([*plan.baselines, *plan.missing]) == names, "baselines", sorted(plan.baselines), names)
    for name, ways in baselines(inputs).items():
        stated, field = plan.baselines.get(name), f"baselines.{name}"
        if stated is None or not ways:
            yield from require(stated is None and not ways, field, stated, ways)
            continue
        bought = (stated.spec, stated.instances)
        yield from require(bought in ways, f"{field}.spec", bought, sorted(ways))
        yield from _way(field, stated, ways.get(bought) or next(iter(ways.values())))
        meets = not missed(plan, stated)
        yield from require(stated.meets == meets, f"{field}.meets", stated.meets, meets)
        yield from require(stated.ideal == (name in IDEAL), f"{field}.ideal", stated.ideal, not stated.ideal)


def _traffic(inputs: VerifierInputs) -> Iterator[Finding]:
    """Check the break-even traffic where it is between the plan itself and an instance of the catalog."""
    plan, traffic, name = inputs.plan, inputs.plan.break_even_traffic, "break_even_traffic"
    if traffic is None:
        return
    rents = {spec.name: spec.usd_per_hour for spec in (*inputs.catalog.main.menu, *inputs.catalog.reference.gpus)}
    rent = rents.get(traffic.instance)
    yield from require(rent is not None and rent == traffic.usd_per_hour, f"{name}.usd_per_hour", traffic.usd_per_hour, rent)
    if plan.workload.requests_per_hour is None and plan.main.usd_per_hour is None:
        yield from require(traffic.by_use == plan.main.name, f"{name}.by_use", traffic.by_use, plan.main.name)
    if (per_hour := break_even_per_hour(inputs)) is not None:
        agrees = math.isclose(traffic.requests_per_hour, per_hour, rel_tol=1e-3)
        yield from require(agrees, f"{name}.requests_per_hour", traffic.requests_per_hour, per_hour)


def _scenarios(inputs: VerifierInputs) -> Iterator[Finding]:
    plan, prompts = inputs.plan, len(inputs.profile.arrays["prompt_tokens"])
    known = scenarios(inputs) if plan.scenarios else {}
    stated = [(scenario.kind, scenario.value) for scenario in plan.scenarios if scenario.kind != ScenarioKind.HELD_OUT_PROMPTS]
    yield from require(stated == list(known), "scenarios", stated, list(known))
    for index, scenario in enumerate(plan.scenarios):
        field, meets, held_out = f"scenarios[{index}]", not missed(plan, scenario), scenario.kind == ScenarioKind.HELD_OUT_PROMPTS
        yield from require(scenario.meets == meets, f"{field}.meets", scenario.meets, meets)
        halves = ((prompts + 1) // 2, prompts // 2) if held_out else (None, None)
        for name, count in zip(("planned_prompts", "judged_prompts"), halves, strict=True):
            yield from require(getattr(scenario, name) == count, f"{field}.{name}", getattr(scenario, name), count)
        if (scenario.kind, scenario.value) in known:
            yield from outcomes(field, scenario, known[scenario.kind, scenario.value])
            yield from require(scenario.best_usd is None, f"{field}.best_usd", scenario.best_usd, "not looked for")


def _bound(plan: Plan, found: Outcome) -> Iterator[Finding]:
    value = {"cost": found.cost_usd_per_request, "ttft": found.held_ttft_s, "tpot": found.tpot_s}[plan.objective]
    name = "lower_bound_usd" if plan.objective == "cost" else "lower_bound_s"
    bound = getattr(plan, name)
    certified = plan.method in ("exact", "forced") and bound is not None
    if certified:
        yield from require(0 <= bound <= value * (1 + TOLERANCE), name, bound, f"value is {value}")
        gap = (value - bound) / value if value > 0 else 0.0
        yield from require(plan.gap is not None and abs(plan.gap - gap) <= TOLERANCE, "gap", plan.gap, gap)
    else:
        yield from require(bound is None and plan.gap is None, "gap", plan.gap, "no bound")
    gap = plan.gap if plan.gap is not None else math.inf
    statuses: dict[str, Callable[[], bool]] = {
        "optimal": lambda: plan.method == "exact" and gap <= 2 * TOLERANCE,
        "within-gap": lambda: plan.method == "exact" and gap <= WORTHWHILE + TOLERANCE,
        "time-limit": lambda: plan.method == "exact" and certified,
        "forced": lambda: plan.method == "forced",
        "given": lambda: plan.method == "given",
        "heuristic": lambda: plan.method in ("scan", "paper"),
    }
    yield from require(statuses[plan.status](), "status", plan.status, f"gap {plan.gap}, method {plan.method}")

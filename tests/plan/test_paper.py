"""The paper's heuristic: its steps against arithmetic and brute force, and its plans, which keep every target and are never too cheap."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe_cli.plan.cost import expert_functions, main_function
from remoe_cli.plan.cost.placement import evaluate, layer_outcome
from remoe_cli.plan.document import LayerPlan, Lengths
from remoe_cli.plan.paper import lagrange, replicas, worst_times
from remoe_cli.plan.paper.bound import TokenBound, calibrate, paper_bound
from remoe_cli.plan.paper.heuristic import fitted, memory_problem, paper_plan
from remoe_cli.plan.paper.mmp import Allocation, allocations, ttft_rest_s
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.hits import owner_of
from remoe_cli.plan.problem.problem import MB, Invocations, Main, Placement, Problem
from remoe_cli.plan.problem.traffic import Traffic
from remoe_cli.plan.problem.workload import from_profile
from remoe_cli.plan.solve.candidates import candidate_sets
from remoe_cli.plan.solve.columns import build_columns
from remoe_cli.plan.solve.exact import Solution, solve
from remoe_cli.plan.solve.node import Task
from remoe_cli.profile.latency_record import Linear, Roofline
from tests.support.synthetic import inverse, synthetic_profile, tiny_catalog

CASES = 11


def payload_bytes(problem: Problem, layer: LayerPlan, index: int) -> float:
    """The largest payload of the longest prompt."""
    tokens, parts = problem.workload.use[index] * problem.workload.most_in, max(len(layer.parts), layer.replicas)
    at = expert_functions.shared_out(problem, owner_of(len(tokens), layer.parts), tokens, layer.replicas)
    return float(expert_functions.payload_bytes(problem, expert_functions.prefill(problem, tokens, [layer.memory_mb], at, parts).rows[0]))


@cache
def case(seed: int) -> tuple[Problem, TokenBound]:
    """A random small problem and a bound for it; over the seeds top-1 to top-3, flat to skewed routing, slow and fast main functions, all
    prices of calls, kinds of requests, cold starts, GPUs, small payloads and one call for each expert occur."""
    random = np.random.default_rng(seed)
    with TemporaryDirectory() as path:
        profile = synthetic_profile(
            Path(path) / "p",
            layers=int(random.integers(2, 5)),
            experts=int(random.choice([4, 8, 12])),
            top_k=int(random.integers(1, 4)),
            skew=float(random.choice([0.0, 1.0, 2.0, 4.0])),
            prompts=25,
            prompt_tokens=int(random.integers(8, 80)),
            decode_tokens=6,
            expert_mb=float(random.uniform(10, 100)),
            main_vcpus=float(random.choice([0.5, 2.0])),
            local_expert=(float(random.uniform(1e-4, 5e-3)), float(random.uniform(1e-5, 1e-3))),
            remote_expert=(float(random.uniform(1e-4, 5e-3)), float(random.uniform(1e-5, 1e-3))),
            nonexpert_decode_s=float(random.choice([1e-3, 1e-2])),
            seed=seed,
        )
    menu = [{"name": f"m{mb}", "memory_mb": mb, "vcpus": mb / 1769} for mb in range(800, 6000, 300)]
    catalog = tiny_catalog(
        {"menu": menu, "usd_per_accelerator_gb_second": 5e-5 if seed % 4 == 0 else 0.0},
        memory_menu_mb=list(range(256, 3000, 256)),
        max_replicas=4,
        warm_unbilled_s=float(random.choice([1e-4, 3e-3])),
        warm_billed_s=float(random.choice([1e-4, 3e-3])),
        payload_limit_bytes=60_000 if seed % 3 == 0 else 6_291_456,
    )
    workload = from_profile(profile)
    if seed % 3 == 1:
        kinds = (Lengths(share=0.5, n_in=10, n_out=30), Lengths(share=0.5, n_in=100, n_out=10))
        workload = replace(workload, traffic=Traffic(kinds), cold_share=0.2)
    latency = profile.record.latency
    if seed % 2:
        curve = Roofline(overhead_s=1e-4, weights_s=2e-3, per_token_s=2e-4, saturation_vcpus=0.8)
        latency = latency.model_copy(update={"remote_expert": latency.remote_expert.model_copy(update={"curve": curve})})
        latency = latency.model_copy(update={"copy_s": Linear(fixed_s=1e-5, per_token_s=1e-6)})
    problem = Problem(profile.record.spec, latency, catalog, workload, invocations="per-expert" if seed % 7 == 3 else "per-layer")
    bound = calibrate(profile.counts("prefill"), profile.arrays["prompt_tokens"], problem.spec.top_k)
    return problem, bound if seed % 2 else paper_bound(problem)


@cache
def plans(seed: int) -> list[tuple[Aim, Solution | None]]:
    """Without targets; and with targets around what the plan without any has."""
    problem, bound = case(seed)
    free = paper_plan(problem, Aim(), bound)
    if free is None:
        return [(Aim(), None)]
    outcome = evaluate(problem, Placement(free.main.spec, free.layers))
    ttft, tpot = outcome.ttft_s, outcome.tpot_s
    aims = [Aim("tpot", ttft_s=0.9 * ttft), Aim(budget_usd=0.99 * outcome.cost_usd_per_request)]
    for by in (0.6, 0.999) if seed % 2 else (0.9, 1.2):
        aims += [Aim(ttft_s=by * ttft), Aim(tpot_s=by * tpot), Aim(ttft_s=1.1 * by * ttft, tpot_s=by * tpot)]
    return [(Aim(), free), *((aim, paper_plan(problem, aim, bound)) for aim in aims)]


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(CASES))
def test_no_plan_breaks_what_it_claims(seed: int) -> None:
    problem, _ = case(seed)
    for aim, found in plans(seed):
        if found is None:
            continue
        placement = Placement(found.main.spec, found.layers)
        outcome = evaluate(problem, placement)
        assert aim.ttft_s is None or outcome.ttft_s <= aim.ttft_s * (1 + 1e-8)
        assert aim.tpot_s is None or outcome.tpot_s <= aim.tpot_s * (1 + 1e-8)
        assert aim.budget_usd is None or outcome.cost_usd_per_request <= aim.budget_usd * (1 + 1e-8)
        assert found.value == pytest.approx(outcome.tpot_s if aim.objective == "tpot" else outcome.cost_usd_per_request)
        assert found.lower_bound == 0 and not found.timed_out
        layers, experts = problem.workload.use.shape
        size = len(found.layers[0].remote)
        assert main_function.local_capacity(problem, found.main.spec) >= layers * (experts - size)
        for index, layer in enumerate(found.layers):
            part = layer_outcome(problem, placement, index)
            assert set(layer.remote) == set(np.flatnonzero(problem.workload.ranks[index] < size))  # method.md, section 7
            assert part.function_bytes <= layer.memory_mb * MB and layer.memory_mb in (0, *problem.catalog.function.memory_menu_mb)
            assert not layer.remote or payload_bytes(problem, layer, index) <= problem.catalog.function.payload_limit_bytes
            assert not layer.functions and layer.replicas <= min(size, problem.catalog.function.max_replicas)


@pytest.mark.parametrize("seed", range(0, CASES, 3))
def test_no_plan_is_cheaper_than_the_exact_bound(seed: int) -> None:
    problem, _ = case(seed)
    columns = build_columns(problem, candidate_sets(problem))
    for aim, found in (plans(seed)[at] for at in (0, -1)):
        if found is not None:
            exact = solve(Task(problem, columns, aim))
            assert exact is not None and found.value >= exact.lower_bound * (1 - 1e-9)


def test_the_cases_are_worth_something() -> None:
    """Some plans are all remote, some all local, most mixed; some have replicas; and some have none."""
    seen = set()
    for seed in range(CASES):
        problem, _ = case(seed)
        for _, found in plans(seed):
            if found is None:
                seen.add("none")
                continue
            size, full = len(found.layers[0].remote), problem.spec.experts_per_layer
            seen.add("remote" if size == full else "local" if size == 0 else "mixed")
            seen |= {"replicas"} if max(layer.replicas for layer in found.layers) > 1 else set()
            seen |= {"memories"} if len({layer.memory_mb for layer in found.layers}) > 1 else set()
    assert seen == {"none", "remote", "local", "mixed", "replicas", "memories"}, seen


# Step 1: the worst case, and MMP.


class Most:
    """A bound for tests."""

    name = "most"

    def __init__(self, together: float | list[float], largest: float | list[float]) -> None:
        self.both = np.atleast_1d(together).astype(float), np.atleast_1d(largest).astype(float)

    def together(self, n: float, m: int) -> np.ndarray:
        return self.both[0]

    def largest(self, n: float, m: int) -> np.ndarray:
        return self.both[1]


def by_hand(path: Path, layers: int = 1) -> Problem:
    """Layers of four experts, top-2. An expert takes 0.3 ms + 0.2 ms a token in a function of 1,769 MB, and 0.2 ms + 0.1 ms a token on a
    vCPU of the main function; a call 4 ms outside and 1 ms inside; a row on the wire 0.01 ms there and back."""
    profile = synthetic_profile(
        path, layers=layers, experts=4, top_k=2, prompts=1, prompt_tokens=24, decode_tokens=24, main_vcpus=1, skew=0
    )
    catalog = tiny_catalog(
        memory_menu_mb=[885, 1769],
        mb_per_vcpu=1769.0,
        max_replicas=2,
        warm_unbilled_s=0.004,
        warm_billed_s=0.001,
        wire_expansion=1.0,
        network_bytes_per_s=2 * 2048 / 1e-5,
    )
    return Problem(profile.record.spec, profile.record.latency, catalog, from_profile(profile))


def test_worst_times_by_hand(tmp_path: Path) -> None:
    """The paper's bound for 24 tokens is 12 m + 6, but no more than 24 for one expert and 48 for all."""
    problem = by_hand(tmp_path)
    bound, memory = paper_bound(problem), np.array([1769.0])
    for m, together in ((1, 18), (2, 30), (3, 42), (4, 48)):
        work = m * 3e-4 + together * 2e-4
        assert worst_times.prefill_s(problem, bound, 24, m, memory, 1)[0] == pytest.approx(0.005 + work + together * 1e-5)
        one = (3e-4 + 18 * 2e-4 + work) / 2 + (18 + together) / 2 * 1e-5
        assert worst_times.prefill_s(problem, bound, 24, m, memory, 2)[0] == pytest.approx(0.005 + one)
    assert worst_times.prefill_s(problem, bound, 24, 0, memory, 1).tolist() == [0.0]
    one, two = 0.005 + 5e-4 + 1e-5, 0.005 + 1e-3 + 2e-5
    assert worst_times.decode_s(problem, bound, 1, 1769)[0] == pytest.approx(0.75 * one)
    assert worst_times.decode_s(problem, bound, 2, 1769)[0] == pytest.approx(0.75 * one + 0.25 * two)
    assert worst_times.decode_s(problem, bound, 4, 1769)[0] == pytest.approx(two)
    each = replace(problem, invocations="per-expert")
    assert worst_times.decode_s(each, bound, 2, 1769)[0] == pytest.approx(1.25 * one)


def test_mmp_lowers_b_until_both_targets_hold(tmp_path: Path) -> None:
    problem = by_hand(tmp_path)
    bound, main = paper_bound(problem), problem.catalog.main.menu[0]
    v = 900 / 1769
    worst = {m: worst_times.prefill_s(problem, bound, 24, m, np.array([1769.0]), min(m, 2))[0] for m in (1, 2, 3, 4)}
    ttft = {0: (4 * 2e-4 + 48 * 1e-4) / v} | worst
    tpot = {0: 2 * 3e-4 / v} | {m: worst_times.decode_s(problem, bound, m, 1769)[0] for m in (1, 2, 3, 4)}
    assert [(a.remote, a.main.name) for a in allocations(problem, Aim(), bound)] == [(m, "m900") for m in (4, 3, 2, 1, 0)]
    for m in range(5):
        for by in (1.0, 0.999):
            least = main_function.prefill_rest_s(problem, main, 24) + by * float(ttft[m])
            assert [a.remote for a in allocations(problem, Aim(ttft_s=least), bound)] == [
                i for i in (4, 3, 2, 1, 0) if ttft[i] <= by * ttft[m]
            ]
            least = main_function.decode_rest_s(problem, main) + by * float(tpot[m])
            assert [a.remote for a in allocations(problem, Aim(tpot_s=least), bound)] == [
                i for i in (4, 3, 2, 1, 0) if tpot[i] <= by * tpot[m]
            ]


def test_mmp_takes_the_cheapest_spec_that_holds_the_rest_and_is_no_slower_than_a_function(tmp_path: Path) -> None:
    problem = by_hand(tmp_path)
    menu = [{"name": str(mb), "memory_mb": mb, "vcpus": vcpus} for mb, vcpus in ((900, 0.01), (1000, 0.05), (1100, 0.2), (1200, 0.3))]
    # One local expert for one token takes 0.3 ms / vCPUs, and 18 tokens 2.1 ms / vCPUs; a remote one 5.51 ms, and 9.08 ms.
    problem = replace(problem, catalog=tiny_catalog({"menu": menu}, **problem.catalog.function.model_dump()))
    assert next(allocations(problem, Aim(), paper_bound(problem))).main.name == "1200"
    assert next(allocations(problem, Aim(), Most(8, 1))).main.name == "1100"
    slow = replace(problem, catalog=tiny_catalog({"menu": menu[:2]}, **problem.catalog.function.model_dump()))
    assert next(allocations(slow, Aim(), paper_bound(problem))).main.name == "1000"  # none is fast enough: the fastest
    # 4 experts of 20 MB, 500 MB for the runtime and 200 MB for the rest: all local need more than 780 MB.
    menu = [{"name": str(mb), "memory_mb": mb, "vcpus": 1.0} for mb in (705, 725, 745, 765, 785)]
    sized = replace(problem, catalog=tiny_catalog({"menu": menu}, **problem.catalog.function.model_dump()))
    found = list(allocations(sized, Aim(), paper_bound(problem)))
    assert [(a.remote, a.main.name) for a in found] == [(4, "705"), (3, "725"), (2, "745"), (1, "765"), (0, "785")]


@pytest.mark.parametrize("seed", [4, 10])
def test_what_ttft_has_beside_the_experts_is_the_cost_models(seed: int) -> None:
    """With cold starts, of functions and instances."""
    problem, _ = case(seed)
    assert problem.workload.cold_share > 0
    layers = tuple(
        LayerPlan(layer=layer, remote=(int(np.argmin(rank)),), memory_mb=problem.catalog.function.memory_menu_mb[-1], replicas=1)
        for layer, rank in zip(problem.spec.moe_layers, problem.workload.ranks, strict=True)
    )
    for main in (problem.catalog.main.menu[0], problem.catalog.main.menu[-1]):
        placement = Placement(main, layers)
        experts = sum(layer_outcome(problem, placement, index).prefill_s for index in range(len(layers)))
        assert evaluate(problem, placement).ttft_s == pytest.approx(ttft_rest_s(problem, main, 1) + experts)


@pytest.mark.parametrize("invocations", ["per-layer", "per-expert"])
def test_what_is_asked_of_the_memory_optimum(invocations: Invocations, tmp_path: Path) -> None:
    problem = replace(by_hand(tmp_path), invocations=invocations)
    main = problem.catalog.main.menu[1]
    asked = memory_problem(problem, Aim(tpot_s=0.05), Allocation(3, main), fitted(problem))
    remote = np.flatnonzero(problem.workload.ranks[0] < 3)
    hit = np.isin(problem.workload.trace[:, 0], remote).sum() / len(problem.workload.trace)
    assert asked.hits.tolist() == pytest.approx([hit])
    assert asked.overhead_s.tolist() == pytest.approx([0.005 * (hit if invocations == "per-expert" else 1)])
    held = 60 + 3 * 20 * 1.25 + float(problem.workload.use[0, remote].sum()) * 24 * 2048 / MB
    assert asked.low.tolist() == pytest.approx([held / 1024]) and asked.high == 1769 / 1024
    assert asked.budget_s == pytest.approx(0.05 - main_function.decode_rest_s(problem, main))
    assert (asked.main_usd_per_s, asked.usd_per_gb_s) == (main_function.usd_per_s(problem, main), 0.0000166667)
    # Two points: the time of 0.5 ms at one vCPU and about twice that at half of one, and 0.01 ms on the wire.
    assert asked.decay.seconds(np.array([885, 1769]) / 1024) == pytest.approx([5e-4 * 1769 / 885 + 1e-5, 5e-4 + 1e-5], rel=1e-3)


@pytest.mark.parametrize("seed", range(CASES))
def test_memory_is_the_optimum_rounded_up(seed: int) -> None:
    problem, _ = case(seed)
    menu = problem.catalog.function.memory_menu_mb
    for aim, found in plans(seed):
        if found is not None and found.layers[0].remote:
            allocation = Allocation(len(found.layers[0].remote), found.main.spec)
            asked_mb = lagrange.solve(memory_problem(problem, aim, allocation, fitted(problem))).y * 1024
            assert [layer.memory_mb for layer in found.layers] == [min(mb for mb in menu if mb >= y * (1 - 1e-8)) for y in asked_mb]


# Step 4: replicas.


def test_replicas_start_from_what_the_payload_needs(tmp_path: Path) -> None:
    """A call costs more than all else, so that no replica pays."""
    problem = by_hand(tmp_path)
    main, least = problem.catalog.main.menu[0], []

    def largest_bytes(of: Problem, z: int) -> float:
        layer = LayerPlan(layer=1, remote=(0, 1, 2, 3), memory_mb=1769, replicas=z)
        return payload_bytes(of, layer, 0)

    for rows in (60, 30, 20, 2):
        limits = {"payload_limit_bytes": rows * 2048, "usd_per_request": 1.0, "max_replicas": 4}
        catalog = problem.catalog.model_copy(update={"function": problem.catalog.function.model_copy(update=limits)})
        of = replace(problem, catalog=catalog)
        found = replicas.choose(of, None, paper_bound(of), Allocation(4, main), np.array([1769]))
        keeps = [z for z in (1, 2, 3, 4) if largest_bytes(of, z) <= rows * 2048]
        assert (found is None) == (not keeps) and (found is None or found.tolist() == keeps[:1])
        least.append(keeps[0] if keeps else None)
    assert least[0] == 1 and least[1] == 2 and least[2] in (3, 4) and least[3] is None
    plan = paper_plan(of, Aim())
    assert plan is not None and not plan.layers[0].remote  # not even one expert's rows pass


def test_replicas_are_added_where_they_shorten_the_worst_case(tmp_path: Path) -> None:
    """In one of two layers a single expert may get all tokens, so that there they do not, whatever they cost."""
    problem = by_hand(tmp_path, layers=2)
    remote_expert = inverse(0.0, 2e-4, at_vcpus=1)
    problem = replace(problem, latency=problem.latency.model_copy(update={"remote_expert": remote_expert}))
    allocation, memory_mb = Allocation(4, problem.catalog.main.menu[0]), np.array([1769, 1769])
    for shortened in (0, 1):
        bound = Most([40.0, 40.0], [10.0 if layer == shortened else 40.0 for layer in (0, 1)])
        free = replicas.choose(problem, None, bound, allocation, memory_mb)
        assert free is not None and free.tolist() == [1, 1]
        worst = [worst_times.prefill_s(problem, bound, 24, 4, memory_mb.astype(float), z) for z in (1, 2)]
        target = ttft_rest_s(problem, allocation.main, 4) + float(worst[1].sum())
        found = replicas.choose(problem, target, bound, allocation, memory_mb)
        assert found is not None and found.tolist() == [2 if layer == shortened else 1 for layer in (0, 1)]
        assert replicas.choose(problem, 0.999 * target, bound, allocation, memory_mb) is None


def test_an_always_on_instance_has_no_part(tmp_path: Path) -> None:
    problem = by_hand(tmp_path)
    box = tiny_catalog({"menu": [{"name": "box", "memory_mb": 3000, "vcpus": 2.0, "usd_per_hour": 0.1}]})
    by_use = replace(problem, catalog=box)
    busy = replace(by_use, workload=replace(problem.workload, traffic=Traffic(problem.workload.lengths, 10.0)))
    found = paper_plan(by_use, Aim())
    assert found is not None and found.main == Main(box.main.menu[0])
    assert paper_plan(busy, Aim()) is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(1, 2), st.booleans())
def test_no_prompt_within_the_bound_takes_longer_than_its_worst_case(seed: int, z: int, more: float, roofline: bool) -> None:
    """LPT as a deployment does it, over tokens that keep the bound, without the wire, at which LPT does not look."""
    problem, _ = case(1 if roofline else 2)
    catalog = problem.catalog.model_copy(update={"function": problem.catalog.function.model_copy(update={"network_bytes_per_s": 1e18})})
    problem = replace(problem, catalog=catalog)
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 60, size=random.integers(1, 10)).astype(float)
    members = np.ones((1, len(tokens)), dtype=bool)
    at = expert_functions.lpt(expert_functions.expert_work_s(problem, catalog.function.mb_per_vcpu, tokens), members, z)
    taken = expert_functions.prefill(problem, tokens, [768], at, z).zt_s[0, 0]
    bound = Most(more * tokens.sum(), tokens.max())
    assert taken <= worst_times.prefill_s(problem, bound, 60, len(tokens), np.array([768.0]), z)[0] * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(CASES))
def test_no_other_number_of_replicas_lowers_cost_and_the_worst_case_is_kept(seed: int) -> None:
    problem, bound = case(seed)
    for aim, found in plans(seed):
        size = len(found.layers[0].remote) if found else 0
        if found is None or size == 0:
            continue
        cost = evaluate(problem, Placement(found.main.spec, found.layers)).cost_usd_per_request
        for index, layer in enumerate(found.layers):
            fewer = [layer.replicas - 1] if layer.replicas > 1 and aim.ttft_s is None else []
            more = [layer.replicas + 1] if layer.replicas < min(size, problem.catalog.function.max_replicas) else []
            for z in fewer + more:
                other = list(found.layers)
                other[index] = layer.model_copy(update={"replicas": z})
                placement = Placement(found.main.spec, tuple(other))
                fits = payload_bytes(problem, other[index], index) <= problem.catalog.function.payload_limit_bytes
                assert not fits or evaluate(problem, placement).cost_usd_per_request >= cost * (1 - 1e-12)
        if aim.ttft_s is not None:
            worst = ttft_rest_s(problem, found.main.spec, size)
            for kind, (index, layer) in itertools.product(problem.workload.lengths, enumerate(found.layers)):
                memory = np.full(len(found.layers), float(layer.memory_mb))
                remote_s = worst_times.prefill_s(problem, bound, kind.n_in, size, memory, layer.replicas)[index]
                tokens = problem.workload.use[index] * kind.n_in
                local_s = main_function.expert_prefill_s(problem, found.main.spec, tokens)[problem.workload.ranks[index] >= size].sum()
                worst += kind.share * max(float(remote_s), float(local_s))
            assert worst <= aim.ttft_s * (1 + 1e-8)

"""The exact planner against brute force: every plan of random tiny problems, every objective and limit; and its certificate at size."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.document import Lengths
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.problem import Placement, Problem
from remoe_cli.plan.problem.traffic import Traffic
from remoe_cli.plan.problem.workload import from_profile
from remoe_cli.plan.solve.candidates import candidate_sets
from remoe_cli.plan.solve.columns import Columns, build_columns
from remoe_cli.plan.solve.exact import Solution, solve
from remoe_cli.plan.solve.node import Task
from remoe_cli.plan.solve.scan import scan
from remoe_cli.profile.latency_record import ColdStart, CpuQuota, Linear
from remoe_cli.profile.record import Profile
from tests.support.brute_force import Brute
from tests.support.synthetic import inverse, invocation, synthetic_profile, tiny_catalog

INSTANCES = 200
FIELD = {"cost": 0, "ttft": 1, "tpot": 2}


def instance(seed: int, path: Path) -> tuple[Brute, Problem]:
    """A random tiny problem; over the seeds memory, payload and all limits bind, and skipped slots, a GPU to copy to, experts on it, live
    targets, CPU quotas, divided layers, cold starts, kinds of requests, always-on instances and calls for each expert occur."""
    random = np.random.default_rng(seed)
    layers = 3 if seed % 6 == 1 else 2
    profile = synthetic_profile(
        path,
        layers=layers,
        experts=3 if layers == 3 else int(random.integers(3, 6)) if seed % 10 == 0 else int(random.integers(3, 5)),
        top_k=int(random.integers(1, 3)),
        skew=float(random.uniform(0, 3)),
        prompts=6,
        prompt_tokens=int(random.integers(5, 60)),
        decode_tokens=4,
        expert_mb=float(random.uniform(10, 450)),
        nonexpert_mb=float(random.uniform(50, 300)),
        main_vcpus=int(random.integers(1, 3)),
        local_expert=(float(random.uniform(1e-4, 5e-3)), float(random.uniform(1e-5, 1e-3))),
        remote_expert=(float(random.uniform(1e-4, 2e-3)), float(random.uniform(1e-5, 1e-3))),
        seed=seed,
    )
    if seed % 4 == 0:
        profile.arrays["trace_ids"][::3, :, -1] = -1
    profile = replace(profile, record=profile.record.model_copy(update={"latency": _latency(profile, seed, random)}))
    catalog = _catalog(seed, random)
    prompt, answer = int(profile.arrays["prompt_tokens"][0]), int(profile.arrays["decode_tokens"][0])
    kinds = [(0.25, max(1, prompt // 4), 3 * answer), (0.75, 2 * prompt, answer)] if seed % 7 == 2 else [(1.0, prompt, answer)]
    per_hour = float(random.choice([2.0, 400.0, 40_000.0])) if seed % 5 == 3 else None
    cold_share = float(random.uniform(0, 1)) if seed % 4 == 3 else 0.0
    per_expert = seed % 8 == 6
    traffic = Traffic(tuple(Lengths(share=s, n_in=i, n_out=o) for s, i, o in kinds), per_hour)
    workload = replace(from_profile(profile, traffic=traffic), cold_share=cold_share)
    invocations = "per-expert" if per_expert else "per-layer"
    problem = Problem(profile.record.spec, profile.record.latency, catalog, workload, invocations=invocations)
    return Brute(profile, catalog, kinds, per_hour, cold_share, per_expert), problem


def _latency(profile: Profile, seed: int, random: np.random.Generator) -> Any:
    update: dict[str, Any] = {}
    if seed % 3 == 0:
        update |= {"copy_s": Linear(fixed_s=2e-5, per_token_s=3e-6), "invocation": invocation(seed)}
        update |= {"cold_start": ColdStart(starts=1, process_s=0.1, imports_s=0.1, weights_s=0.1, first_result_s=0.1, total_s=0.4)}
    if seed % 5 == 0:
        quota = CpuQuota(fixed_s=float(random.uniform(1e-4, 4e-3)), per_token_s=float(random.uniform(1e-5, 1e-3)), period_s=0.02)
        update |= {"remote_expert": profile.record.latency.remote_expert.model_copy(update={"curve": quota})}
    if seed % 10 in (3, 6):
        update |= {"gpu_expert": inverse(float(random.uniform(1e-5, 3e-3)), float(random.uniform(1e-7, 1e-4)), at_vcpus=1)}
    return profile.record.latency.model_copy(update=update)


def _catalog(seed: int, random: np.random.Generator) -> Catalog:
    menu: list[dict[str, Any]] = [{"name": f"m{mb}", "memory_mb": mb, "vcpus": mb / 1769} for mb in (800, 1100, 1500, 1900, 2400, 3000)]
    if seed % 5 == 3:
        menu += [
            {"name": "gpu", "memory_mb": 1400, "vcpus": 1.0, "gpu_memory_mb": 320, "usd_per_hour": 0.3},
            {"name": "box", "memory_mb": 2600, "vcpus": 2.0, "usd_per_hour": 0.2},
        ]
    elif seed % 10 == 6:  # at an unknown traffic, where GPUs are all that there is, and some memory of both kinds is not for experts
        sizes = ((600, 500, 0.1), (900, 900, 0.15), (1200, 1900, 0.3))
        menu = [
            {"name": f"gpu{mb}", "memory_mb": mb, "vcpus": 1.0 + at, "gpu_memory_mb": gpu_mb, "usd_per_hour": usd}
            for at, (mb, gpu_mb, usd) in enumerate(sizes)
        ]
    main: dict[str, Any] = {"menu": menu, "timeout_s": float(random.choice([0.5, 900.0])), "usd_per_request": 2e-7}
    if seed % 10 == 6:
        main |= {"gpu_hidden_share": 0.09, "gpu_runtime_memory_mb": 30.0, "gpu_load_factor": 1.1}
    elif seed % 6 == 4:
        main |= {"usd_per_accelerator_gb_second": 5e-5}
    storage: dict[str, Any] = (
        {"usd_per_storage_gb_second": 1e-5, "storage_free_mb": 100.0, "storage_spare_mb": 16.0} if seed % 3 == 1 else {}
    )
    if seed % 4 == 3:  # reads of S3 and logs cost about as much as a call
        main |= {"bytes_per_read": 2.0**24, "usd_per_storage_gb_second": 1e-6}
        storage |= {"bytes_per_read": 2.0**22, "log_bytes_per_call": 400.0, "storage": {"usd_per_1000_reads": 4e-3, "usd_per_log_gb": 1.0}}
    return tiny_catalog(
        main,
        **storage,
        max_functions=int(random.integers(1, 4)),
        max_useful_vcpus=0.1 if seed % 3 == 1 else 1.0,  # then 256 and 512 MB are equally fast
        warm_unbilled_s=float(random.uniform(1e-4, 5e-3)),
        warm_billed_s=float(random.uniform(1e-4, 5e-3)),
        usd_per_request=float(random.choice([0.0, 2e-7, 2e-6])),
        billing_granularity_ms=float(random.choice([0.1, 1.0, 10.0])),
        payload_limit_bytes=int(random.choice([20_000, 60_000, 6_291_456])),
    )


def all_columns(problem: Problem) -> Columns:
    return build_columns(problem, candidate_sets(problem))


def checked(task: Task, gap: float, start: Solution | None) -> Solution | None:
    """Solve from a start, if any; the chosen plan has to have the value that is stated, to meet the limits and to be above its bound."""
    solution = solve(task, gap, start=start)
    assert solution is not None or start is None
    for found in filter(None, (start, solution)):
        outcome = evaluate(task.problem, Placement(found.main.spec, found.layers, found.main.instances))
        values, aim = (outcome.cost_usd_per_request, outcome.ttft_s, outcome.tpot_s), task.aim
        assert values[FIELD[aim.objective]] == pytest.approx(found.value, rel=1e-12)
        for value, limit in zip(values, (aim.budget_usd, aim.ttft_s, aim.tpot_s), strict=True):
            assert limit is None or value <= limit * (1 + 1e-8)
    if solution is not None:
        assert solution.value - solution.lower_bound <= max(gap, 1e-9) * solution.value
    return solution


def held_against(brute: Brute, problem: Problem) -> None:
    """Solve under several aims, and compare each with the best of all plans."""
    plans, columns = brute.all(), all_columns(problem)
    if not len(plans):
        assert solve(Task(problem, columns, Aim())) is None
        return
    loose = 1.1 * np.quantile(plans, 0.05, axis=0)
    for aim in (Aim(), Aim("tpot"), Aim("ttft"), Aim(ttft_s=loose[1], tpot_s=loose[2]), Aim("tpot", budget_usd=loose[0])):
        limits = np.array([x if x is not None else np.inf for x in (aim.budget_usd, aim.ttft_s, aim.tpot_s)])
        meets = np.all(plans <= limits * (1 + 1e-9), axis=1)
        solution = checked(Task(problem, columns, aim), 0.0, scan(problem, aim))
        assert (solution is not None) == meets.any(), aim
        if solution is not None:
            best = plans[meets, FIELD[aim.objective]].min()
            assert best * (1 - 1e-9) <= solution.value <= best * (1 + 1e-6), aim
            assert solution.lower_bound <= best * (1 + 1e-6)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(INSTANCES))
def test_exact_is_brute_force(seed: int, tmp_path: Path) -> None:
    brute, problem = instance(seed, tmp_path)
    plans, columns = brute.all(), all_columns(problem)
    if not len(plans):
        assert checked(Task(problem, columns, Aim()), 0.0, scan(problem, Aim())) is None
        return
    random = np.random.default_rng(1000 + seed)
    least = plans.min(axis=0)
    loose = [float(random.uniform(1.0, 1.3) * np.quantile(plans[:, column], random.choice([0, 0.05, 0.5]))) for column in range(3)]
    aims = [
        Aim(),
        Aim(ttft_s=0.97 * least[1]),
        Aim(ttft_s=loose[1]),
        Aim(tpot_s=loose[2]),
        Aim(ttft_s=loose[1], tpot_s=loose[2]),
        Aim("tpot"),
        Aim("ttft"),
        Aim("tpot", budget_usd=loose[0]),
        Aim("ttft", tpot_s=loose[2], budget_usd=loose[0]),
        Aim("tpot", budget_usd=0.97 * least[0]),
    ]
    thorough = seed % 8 == 0
    for aim in aims if thorough else [aims[i] for i in random.permutation(len(aims))[:3]]:
        limits = np.array([x if x is not None else np.inf for x in (aim.budget_usd, aim.ttft_s, aim.tpot_s)])
        meets = np.all(plans <= limits * (1 + 1e-9), axis=1)
        # As plans are made, from the scan's plan and with a gap; and without either.
        for gap, allowed in ((1e-3, 1e-3), (0.0, 1e-6)) if thorough else [random.choice(((1e-3, 1e-3), (0.0, 1e-6)))]:
            solution = checked(Task(problem, columns, aim), gap, scan(problem, aim) if gap else None)
            assert (solution is not None) == meets.any(), aim
            if solution is not None:
                best = plans[meets, FIELD[aim.objective]].min()
                assert best * (1 - 1e-9) <= solution.value <= best * (1 + allowed), aim
                assert solution.lower_bound <= best * (1 + 1e-6)


def test_random_instances_reach_every_limit(tmp_path: Path) -> None:
    """The instances are worth something only if plans mix local and remote, if some have no plan, and if every feature is chosen."""
    expected, kinds = {"none", "local", "mixed", "replicas", "functions", "instance", "instances", "payload", "gpu", "three"}, set()
    for seed in range(INSTANCES):
        problem = instance(seed, tmp_path / str(seed))[1]
        columns = all_columns(problem)
        solution = solve(Task(problem, columns, Aim()))
        sizes = [len(layer.remote) for layer in solution.layers] if solution else []
        full = problem.spec.experts_per_layer
        kinds.add("none" if not sizes else "local" if not any(sizes) else "remote" if min(sizes) == full else "mixed")
        if solution:
            kinds |= {"replicas"} if max(layer.replicas for layer in solution.layers) > 1 else set()
            kinds |= {"functions"} if any(layer.functions for layer in solution.layers) else set()
            kinds |= {"instance"} if solution.main.spec.usd_per_hour else set()
            kinds |= {"instances"} if solution.main.instances > 1 else set()
            tiers = {(bool(layer.remote), bool(layer.gpu), len(layer.remote) + len(layer.gpu) < full) for layer in solution.layers}
            kinds |= {"gpu"} if any(gpu for _, gpu, _ in tiers) else set()
            kinds |= {"three"} if (True, True, True) in tiers else set()
        unlimited = build_columns(problem, candidate_sets(problem), payload_limited=False)
        kinds |= {"payload"} if len(unlimited.count) > len(columns.count) else set()
        if kinds >= expected:
            return
    pytest.fail(f"no instance for {expected - kinds}")


def test_cost_never_rises_as_targets_loosen(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path, layers=6, experts=6, skew=1.5, expert_mb=60, seed=3)
    problem = Problem(profile.record.spec, profile.record.latency, tiny_catalog(), from_profile(profile))
    columns = all_columns(problem)
    for kind in ("ttft", "tpot"):
        least = solve(Task(problem, columns, Aim(kind)))  # type: ignore[arg-type]
        assert least is not None
        costs = []
        for factor in (0.99, 1.0001, 1.02, 1.05, 1.1, 1.3, 2.0, 10.0):
            target = least.value * factor
            aim = Aim(**{f"{kind}_s": target})  # type: ignore[arg-type]
            found = checked(Task(problem, columns, aim), 1e-6, scan(problem, aim))
            costs.append(found.value if found else math.inf)
        assert costs[-2] < math.inf
        assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(costs)), costs
        assert costs[-1] == pytest.approx(checked(Task(problem, columns, Aim()), 1e-6, None).value, rel=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("tpot_factor", [None, 1.1, 1.4])
def test_full_size_is_certified_within_its_gap(tpot_factor: float | None, tmp_path: Path) -> None:
    """30 layers x 8 experts, all 256 subsets; `checked` holds the certificate to the plan's evaluated cost."""
    profile = synthetic_profile(tmp_path, layers=30, experts=8, skew=2.0, expert_mb=30, nonexpert_mb=400)
    menu = [{"name": f"m{mb}", "memory_mb": mb, "vcpus": mb / 1769} for mb in range(1024, 10241, 256)]
    problem = Problem(profile.record.spec, profile.record.latency, tiny_catalog({"menu": menu}), from_profile(profile))
    columns = all_columns(problem)
    least = solve(Task(problem, columns, Aim("tpot")))
    assert least is not None
    aim = Aim(tpot_s=None if tpot_factor is None else least.value * tpot_factor)
    solution = checked(Task(problem, columns, aim), 1e-3, scan(problem, aim))
    assert solution is not None
    assert not solution.timed_out

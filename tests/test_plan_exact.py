"""The exact planner against brute force: an independent evaluator and every subset, memory, replicas and main spec."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from remoe_cli.plan import cost
from remoe_cli.plan.catalog import Catalog
from remoe_cli.plan.columns import build_columns
from remoe_cli.plan.exact import Solution, Task, solve
from remoe_cli.plan.workload import candidate_sets, from_profile
from remoe_cli.profile.latency_record import Linear, Quota, Timing
from remoe_cli.profile.record import Profile
from tests.synthetic import invocation, synthetic_profile, tiny_catalog


def seconds(linear: Linear, tokens: float) -> float:
    return linear.fixed_s + linear.per_token_s * tokens if tokens > 0 else 0.0


def expert_s(timing: Timing, tokens: float, vcpus: float) -> float:
    return float(timing.seconds(tokens, vcpus))


def work_s(timing: Timing, tokens: float, vcpus: float) -> float:
    return float(timing.work_s(tokens, vcpus))


def split(times: dict[int, float], replicas: int) -> list[list[int]]:
    """Longest first, to the least loaded."""
    parts: list[list[int]] = [[] for _ in range(replicas)]
    for expert in sorted(times, key=lambda e: (-times[e], e)):
        min(parts, key=lambda part: sum(times[e] for e in part)).append(expert)
    return [part for part in parts if part]


def brute_force(profile: Profile, catalog: Catalog, n_in: int, n_out: int) -> np.ndarray:
    """Every plan of a 2-layer model that fits memory and payload, as rows (cost, ttft, tpot)."""
    spec, latency, side = profile.record.spec, profile.record.latency, catalog.function
    measured = latency.invocation
    row_s = 2 * spec.hidden_state_bytes * side.wire_expansion / (measured.bytes_per_s if measured else side.network_bytes_per_s)
    outside = sum(measured.unbilled_s.tenths) / 10 if measured else side.warm_unbilled_s
    billed = measured.billed_s.tenths if measured else (side.warm_billed_s,)
    granule = side.billing_granularity_ms / 1000
    copies_s = [2 * 2 * seconds(latency.copy_s, n) for n in (n_in, 1)]

    local_expert_s = functools.cache(functools.partial(expert_s, latency.local_expert, vcpus=latency.main_vcpus))
    remote_work_s = functools.cache(functools.partial(work_s, latency.remote_expert))

    @functools.cache
    def inside(memory_mb: int, tokens: tuple[float, ...]) -> float:
        vcpus, timing = min(side.max_useful_vcpus, memory_mb / side.mb_per_vcpu), latency.remote_expert
        return float(timing.elapsed_s(sum(remote_work_s(n, vcpus) for n in tokens), vcpus)) + sum(tokens) * row_s

    def wait(inside_s: float) -> float:
        return outside + sum(billed) / len(billed) + inside_s

    @functools.cache
    def bill(memory_mb: int, inside_s: float) -> float:
        rounded = [math.ceil((overhead + inside_s) / granule - 1e-6) * granule for overhead in billed]
        return sum(rounded) / len(rounded) * memory_mb / 1024 * side.usd_per_gb_second + side.usd_per_request

    def choices(layer: int, main_speed: float) -> list[tuple[float, float, float, int]]:
        counts = profile.arrays["prefill_counts"][:, layer].sum(axis=0)
        tokens = [n_in * spec.top_k * float(c) / float(counts.sum()) for c in counts]
        out = []
        for size in range(spec.experts_per_layer + 1):
            for remote in itertools.combinations(range(spec.experts_per_layer), size):
                local_s = sum(local_expert_s(n) for e, n in enumerate(tokens) if e not in remote) / main_speed
                for memory_mb, replicas in itertools.product(side.memory_menu_mb, range(1, side.max_replicas + 1)) if remote else [(0, 0)]:
                    if remote:
                        held = side.runtime_memory_mb * 2**20 + size * spec.expert_bytes * side.expert_memory_factor
                        if held + sum(tokens[e] for e in remote) * spec.hidden_state_bytes > memory_mb * 2**20:
                            continue
                    vcpus = min(side.max_useful_vcpus, memory_mb / side.mb_per_vcpu)
                    times = {e: remote_work_s(tokens[e], vcpus) for e in remote if tokens[e] > 0}
                    parts = split(times, replicas) if remote else []
                    wire = [sum(tokens[e] for e in part) * spec.hidden_state_bytes * side.wire_expansion for part in parts]
                    if max(wire, default=0) > side.payload_limit_bytes:
                        continue
                    durations = [inside(memory_mb, tuple(tokens[e] for e in part)) for part in parts]
                    usd, step = sum(bill(memory_mb, duration) for duration in durations), 0.0
                    for token in profile.arrays["trace_ids"][:, layer].tolist():
                        hits = sum(e in remote for e in token)
                        duration = inside(memory_mb, (1.0,) * hits) if hits else 0.0
                        local = sum(e >= 0 for e in token) - hits
                        local_step = local * local_expert_s(1) / main_speed
                        step += max(local_step, wait(duration) if hits else 0.0)
                        usd += n_out * (bill(memory_mb, duration) if hits else 0.0) / len(profile.arrays["trace_ids"])
                    out.append((max([local_s, *map(wait, durations)]), step / len(profile.arrays["trace_ids"]), usd, size))
        return out

    plans = []
    for main in catalog.main.menu:
        speed = min(main.vcpus, latency.main_vcpus) / latency.main_vcpus
        tokens = n_in + n_out
        base = catalog.main.runtime_memory_mb * 2**20 + spec.nonexpert_bytes
        base += tokens * (spec.hidden_state_bytes + 1024 * spec.hidden_layers)
        rate = catalog.main.usd_per_gb_second * main.memory_mb / 1024
        first, second = (np.array(choices(layer, speed))[..., None] for layer in (0, 1))
        ttft = seconds(latency.nonexpert_prefill, n_in) / speed + copies_s[0] + first[:, 0] + second[:, 0].T
        tpot = latency.nonexpert_decode_s / speed + copies_s[1] + first[:, 1] + second[:, 1].T
        total = rate * (ttft + n_out * tpot) + first[:, 2] + second[:, 2].T
        local = 2 * spec.experts_per_layer - first[:, 3] - second[:, 3].T
        fits = base + local * spec.expert_bytes <= main.memory_mb * 2**20
        plans.append(np.stack([total[fits], ttft[fits], tpot[fits]], axis=1))
    return np.concatenate(plans)


def instance(seed: int, path: Path) -> tuple[Profile, Catalog, cost.Problem]:
    """A random tiny problem; over the seeds memory, payload and both targets bind, and skipped slots, an accelerator to copy to, live
    targets and CPU quotas occur."""
    random = np.random.default_rng(seed)
    profile = synthetic_profile(
        path,
        experts=int(random.integers(3, 5)),
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
    latency = profile.record.latency
    if seed % 3 == 0:
        latency = latency.model_copy(update={"copy_s": Linear(fixed_s=2e-5, per_token_s=3e-6), "invocation": invocation(seed)})
    if seed % 5 == 0:
        quota = Quota(fixed_s=float(random.uniform(1e-4, 4e-3)), per_token_s=float(random.uniform(1e-5, 1e-3)), period_s=0.02)
        latency = latency.model_copy(update={"remote_expert": latency.remote_expert.model_copy(update={"curve": quota})})
    profile = replace(profile, record=profile.record.model_copy(update={"latency": latency}))
    catalog = tiny_catalog(
        {"menu": [{"name": f"m{mb}", "memory_mb": mb, "vcpus": mb / 1769} for mb in (800, 1100, 1500, 1900, 2400, 3000)]},
        warm_unbilled_s=float(random.uniform(1e-4, 5e-3)),
        warm_billed_s=float(random.uniform(1e-4, 5e-3)),
        usd_per_request=float(random.choice([0.0, 2e-7, 2e-6])),
        billing_granularity_ms=float(random.choice([0.1, 1.0, 10.0])),
        payload_limit_bytes=int(random.choice([20_000, 60_000, 6_291_456])),
    )
    return profile, catalog, cost.Problem(profile.record.spec, profile.record.latency, catalog, from_profile(profile))


def checked(problem: cost.Problem, ttft_s: float | None, tpot_s: float | None, gap: float) -> Solution | None:
    """Solve, and require that the chosen plan really has the value, meets the targets and is above its own bound."""
    columns = build_columns(problem, candidate_sets(problem.workload))
    solution = solve(Task(problem, columns, "cost", ttft_s, tpot_s), gap)
    if solution is not None:
        outcome = cost.evaluate(problem, cost.Placement(solution.main, columns.layer_plans(problem, solution.chosen)))
        assert outcome.cost_usd_per_request == pytest.approx(solution.value, rel=1e-12)
        assert ttft_s is None or outcome.ttft_s <= ttft_s * (1 + 1e-8)
        assert tpot_s is None or outcome.tpot_s <= tpot_s * (1 + 1e-8)
        assert solution.value - solution.lower_bound <= max(gap, 1e-9) * solution.value
    return solution


@pytest.mark.parametrize("seed", range(48))
def test_exact_is_brute_force(seed: int, tmp_path: Path) -> None:
    profile, catalog, problem = instance(seed, tmp_path)
    plans = brute_force(profile, catalog, problem.workload.n_in, problem.workload.n_out)
    random = np.random.default_rng(1000 + seed)
    if not len(plans):
        assert checked(problem, None, None, 0.0) is None
        return
    quantiles = [np.quantile(plans[:, column], [0, 0.05, 0.5]) for column in (1, 2)]
    picks = [None, 0.97 * float(quantiles[0][0]), *(float(random.uniform(1.0, 1.3) * q[index]) for q in quantiles for index in (0, 1))]
    targets = [(None, None), (picks[1], None), (picks[2], None), (None, picks[4]), (picks[3], picks[5]), (picks[2], picks[4])]
    for ttft_s, tpot_s in targets:
        meets = np.all(plans[:, 1:] <= np.array([ttft_s or np.inf, tpot_s or np.inf]), axis=1)
        for gap, allowed in ((1e-3, 1e-3), (0.0, 1e-6)):
            solution = checked(problem, ttft_s, tpot_s, gap)
            assert (solution is not None) == meets.any(), (ttft_s, tpot_s)
            if solution is not None:
                least = plans[meets, 0].min()
                assert least * (1 - 1e-9) <= solution.value <= least * (1 + allowed)
                assert solution.lower_bound <= least * (1 + 1e-6)


@pytest.mark.parametrize("objective", ["ttft", "tpot"])
def test_least_latency_is_brute_force(objective: str, tmp_path: Path) -> None:
    for seed in (1, 2, 3, 5):
        profile, catalog, problem = instance(seed, tmp_path / str(seed))
        plans = brute_force(profile, catalog, problem.workload.n_in, problem.workload.n_out)
        solution = solve(Task(problem, build_columns(problem, candidate_sets(problem.workload)), objective), 0.0)  # type: ignore[arg-type]
        assert (solution is None) == (len(plans) == 0)
        if solution is not None:
            assert solution.value == pytest.approx(plans[:, ["ttft", "tpot"].index(objective) + 1].min(), rel=1e-6)


def test_random_instances_reach_every_limit(tmp_path: Path) -> None:
    """The 48 instances are worth something only if plans mix local and remote, and if some have no plan."""
    kinds = set()
    for seed in range(48):
        problem = instance(seed, tmp_path / str(seed))[2]
        columns = build_columns(problem, candidate_sets(problem.workload))
        solution = solve(Task(problem, columns, "cost"))
        remote = columns.count[solution.chosen] if solution else None
        full = problem.spec.experts_per_layer
        kinds.add("none" if remote is None else "local" if not remote.any() else "remote" if (remote == full).all() else "mixed")
        if remote is not None and columns.replicas[solution.chosen].max() > 1:  # type: ignore[union-attr]
            kinds.add("replicas")
        unlimited = build_columns(problem, candidate_sets(problem.workload), payload_limited=False)
        if len(unlimited.count) > len(columns.count):
            kinds.add("payload")
    assert kinds >= {"none", "local", "mixed", "replicas", "payload"}


def test_cost_never_rises_as_targets_loosen(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path, layers=6, experts=6, skew=1.5, expert_mb=60, seed=3)
    problem = cost.Problem(profile.record.spec, profile.record.latency, tiny_catalog(), from_profile(profile))
    columns = build_columns(problem, candidate_sets(problem.workload))
    least = {kind: solve(Task(problem, columns, kind)) for kind in ("ttft", "tpot")}
    for kind, solution in least.items():
        assert solution is not None
        costs = []
        for factor in (0.99, 1.0001, 1.02, 1.05, 1.1, 1.3, 2.0, 10.0):
            target = solution.value * factor
            found = checked(problem, target if kind == "ttft" else None, target if kind == "tpot" else None, 1e-6)
            costs.append(found.value if found else math.inf)
        assert costs[-2] < math.inf
        assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(costs)), costs
        assert costs[-1] == pytest.approx(checked(problem, None, None, 1e-6).value, rel=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("tpot_factor", [None, 1.1, 1.4])
def test_full_size_is_certified_within_its_gap(tpot_factor: float | None, tmp_path: Path) -> None:
    """30 layers x 8 experts, all 256 subsets; `checked` holds the certificate to the plan's evaluated cost."""
    profile = synthetic_profile(tmp_path, layers=30, experts=8, skew=2.0, expert_mb=30, nonexpert_mb=400)
    menu = [{"name": f"m{mb}", "memory_mb": mb, "vcpus": mb / 1769} for mb in range(1024, 10241, 256)]
    problem = cost.Problem(profile.record.spec, profile.record.latency, tiny_catalog({"menu": menu}), from_profile(profile))
    columns = build_columns(problem, candidate_sets(problem.workload))
    least = solve(Task(problem, columns, "tpot"))
    assert least is not None
    solution = checked(problem, None, None if tpot_factor is None else least.value * tpot_factor, 1e-3)
    assert solution is not None
    assert not solution.timed_out

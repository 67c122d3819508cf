"""The cost model against arithmetic done by hand: what of an invocation is waited for, and what of it is billed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.cost import expert_functions
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.document import LayerPlan, Outcome, Plan
from remoe_cli.plan.problem.problem import Placement, Problem
from remoe_cli.plan.problem.workload import from_profile
from remoe_cli.plan.verify.check import verify
from remoe_cli.profile.latency_record import CpuQuota, InvocationTiming, Linear
from remoe_cli.profile.record import Profile
from tests.support.synthetic import invocation, plan_of, quantiles, synthetic_profile, tiny_catalog

N_IN, N_OUT = 10, 20
MB = 1769  # one vCPU
USD_PER_S = MB / 1024 * 0.0000166667
FEE = 0.0000002


def case(path: Path, **latency: Any) -> tuple[Profile, Catalog]:
    """One layer of two experts, top-1: of 4 prompt tokens 3 go to expert 0 and 1 to expert 1, of generated ones likewise."""
    profile = synthetic_profile(path, layers=1, experts=2, top_k=1, prompts=1, prompt_tokens=4, decode_tokens=4, main_vcpus=1)
    profile.arrays["prefill_counts"][:] = profile.arrays["decode_counts"][:] = [3, 1]
    profile.arrays["trace_ids"][:] = np.array([0, 0, 1, 0])[:, None, None]
    record = profile.record.model_copy(update={"latency": profile.record.latency.model_copy(update=latency)})
    catalog = tiny_catalog(
        memory_menu_mb=[MB],
        warm_unbilled_s=0.004,
        warm_billed_s=0.0013,
        wire_expansion=1.0,
        network_bytes_per_s=2 * 2048 / 0.001,  # a row of 2,048 bytes takes 1 ms there and back
    )
    return replace(profile, record=record), catalog


def outcome(profile: Profile, catalog: Catalog, cold_share: float = 0.0) -> Outcome:
    workload = replace(from_profile(profile, N_IN, N_OUT), cold_share=cold_share)
    problem = Problem(profile.record.spec, profile.record.latency, catalog, workload)
    plan = Placement(catalog.main.menu[-1], (LayerPlan(layer=1, remote=(1,), memory_mb=MB, replicas=1),))
    return evaluate(problem, plan)


def functions_usd(of: Outcome, catalog: Catalog) -> float:
    main = catalog.main.menu[-1].memory_mb / 1024 * catalog.main_usd_per_gb_second
    return of.cost_usd_per_request - main * (of.ttft_s + N_OUT * of.tpot_s)


def test_only_time_in_the_function_is_billed_and_all_of_it_is_waited_for(tmp_path: Path) -> None:
    profile, catalog = case(tmp_path)
    got = outcome(profile, catalog)
    # Prefill: 2.5 rows, 0.3 + 0.2 x 2.5 = 0.8 ms of computing, 2.5 ms of payload, 1.3 ms of overhead: 4.6 ms, billed 5 ms; 4 ms outside.
    assert got.ttft_s == pytest.approx(0.004 + 2e-4 * N_IN + 0.0046 + 0.004)
    # A token: one in four calls, 0.5 + 1 + 1.3 = 2.8 ms, billed 3 ms; the others take 0.3 ms in the main function.
    assert got.tpot_s == pytest.approx(0.005 + 0.25 * (0.0028 + 0.004) + 0.75 * 0.0003)
    assert functions_usd(got, catalog) == pytest.approx((0.005 + N_OUT * 0.25 * 0.003) * USD_PER_S + (1 + N_OUT * 0.25) * FEE)


def test_storage_beyond_the_free_part_is_billed_as_long_as_memory(tmp_path: Path) -> None:
    """An expert of 20 MB and 12 MB to spare are 32 MB, of which 8 are free: 24 MB more, in prefill, in decode and in cold starts."""
    profile, _ = case(tmp_path)
    storage = {"usd_per_storage_gb_second": 1e-4, "storage_free_mb": 8.0, "storage_spare_mb": 12.0}
    free, billed = (tiny_catalog(memory_menu_mb=[MB], **some) for some in ({}, storage))
    usd_per_s = 24 / 1024 * 1e-4
    before, after = (outcome(profile, catalog, cold_share=0.5) for catalog in (free, billed))
    seconds = (functions_usd(before, free) - (1 + N_OUT * 0.25) * FEE) / USD_PER_S
    assert after.cost_usd_per_request - before.cost_usd_per_request == pytest.approx(seconds * usd_per_s, rel=1e-6)
    room = tiny_catalog(memory_menu_mb=[MB], **storage | {"storage_free_mb": 32.0})
    assert outcome(profile, room, cold_share=0.5) == before


def test_what_was_measured_on_a_live_target_goes_before_the_catalog(tmp_path: Path) -> None:
    measured = InvocationTiming(
        target="t",
        measured_on="2026-01-01",
        unbilled_s=quantiles([0.001] * 9 + [0.011]),  # mean 2 ms
        billed_s=quantiles([0.0001] * 5 + [0.0015] * 5),  # mean 0.8 ms
        bytes_per_s=2 * 2048 / 0.0005,
        samples=(),
    )
    profile, catalog = case(tmp_path, invocation=measured)
    got = outcome(profile, catalog)
    # Prefill: 0.8 + 1.25 = 2.05 ms besides overhead; billed 3 and 4 ms, each half of the time.
    assert got.ttft_s == pytest.approx(0.004 + 2e-4 * N_IN + 0.00205 + 0.0008 + 0.002)
    # A token: 0.5 + 0.5 = 1 ms besides overhead; billed 2 and 3 ms.
    assert got.tpot_s == pytest.approx(0.005 + 0.25 * (0.001 + 0.0008 + 0.002) + 0.75 * 0.0003)
    assert functions_usd(got, catalog) == pytest.approx((0.0035 + N_OUT * 0.25 * 0.0025) * USD_PER_S + (1 + N_OUT * 0.25) * FEE)


def test_hidden_states_are_copied_twice_a_layer(tmp_path: Path) -> None:
    without = outcome(*case(tmp_path / "without"))
    copied = outcome(*case(tmp_path / "copied", copy_s=Linear(fixed_s=1e-4, per_token_s=1e-5)))
    assert copied.ttft_s - without.ttft_s == pytest.approx(2 * (1e-4 + 1e-5 * N_IN))
    assert copied.tpot_s - without.tpot_s == pytest.approx(2 * (1e-4 + 1e-5))


def test_experts_of_one_call_share_its_cpu_quota(tmp_path: Path) -> None:
    """Two experts of 0.8 quotas each are not slowed alone; together they wait for the second quota."""
    profile, catalog = case(tmp_path)
    share = 256 / 1769
    curve = CpuQuota(fixed_s=0.8 * 0.02 * share, per_token_s=0.0, period_s=0.02)
    timing = profile.record.latency.remote_expert.model_copy(update={"curve": curve})
    latency = profile.record.latency.model_copy(update={"remote_expert": timing})
    problem = Problem(profile.record.spec, latency, catalog, from_profile(profile, N_IN, N_OUT))
    one, two = expert_functions.decode_inside_s(problem, 256, np.array([1, 2]))
    assert two - 2 * one > 0.1 * 0.02 * (1 - share)
    assert one == pytest.approx(0.8 * 0.02 * share + 0.001)


@pytest.mark.parametrize("field", ["cost_usd_per_request", "ttft_s", "tpot_s"])
def test_the_verifier_agrees_on_a_live_target_and_finds_what_is_tampered(field: str, tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path, layers=3, experts=6, skew=2.0, expert_mb=60)
    latency = profile.record.latency.model_copy(update={"invocation": invocation(1), "copy_s": Linear(fixed_s=1e-5, per_token_s=1e-6)})
    profile = replace(profile, record=profile.record.model_copy(update={"latency": latency}))
    plan = plan_of(profile, tiny_catalog(), remote_share=0.5)
    assert verify(plan, profile, tiny_catalog()) == ()
    data = plan.model_dump(mode="json")
    data[field] *= 1 - 1e-8
    assert field in {finding.field for finding in verify(Plan.model_validate(data), profile, tiny_catalog())}

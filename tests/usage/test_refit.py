"""Times fitted to what requests told: what was put in comes out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli.cli.calibrate import _times
from remoe_cli.errors import DeployError, UsageError
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.cost.expert_functions import function_vcpus
from remoe_cli.plan.document import Plan
from remoe_cli.plan.problem.request import problem_of
from remoe_cli.profile.latency_record import ColdStart
from remoe_cli.profile.record import Profile, read_profile
from remoe_cli.runtime.observed import Observed
from remoe_cli.usage.refit import refit
from tests.support.synthetic import invocation, plan_of, synthetic_profile, tiny_catalog

ELAPSED_S, INSIDE_S, COMPUTE_S, BYTES_PER_S = 0.030, 0.005, 0.001, 2e6


def planned(folder: Path, **latency: Any) -> tuple[Profile, Plan, Catalog]:
    profile, catalog = synthetic_profile(folder, expert_mb=40), tiny_catalog()
    profile = replace(profile, record=profile.record.model_copy(update={"latency": profile.record.latency.model_copy(update=latency)}))
    plan = plan_of(profile, catalog, remote_share=0.5)
    return profile, plan.model_copy(update={"main": plan.main.model_copy(update={"vcpus": None})}), catalog


def sample(size: int) -> tuple[int, float, float, float]:
    """A call whose payload passes at BYTES_PER_S beside what every call takes."""
    return size, ELAPSED_S + size / BYTES_PER_S, INSIDE_S, COMPUTE_S


def told(requests: int = 10, sizes: tuple[int, ...] = (800, 900, 40_000, 300_000), **more: Any) -> list[Observed]:
    """Tokens of one and two calls of small payloads, and prompts of several sizes; a token takes nothing beside its calls."""
    small = sample(sizes[0])
    tokens = tuple((0.004 + calls * small[1], (small,) * calls) for calls in (1, 2, 1, 2))
    return [Observed(revision="r", tokens=tokens, first=tuple(map(sample, sizes)), **more) for _ in range(requests)]


def test_what_calls_took_comes_out(tmp_path: Path) -> None:
    profile, plan, catalog = planned(tmp_path / "p")
    made = refit("m", profile, plan, catalog, told(), tmp_path / "new")
    new = read_profile(tmp_path / "new").record.latency
    assert new == made.profile.record.latency and made.calls == 100 and new.invocation is not None
    assert new.invocation.bytes_per_s == pytest.approx(BYTES_PER_S, rel=0.01)
    assert new.invocation.billed_s.mean == pytest.approx(INSIDE_S - COMPUTE_S)
    # A token of more calls takes less than its calls' times, as their layers' own experts are computed meanwhile: no wait is counted twice.
    assert new.invocation.unbilled_s.mean == pytest.approx(ELAPSED_S - INSIDE_S, rel=0.1)
    assert new.cold_start is None and made.cold_starts == 0 and "too few" in made.remarks[0]
    assert made.computing == 1.0 and new.remote_expert == profile.record.latency.remote_expert


def test_prompts_alone_tell_what_calls_take(tmp_path: Path) -> None:
    """Answers of one token have no further tokens, whose times would be compared."""
    profile, plan, catalog = planned(tmp_path / "p")
    alone = [each.model_copy(update={"tokens": ()}) for each in told(sizes=(800, 900, 1000))]
    found = refit("m", profile, plan, catalog, alone, tmp_path / "new").profile.record.latency.invocation
    assert found is not None and found.unbilled_s.mean == pytest.approx(ELAPSED_S - INSIDE_S, rel=0.05)


def test_a_server_that_answers_several_at_once_tells_what_a_small_call_takes(tmp_path: Path) -> None:
    """The calls of its prompts are large, and their payload is counted by its bytes: it may not count twice."""
    profile, plan, catalog = planned(tmp_path / "p")
    few = [sample(900)] * 2  # too few of a size to tell anything
    large = [each.model_copy(update={"tokens": (), "first": tuple(map(sample, (40_000, 300_000)))}) for each in told()]
    large[0] = large[0].model_copy(update={"first": (*few, *large[0].first)})
    shared = [each.model_copy(update={"shared": tuple(map(sample, (4_000, 4_050, 9_000)))}) for each in large]
    for name, seen, smallest, remark in (
        ("one", shared, 4_025, "No token was made alone"),
        ("two", large, 40_000, "Only prompts had calls"),
    ):
        made = refit("m", profile, plan, catalog, seen, tmp_path / name)
        found = made.profile.record.latency.invocation
        assert found is not None and found.unbilled_s.mean == pytest.approx(ELAPSED_S + smallest / BYTES_PER_S - INSIDE_S)
        assert found.bytes_per_s == pytest.approx(BYTES_PER_S, rel=0.01)
        assert any(remark in each for each in made.remarks)
    assert "of up to 40,000 bytes" in " ".join(made.remarks)


def test_payloads_of_one_size_leave_the_rate_as_it_was(tmp_path: Path) -> None:
    profile, plan, catalog = planned(tmp_path / "p", invocation=invocation(1))
    made = refit("m", profile, plan, catalog, told(sizes=(900, 950)), tmp_path / "new")
    latency = made.profile.record.latency
    assert latency.invocation is not None and latency.invocation.bytes_per_s == invocation(1).bytes_per_s
    assert any("rate of the network is as it was" in remark for remark in made.remarks)


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_slower_functions_are_found(tmp_path: Path, factor: float) -> None:
    profile, plan, catalog = planned(tmp_path / "p")
    curve, random = profile.record.latency.remote_expert, np.random.default_rng(0)
    calls = []
    for experts, rows, memory_mb in ((1, 1, 1024), (2, 2, 1024), (3, 40, 2048), (1, 7, 512)):
        vcpus = float(function_vcpus(catalog.function, memory_mb))
        seconds = float(curve.elapsed_s(experts * curve.work_s(rows / experts, vcpus) * factor, vcpus))
        calls += [(experts, rows, memory_mb, seconds * float(random.uniform(0.9, 1.1))) for _ in range(8)]
    made = refit("m", profile, plan, catalog, told(computing=tuple(calls)), tmp_path / "new")
    assert made.computing == pytest.approx(factor, rel=0.05)
    new = made.profile.record.latency.remote_expert
    assert float(new.seconds(5, 1.0)) == pytest.approx(factor * float(curve.seconds(5, 1.0)), rel=0.05)
    assert new.held_out_error is not None and new.held_out_error < 0.1


@pytest.mark.parametrize("known", [True, False])
def test_cold_starts_are_summarised(tmp_path: Path, known: bool) -> None:
    steps = ColdStart(starts=5, process_s=0.1, imports_s=0.3, weights_s=0.02, first_result_s=0.02, total_s=0.5)
    profile, plan, catalog = planned(tmp_path / "p", cold_start=steps if known else None)
    made = refit("m", profile, plan, catalog, told(cold=((2.0, 0.8, 0.1),)), tmp_path / "new")
    found = made.profile.record.latency.cold_start
    assert found is not None and (found.starts, found.total_s, found.waits_s) == (10, 2.0, (2.0,) * 10)
    assert found.process_s + found.imports_s == pytest.approx(0.8) and found.weights_s + found.first_result_s == pytest.approx(0.1)
    assert found.process_s == pytest.approx(0.2 if known else 0.0)


def test_what_was_fitted_stands_beside_what_the_plan_was_made_with(tmp_path: Path) -> None:
    """That is the catalog's time where the profile has none, as for cold starts of which too few were seen."""
    profile, plan, catalog = planned(tmp_path / "p", invocation=None, cold_start=None)
    made = refit("m", profile, plan, catalog, told(), tmp_path / "new")
    side, found = catalog.function, _times(profile.record.latency, made.profile.record.latency, problem_of(plan, profile, catalog), plan)
    assert [before for _, before, _ in found][:3] == [side.warm_unbilled_s, side.warm_billed_s, 1e6 / side.network_bytes_per_s]
    assert found[0][2] == pytest.approx(ELAPSED_S - INSIDE_S, rel=0.1) and found[3][1] == found[3][2] > side.cold_start_s
    measured = _times(made.profile.record.latency, made.profile.record.latency, problem_of(plan, made.profile, catalog), plan)
    assert all(before == now for _, before, now in measured) and measured[0] != found[0]


def test_a_deployment_without_functions_has_nothing_to_calibrate(tmp_path: Path) -> None:
    profile, plan, catalog = planned(tmp_path / "p")
    plan = plan.model_copy(update={"layers": tuple(layer.model_copy(update={"remote": (), "functions": ()}) for layer in plan.layers)})
    with pytest.raises(DeployError, match="'m' has no expert functions whose calls could be fitted") as raised:
        refit("m", profile, plan, catalog, told(), tmp_path / "new")
    assert "--remote-share" in raised.value.hint


def test_too_few_calls_and_the_old_profiles_place_are_refused(tmp_path: Path) -> None:
    profile, plan, catalog = planned(tmp_path / "p")
    with pytest.raises(DeployError, match="tell of 10 warm calls of expert functions, and 20 are needed"):
        refit("m", profile, plan, catalog, told(1), tmp_path / "new")
    with pytest.raises(UsageError, match="which is not written over"):
        refit("m", profile, plan, catalog, told(), tmp_path / "other" / ".." / "p")
    assert not (tmp_path / "new").exists()

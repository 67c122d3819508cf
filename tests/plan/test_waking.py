"""Instances that scale to zero: how often they wake, what that costs, and that the verifier works it out in another way."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from remoe_cli.errors import UsageError
from remoe_cli.plan.build import make_plan
from remoe_cli.plan.catalog.catalog import Catalog, read_catalog
from remoe_cli.plan.cost import main_function, prices
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.cost.prompts import cold_wait_s, longest_wait_s
from remoe_cli.plan.cost.requests import longest_s
from remoe_cli.plan.document import MainKind, MainSpec, Plan, Waking
from remoe_cli.plan.explain.rows import kind_text
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.problem import Placement
from remoe_cli.plan.problem.request import PlanRequest, make_problem
from remoe_cli.plan.problem.sizes import Size
from remoe_cli.plan.problem.traffic import Traffic, one_length
from remoe_cli.plan.solve.candidates import candidate_sets
from remoe_cli.plan.solve.columns import build_columns
from remoe_cli.plan.solve.exact import GAP, solve
from remoe_cli.plan.solve.node import Task
from remoe_cli.plan.verify.check import verify
from remoe_cli.profile.record import Profile
from tests.support.synthetic import synthetic_profile

AWS = read_catalog("aws-us-east-1")
ZERO = next(spec for spec in AWS.main.menu if spec.scales_to_zero)


def simulated(arrivals_s: np.ndarray, idle_s: float, wake_s: float) -> Waking:
    """Walk through the requests one by one: an instance is off, waking, or up until none came for `idle_s`."""
    woken, up_s, off_at = 0, 0.0, -math.inf  # when the instance will be given back
    for at in arrivals_s.tolist():
        if at >= off_at:
            woken += 1
            until = at + wake_s + idle_s
            up_s += until - at
        else:
            until = max(off_at, at + idle_s)
            up_s += until - off_at
        off_at = until
    span_s = off_at - arrivals_s[0]
    return Waking(wake_share=woken / len(arrivals_s), up_share=up_s / span_s)


@pytest.mark.parametrize(
    ("per_hour", "idle_s", "wake_s"), [(1.0, 900.0, 240.0), (6.0, 600.0, 300.0), (20.0, 300.0, 240.0), (20.0, 60.0, 600.0)]
)
def test_the_closed_form_agrees_with_a_simulation(per_hour: float, idle_s: float, wake_s: float) -> None:
    random = np.random.default_rng(0)
    found = simulated(np.cumsum(random.exponential(3600 / per_hour, 200_000)), idle_s, wake_s)
    said = one_length(1, 1, per_hour).waking(idle_s, wake_s)
    assert said is not None
    assert said.wake_share == pytest.approx(found.wake_share, rel=0.02)
    assert said.up_share == pytest.approx(found.up_share, rel=0.02)


def test_a_trace_tells_its_own_times() -> None:
    """Bursts of 50 requests, one a day: one in 50 wakes an instance, which is off most of the time all the same."""
    gaps_s = np.tile([*[10.0] * 49, 86_400.0], 400)
    traffic = Traffic(one_length(1, 1).lengths, 3600 / float(gaps_s.mean()), gaps_s)
    said, found = traffic.waking(900.0, 240.0), simulated(np.cumsum([0.0, *gaps_s]), 900.0, 240.0)
    assert said is not None
    assert said.wake_share == pytest.approx(1 / 50) and said.wake_share == pytest.approx(found.wake_share, rel=0.02)
    assert said.up_share == pytest.approx(found.up_share, rel=0.02) and said.up_share < 0.02


def test_the_two_ends() -> None:
    assert one_length(1, 1).waking(900.0, 240.0) is None  # nobody knows the traffic
    busy, rare = one_length(1, 1, 3600.0).waking(900.0, 240.0), one_length(1, 1, 0.001).waking(900.0, 240.0)
    assert busy is not None and busy.wake_share < 1e-12 and busy.up_share == pytest.approx(1)
    assert rare is not None and rare.wake_share > 0.999
    assert rare.up_share == pytest.approx(0.001 / 3600 * (900 + 240), rel=1e-3)  # idle and waking time of each request


def test_its_price_by_hand() -> None:
    """An hour costs $0.92552; at 2 requests an hour and 30% of the time up, each pays $0.138828 of it, its fee and its log."""
    found = prices.main_prices(AWS, ZERO, requests_per_hour=2.0, up_share=0.3)
    assert ZERO.usd_per_hour == pytest.approx(0.8048 * 1.15) and found.share_usd == pytest.approx(0.138828)
    cost = prices.main_cost(found, 20.0)
    assert cost.busy_usd + cost.idle_usd == pytest.approx(0.138828)
    assert cost.fees_usd == pytest.approx(0.0000002 + 400 / 2**30 * 0.50)
    assert prices.main_reads(AWS, ZERO) == math.ceil(9984 / 16)  # what /tmp holds, not what the memory does


def small(profile: Path) -> Profile:
    return synthetic_profile(profile, layers=3, experts=8, expert_mb=150.0, nonexpert_mb=900.0)


def only(kind: MainKind) -> Catalog:
    """The catalog with one kind of main functions alone."""
    menu = tuple(spec for spec in AWS.main.menu if spec.kind == kind)
    return AWS.model_copy(update={"main": AWS.main.model_copy(update={"menu": menu})})


def planned(profile: Profile, catalog: Catalog, per_hour: float, aim: Aim | None = None) -> Plan:
    return make_plan(profile, catalog, PlanRequest(n_in=100, n_out=100, requests_per_hour=per_hour, aim=aim or Aim(), cold_share=None))


@pytest.mark.parametrize("per_hour", [1.0, 20.0, 200.0])
def test_the_verifier_agrees(per_hour: float, tmp_path: Path) -> None:
    profile, catalog = small(tmp_path / "p"), only(MainKind.TO_ZERO)
    for aim in (Aim(), Aim("tpot"), Aim("ttft"), Aim(ttft_s=600.0, ttft_percentile=95.0)):
        plan = planned(profile, catalog, per_hour, aim)
        assert plan.main.scales_to_zero and plan.workload.waking is not None
        assert verify(plan, profile, catalog) == ()


@pytest.mark.parametrize("field", ["wake_share", "up_share"])
def test_the_verifier_sees_another_share(field: str, tmp_path: Path) -> None:
    profile, catalog = small(tmp_path / "p"), only(MainKind.TO_ZERO)
    plan = planned(profile, catalog, 1.0)
    assert plan.workload.waking is not None
    other = plan.workload.waking.model_copy(update={field: getattr(plan.workload.waking, field) * 0.99})
    bent = plan.model_copy(update={"workload": plan.workload.model_copy(update={"waking": other})})
    assert f"workload.waking.{field}" in {finding.field for finding in verify(bent, profile, catalog)}


def test_what_does_not_fit_its_tmp_is_remote(tmp_path: Path) -> None:
    """Host memory has room for more experts than /tmp lets it fetch."""
    profile = synthetic_profile(tmp_path / "p", layers=4, experts=32, expert_mb=200.0, nonexpert_mb=900.0)
    plan = planned(profile, only(MainKind.TO_ZERO), 20.0, Aim("tpot"))
    local = sum(32 - len(layer.remote) for layer in plan.layers)
    assert local == (9984 - 900) // 200 < (plan.main.memory_mb - 900) // 200
    assert verify(plan, profile, only(MainKind.TO_ZERO)) == ()
    more = plan.layers[0].model_copy(update={"remote": plan.layers[0].remote[1:], "functions": ()})
    bent = plan.model_copy(update={"layers": (more, *plan.layers[1:])})
    assert any("/tmp" in finding.found for finding in verify(bent, profile, only(MainKind.TO_ZERO)))


def test_the_kinds_beside_each_other_at_1_20_and_200_requests_an_hour(tmp_path: Path) -> None:
    """Scaled to zero costs a fraction of always-on where requests are rare, and gets dearer than it where an instance is never off."""
    profile = small(tmp_path / "p")
    ratio, woken = {}, {}
    for per_hour in (1.0, 20.0, 200.0):
        plan = planned(profile, AWS, per_hour)
        found = {one.kind: one for one in plan.kinds}
        assert set(found) == set(MainKind) and verify(plan, profile, AWS) == ()
        assert min(one.cost_usd_per_request for one in plan.kinds) >= plan.cost_usd_per_request * (1 - 1e-9)
        ratio[per_hour] = found[MainKind.TO_ZERO].cost_usd_per_request / found[MainKind.ALWAYS_ON].cost_usd_per_request
        waking = plan.workload.waking
        assert waking is not None
        woken[per_hour] = waking.wake_share
        warm_s = found[MainKind.TO_ZERO].ttft_s - waking.wake_share * found[MainKind.TO_ZERO].cold_start_s
        why = f"; dearer than always on, as it is up {waking.up_share:.1%} of the time, and an hour of that costs $"
        assert (why in kind_text(plan, found[MainKind.TO_ZERO])) == (ratio[per_hour] > 1)
        assert "dearer" not in kind_text(plan, found[MainKind.ALWAYS_ON])
        assert found[MainKind.TO_ZERO].cold_start_s > 240 and warm_s < 60  # a cold TTFT has the time of waking
    assert ratio[1.0] < 0.5 < 1 < ratio[20.0] and ratio[200.0] > 1
    assert woken[1.0] > 0.5 > woken[20.0] > woken[200.0]


def test_without_traffic_it_has_no_price(tmp_path: Path) -> None:
    profile = small(tmp_path / "p")
    with pytest.raises(UsageError, match="rented by the hour, so a request has no price without traffic"):
        make_plan(profile, only(MainKind.TO_ZERO), PlanRequest(n_in=100, n_out=100))
    plan = make_plan(profile, AWS, PlanRequest(n_in=100, n_out=100))
    assert plan.main.kind == MainKind.BY_USE and plan.workload.waking is None and plan.kinds == ()
    assert "waking" not in plan.model_dump_json() and "scales_to_zero" not in plan.model_dump_json()


def test_a_menu_of_such_instances_needs_its_table(tmp_path: Path) -> None:
    text = (Path(prices.__file__).parent.parent / "catalog" / "data" / "aws-us-east-1.toml").read_text()
    start = text.index("[zero]")
    (tmp_path / "c.toml").write_text(text[:start] + text[text.index("[[provenance]]", start) : text.index('[[provenance]]\nof = ["zero.')])
    with pytest.raises(UsageError, match=r"no table \[zero\]"):
        read_catalog(str(tmp_path / "c.toml"))
    (tmp_path / "d.toml").write_text(text.replace("usd_per_hour = 0.92552, ", "").replace("gpu_memory_mb = 24576, hardware", "hardware"))
    with pytest.raises(UsageError, match="usd_per_hour for every spec that scales to zero"):
        read_catalog(str(tmp_path / "d.toml"))


def test_a_main_function_waits_for_functions_only_while_it_is_up(tmp_path: Path) -> None:
    spec = MainSpec(name="gpu", memory_mb=1, usd_per_hour=1.0, scales_to_zero=True)
    problem = type("P", (), {"workload": type("W", (), {"cold_share": 0.4, "waking": Waking(wake_share=0.1, up_share=0.9)})()})
    assert main_function.late_functions(problem, spec) * 0.4 == pytest.approx(0.3)  # type: ignore[arg-type]
    always, by_use = spec.model_copy(update={"scales_to_zero": False}), MainSpec(name="l", memory_mb=1)
    assert [main_function.late_functions(problem, one) for one in (always, by_use)] == [1.0, 0.0]  # type: ignore[arg-type]
    assert [main_function.cold_share(problem, one) for one in (spec, always, by_use)] == [0.1, 0.0, 0.4]  # type: ignore[arg-type]


def test_the_solver_sees_the_same_times_as_the_cost_model(tmp_path: Path) -> None:
    """With functions that are cold more often than the main function, and with memory for few experts only."""
    profile = synthetic_profile(tmp_path / "p", layers=4, experts=8, expert_mb=1500.0, nonexpert_mb=900.0)
    problem = make_problem(profile, only(MainKind.TO_ZERO), PlanRequest(n_in=100, n_out=100, requests_per_hour=20.0))
    assert problem.workload.waking is not None and problem.workload.waking.wake_share < problem.workload.cold_share / 2
    for aim in (Aim("ttft"), Aim("tpot"), Aim("cost")):
        solution = solve(Task(problem, build_columns(problem, candidate_sets(problem)), aim), GAP, 60.0)
        assert solution is not None and any(layer.remote for layer in solution.placement.layers)
        assert solution.value == pytest.approx(aim.value(evaluate(problem, solution.placement)), rel=1e-9)


def test_no_request_may_wait_for_functions_beyond_its_time(tmp_path: Path) -> None:
    """Functions of many layers take longer to start than the main function: an answer that long is held to the limit with both."""
    profile = synthetic_profile(tmp_path / "p", layers=30, experts=8, expert_mb=1500.0, nonexpert_mb=900.0)
    catalog = only(MainKind.TO_ZERO)
    request = PlanRequest(n_in=100, n_out=100, requests_per_hour=20.0, solver="scan", examine=False)  # the exact solver takes two minutes
    problem, plan = make_problem(profile, catalog, request), make_plan(profile, catalog, request)
    placement = Placement(plan.main, plan.layers, plan.instances)
    own_s, both_s = cold_wait_s(problem, placement), longest_wait_s(problem, placement)
    assert both_s > 2 * own_s and verify(plan, profile, catalog) == ()
    # So much that with the main function's start alone it would be in time.
    room_s = catalog.zero.timeout_s + catalog.zero.wake_s - own_s if catalog.zero else 0.0
    n_out = int((room_s - 1) / plan.tpot_s)
    sized = Size(100, n_out)
    assert longest_s(problem, placement, plan.tpot_s, (sized,))[0] > 900 + 240 > own_s + n_out * plan.tpot_s

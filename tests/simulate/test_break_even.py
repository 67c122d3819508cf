"""The traffic up to which a plan is cheaper than what is always on, against closed forms, by burstiness."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import MainKind, Plan
from remoe_cli.plan.problem.request import problem_of
from remoe_cli.profile.record import Profile
from remoe_cli.simulate.break_even import BURSTINESS, LEAST_PER_HOUR, MOST_PER_HOUR, BreakEvenBursts, break_even, break_even_bursts
from remoe_cli.simulate.requests import Source, source_of_traffic
from tests.support import forked
from tests.support.synthetic import plan_of, synthetic_profile, tiny_catalog

Inputs = tuple[Plan, Profile, Catalog]


def inputs(path: Path, per_hour_usd: float, **function: float) -> Inputs:
    """A plan that is paid by use, beside an instance for so many USD an hour that holds all experts."""
    box = {"name": "box", "memory_mb": 6000, "vcpus": 2.0, "usd_per_hour": per_hour_usd}
    menu = [*(spec.model_dump() for spec in tiny_catalog().main.menu), box]
    profile, catalog = synthetic_profile(path, layers=2, experts=6), tiny_catalog({"menu": menu}, **function)
    plan = plan_of(profile, catalog, remote_share=0.5, requests_per_hour=1.0, n_in=50, n_out=40)
    assert plan.main.kind is MainKind.BY_USE
    return plan.model_copy(update={"baselines": {}}), profile, catalog  # no GPU holds the whole model


def source(given: Inputs) -> Source:
    return source_of_traffic(problem_of(*given).workload.traffic, None, 1.0)


def at(found: tuple[BreakEvenBursts, ...], burstiness: float) -> BreakEvenBursts:
    return next(one for one in found if one.burstiness == burstiness and not one.own)


def test_at_random_it_is_where_the_means_cost_the_same(tmp_path: Path) -> None:
    """Requests take so little time that none meets another: then a request costs what the plan says, whatever comes beside it."""
    given = inputs(tmp_path, 0.01, cold_start_s=0.0)
    _, profile, catalog = given
    warm = plan_of(profile, catalog, remote_share=0.5, requests_per_hour=1.0, n_in=50, n_out=40, cold_share=0.0)
    found = at(break_even_bursts(given, source(given)), 1.0)
    assert found.per_hour.mean == pytest.approx(0.01 / warm.cost_usd_per_request, rel=0.1)
    assert found.per_hour.least <= found.per_hour.mean <= found.per_hour.most and found.against is not None and "box" in found.against


def test_bursts_move_it_as_the_starts_that_they_save_or_cost(tmp_path: Path) -> None:
    """Requests that follow each other find warm functions; a request that finds another one running starts an instance of its own."""
    given = inputs(tmp_path, 0.02, idle_ttl_s=60.0)
    found = break_even_bursts(given, source(given))
    assert [one.burstiness for one in found] == list(BURSTINESS)
    plan, profile, catalog = given
    for burstiness in (0.5, 1.0, 3.0):
        one = at(found, burstiness)
        gaps_s = np.random.default_rng(3).gamma(1 / burstiness**2, burstiness**2, 400_000) * 3600 / one.per_hour.mean
        after_s = gaps_s - plan.ttft_s - 40 * plan.tpot_s
        cold = float((after_s >= catalog.function.idle_ttl_s).mean())
        same = plan_of(profile, catalog, remote_share=0.5, requests_per_hour=1.0, n_in=50, n_out=40, cold_share=cold)
        if float((after_s < 0).mean()) < 0.02:  # hardly any request meets another
            assert one.per_hour.mean * same.cost_usd_per_request == pytest.approx(0.02, rel=0.1), burstiness


def test_where_the_instance_is_cheap_or_dear_it_is_at_an_end(tmp_path: Path) -> None:
    dear = inputs(tmp_path, 1e9)
    plan, profile, catalog = dear
    menu = tuple(spec.model_copy(update={"usd_per_hour": spec.usd_per_hour and 1e-9}) for spec in catalog.main.menu)
    cheap = plan, profile, catalog.model_copy(update={"main": catalog.main.model_copy(update={"menu": menu})})
    for given, end in ((cheap, LEAST_PER_HOUR), (dear, MOST_PER_HOUR)):
        assert [one.per_hour.mean for one in break_even_bursts(given, source(given))] == pytest.approx([end] * len(BURSTINESS))


def test_the_times_of_a_trace_have_a_point_of_their_own(tmp_path: Path) -> None:
    """A trace that is drawn with burstiness 2 has the break-even traffic of that burstiness."""
    given = inputs(tmp_path, 0.02, idle_ttl_s=60.0)
    drawn, count = source(given), 4000
    gaps_s = np.random.default_rng(0).gamma(0.25, 4.0, count)
    trace = replace(drawn, gaps_s=gaps_s, n_in=np.full(count, 50), n_out=np.full(count, 40), burstiness=None)
    found = break_even_bursts(given, trace)
    own = found[-1]
    assert own.own and own.burstiness == pytest.approx(2.0, rel=0.05)
    assert own.per_hour.mean == pytest.approx(at(found, 2.0).per_hour.mean, rel=0.15)


def test_without_an_instance_or_without_functions_there_is_none(tmp_path: Path) -> None:
    profile, catalog = synthetic_profile(tmp_path, layers=2, experts=6), tiny_catalog()
    plan = plan_of(profile, catalog, remote_share=0.5, requests_per_hour=1.0).model_copy(update={"baselines": {}})
    assert break_even_bursts((plan, profile, catalog), source((plan, profile, catalog))) == ()
    given = inputs(tmp_path / "b", 0.02)
    local = plan_of(given[1], given[2], requests_per_hour=4000.0)
    assert local.main.kind is MainKind.ALWAYS_ON and not any(layer.remote for layer in local.layers)
    assert break_even_bursts((local, *given[1:]), source(given)) == ()


def test_it_says_how_long_requests_wait_there(tmp_path: Path) -> None:
    given = inputs(tmp_path, 0.02)
    found = break_even_bursts(given, source(given))
    for one in found:
        assert 0 < one.ttft_s[0] <= one.ttft_s[1] and 0 < one.against_ttft_s[0] <= one.against_ttft_s[1]
    assert not any(math.isnan(each) for one in found for each in one.ttft_s)
    assert at(found, 6.0).per_hour.mean < 0.7 * at(found, 1.0).per_hour.mean  # a request that meets another one starts more


def test_requests_of_one_kind_have_the_point_that_all_of_them_have(tmp_path: Path) -> None:
    given = inputs(tmp_path, 0.02, idle_ttl_s=60.0)
    for burstiness in (1.0, 3.0):
        one = break_even(given, replace(source(given), burstiness=burstiness))
        assert one is not None
        assert one.per_hour.mean == pytest.approx(at(break_even_bursts(given, source(given)), burstiness).per_hour.mean)
    local = plan_of(given[1], given[2], requests_per_hour=4000.0)
    assert break_even((local, *given[1:]), source(given)) is None


def test_the_command_draws_the_line(tmp_path: Path) -> None:
    synthetic_profile(tmp_path / "profile", layers=2, experts=4, expert_mb=40)
    asked = (str(tmp_path / "plan.json"), "--requests-per-hour", "3", "--requests", "50", "--seeds", "1")
    forked.document("plan", str(tmp_path / "profile"), "-o", asked[0], "--catalog", "aws-us-east-1", "--requests-per-hour", "3")
    line = forked.document("simulate", *asked, "--burstiness", "3")["break_even"]
    assert line["cheaper"] == "below" and line["burstiness"] == 3.0 and not line["of_trace"]
    shown = " ".join(forked.remoe("simulate", *asked, "--burstiness", "3").stdout.split())
    found = re.search(
        r"\(burstiness 3\), this plan costs less than what is always on up to ([\d,]+) requests an hour: .* Above, (.*) costs less",
        shown,
    )
    assert found and float(found[1].replace(",", "")) == pytest.approx(line["requests_per_hour"]["mean"], rel=0.01)
    assert found[2] == line["against"]

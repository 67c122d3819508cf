"""Hard limits hold for every request that a plan is for, whichever solver made it; the longest ones decide, not means."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe_cli.errors import InfeasibleError, UsageError
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import Plan, Served, WorkloadRef
from remoe_cli.plan.explain.rows import served_texts
from remoe_cli.plan.problem.request import PlanRequest, make_problem
from remoe_cli.plan.problem.sizes import Sizes, sizes_of
from remoe_cli.plan.problem.trace_traffic import read_traffic
from remoe_cli.plan.problem.traffic import Traffic
from remoe_cli.plan.problem.workload import from_profile
from remoe_cli.plan.solve.given import read_placement
from remoe_cli.plan.verify.check import verify
from remoe_cli.profile.record import Profile
from remoe_cli.runtime.server_config import ServerConfig
from tests.support.synthetic import plan_of, synthetic_profile, tiny_catalog

SOLVERS = ("exact", "scan", "paper")


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return synthetic_profile(tmp_path_factory.mktemp("profile"), layers=2, experts=8, skew=1.5, expert_mb=60, hidden_size=2048)


def trace(path: Path, *rows: tuple[int, int, float]) -> Path:
    path.write_text("n_in,n_out,weight\n" + "".join(f"{n_in},{n_out},{weight}\n" for n_in, n_out, weight in rows))
    return path


def holds_alone(plan: Plan, profile: Profile, catalog: Catalog, folder: Path, n_in: int, n_out: int) -> None:
    """Price the plan's placement for one request: raises where it does not fit."""
    (folder / "placement.json").write_text(json.dumps({"main": plan.main.name, "layers": plan.model_dump(mode="json")["layers"]}))
    alone = make_problem(profile, catalog, PlanRequest(n_in=n_in, n_out=n_out))
    read_placement(folder / "placement.json", alone)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("limit", "main", "function"),
    [
        ("main memory", {"menu": [{"name": f"m{mb}", "memory_mb": mb, "vcpus": 2.0} for mb in (1600, 1750, 1900, 2100, 4000)]}, {}),
        ("payload", {}, {"payload_limit_bytes": 4_000_000, "memory_menu_mb": [256, 512, 1024]}),
        ("function memory", {}, {"memory_menu_mb": [256, 300, 400, 512, 1024]}),
        ("time", {"timeout_s": 30.0}, {"cold_start_s": 0.1}),
    ],
)
def test_one_long_request_among_many_short_ones_is_held(
    limit: str, main: dict[str, Any], function: dict[str, Any], solver: str, profile: Profile, tmp_path: Path
) -> None:
    """One request of a hundred has forty times the tokens of the others."""
    catalog = tiny_catalog({"cold_start_s": 1.0} | main, **function)
    traffic = read_traffic(trace(tmp_path / "t.csv", (100, 50, 99), (4000, 100, 1)))
    plan = plan_of(profile, catalog, traffic=traffic, solver=solver)
    assert plan.workload.longest == ((4000, 100),) and plan.workload.n_in < 200
    holds_alone(plan, profile, catalog, tmp_path, 4000, 100)
    assert verify(plan, profile, catalog, traffic.sizes.rows()) == ()


@pytest.mark.parametrize("solver", SOLVERS)
def test_long_answers_end_before_the_platform_ends_them(solver: str, profile: Profile, tmp_path: Path) -> None:
    """A quarter of the answers is eighty times as long as the others; the mean of all would be in time on the cheapest main function."""
    menu = [{"name": "slow", "memory_mb": 2000, "vcpus": 1.0}, {"name": "fast", "memory_mb": 8000, "vcpus": 2.0}]
    main = {"menu": menu, "cold_start_s": 0.0, "load_bytes_per_s": 1e15}
    traffic = read_traffic(trace(tmp_path / "t.csv", (100, 100, 3), (200, 8000, 1)))
    free, fast = (
        plan_of(profile, tiny_catalog(main), traffic=traffic, solver=s, objective=o) for s, o in ((solver, "cost"), ("exact", "tpot"))
    )
    mean_s, longest_s = (free.ttft_s + n_out * free.tpot_s for n_out in (free.workload.n_out, 8000))
    limit_s = 1.05 * (fast.ttft_s + 8000 * fast.tpot_s)
    assert mean_s < limit_s < longest_s
    catalog = tiny_catalog(main | {"timeout_s": limit_s})
    if solver == "paper":  # it takes the smallest main function that holds the experts, however slow
        with pytest.raises(InfeasibleError, match="finds no plan that meets"):
            plan_of(profile, catalog, traffic=traffic, solver=solver)
        return
    plan = plan_of(profile, catalog, traffic=traffic, solver=solver)
    assert plan.ttft_s + 8000 * plan.tpot_s < limit_s and verify(plan, profile, catalog, traffic.sizes.rows()) == ()
    findings = verify(free.model_copy(update={"catalog": plan.catalog}), profile, catalog)
    assert any(f.field == "main" and "200 prompt + 8001 output tokens takes" in f.found for f in findings)
    with pytest.raises(
        InfeasibleError, match=r"request of 200 prompt \+ 8,001 output tokens that finds all cold before it is ended: it has 9 s"
    ):
        plan_of(profile, tiny_catalog(main | {"timeout_s": 9.0}), traffic=traffic, solver=solver)


LENGTHS = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 2000), st.integers(1, 50)), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.sampled_from(SOLVERS), st.integers(0, 2**31), st.booleans())
def test_no_plan_breaks_a_limit_for_a_request_that_it_covers(
    profile: Profile, rows: list[tuple[int, int, int]], solver: str, seed: int, rented: bool
) -> None:
    random = np.random.default_rng(seed)
    menu: list[dict[str, Any]] = [{"name": f"m{mb}", "memory_mb": mb, "vcpus": mb / 1769} for mb in (900, 1300, 1800, 2400, 4000)]
    menu += [{"name": "box", "memory_mb": 4000, "vcpus": 2.0, "usd_per_hour": 0.05}] if rented else []
    catalog = tiny_catalog(
        {"menu": menu, "timeout_s": float(random.choice([20, 60, 900])), "rented_timeout_s": float(random.choice([10, 480]))}
        | {"cold_start_s": float(random.choice([0.0, 8.0]))},
        memory_menu_mb=[256, 512, 1024],
        max_replicas=int(random.integers(1, 4)),
        payload_limit_bytes=int(random.choice([1e6, 4e6, 6e7])),
        timeout_s=float(random.choice([40, 900])),
    )
    weight = sum(weight for *_, weight in rows)
    sizes = sizes_of(tuple((weight_of / weight, n_in, n_out) for n_in, n_out, weight_of in rows))
    kinds = read_kinds(rows)
    traffic = replace(kinds, requests=replace(sizes, longest=kinds.sizes.front), per_hour=float(random.choice([2.0, 50.0])))
    try:
        plan = plan_of(profile, catalog, traffic=traffic, solver=solver)
    except InfeasibleError:
        return
    assert verify(plan, profile, catalog, sizes.rows()) == ()


def read_kinds(rows: list[tuple[int, int, int]]) -> Traffic:
    """The kinds that `read_traffic` makes of such a file."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return read_traffic(trace(Path(folder) / "t.csv", *rows))


def test_the_verifier_names_a_request_that_is_not_covered(profile: Profile, tmp_path: Path) -> None:
    catalog = tiny_catalog()
    traffic = read_traffic(trace(tmp_path / "t.csv", (100, 50, 1), (50, 200, 1)))
    plan = plan_of(profile, catalog, traffic=traffic)
    assert plan.workload.longest == ((50, 200), (100, 150))  # what the deployment takes for its three numbers: 250 tokens in all
    for longer in ((0.1, 101, 1), (0.1, 1, 201), (0.1, 51, 151)):
        assert "workload.longest" in {f.field for f in verify(plan, profile, catalog, [*traffic.sizes.rows(), longer])}


# A share of the requests


@pytest.mark.parametrize(
    ("cover", "served"),
    [
        (1.0, Served(cover=1.0, share=1.0, tokens=4100, n_in=4000, n_out=300)),
        (0.995, Served(cover=0.995, share=1.0, tokens=4100, n_in=4000, n_out=300)),
        (0.99, Served(cover=0.99, share=0.99, tokens=400, n_in=100, n_out=300)),
        (0.9, Served(cover=0.9, share=0.9, tokens=150, n_in=100, n_out=50)),
        (0.5, Served(cover=0.5, share=0.9, tokens=150, n_in=100, n_out=50)),
    ],
)
def test_the_longest_requests_are_left_out(cover: float, served: Served, profile: Profile, tmp_path: Path) -> None:
    path = trace(tmp_path / "t.csv", (100, 50, 90), (100, 300, 9), (4000, 100, 1))
    traffic = read_traffic(path, cover)
    assert traffic.served == served
    plan = plan_of(profile, tiny_catalog(), traffic=traffic)
    assert plan.workload.served == served and max(map(sum, plan.workload.longest)) == served.tokens
    assert verify(plan, profile, tiny_catalog(), traffic.sizes.rows()) == ()


def test_requests_that_are_refused_do_not_make_a_plan_dearer(profile: Profile, tmp_path: Path) -> None:
    path = trace(tmp_path / "t.csv", (100, 50, 99), (4000, 100, 1))
    whole, most = (plan_of(profile, tiny_catalog(), traffic=read_traffic(path, cover)) for cover in (1.0, 0.99))
    assert most.cost_usd_per_request < whole.cost_usd_per_request and most.workload.n_in == 100


def test_a_share_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--cover is 0, not a share above 0"):
        read_traffic(trace(tmp_path / "t.csv", (100, 50, 1)), 0.0)


@pytest.mark.parametrize(
    ("prompt", "new", "refused"), [(100, 51, False), (100, 52, True), (101, 10, True), (20, 51, False), (20, 52, True)]
)
def test_a_deployment_refuses_what_its_plan_does_not_hold_for(prompt: int, new: int, refused: bool) -> None:
    """The first new token is none of the further ones, so 100 + 50 tokens are a prompt of 100 and 51 new ones."""
    config = ServerConfig.model_construct(served=Served(cover=0.9, share=0.9, tokens=150, n_in=100, n_out=50))
    if not refused:
        return config.refuse_unserved(prompt, new)
    with pytest.raises(UsageError, match=r"serves requests of up to 151 tokens in all, with prompts of up to 100"):
        config.refuse_unserved(prompt, new)


def test_where_the_lengths_are_typical_ones_nothing_is_refused() -> None:
    ServerConfig.model_construct(served=None).refuse_unserved(10**6, 10**6)


def test_a_request_that_is_longer_than_the_context_is_told(profile: Profile, tmp_path: Path) -> None:
    record = profile.record.model_copy(update={"spec": profile.record.spec.model_copy(update={"context_tokens": 4096})})
    short = replace(profile, record=record)
    from_profile(short, 4000, 95)
    with pytest.raises(InfeasibleError, match=r"4,096 positions, and a request of 4,000 prompt \+ 97 output tokens needs 4,097"):
        from_profile(short, 4000, 96)
    path = trace(tmp_path / "t.csv", (100, 50, 99), (4000, 100, 1))
    with pytest.raises(InfeasibleError, match="needs 4,101") as raised:
        from_profile(short, traffic=read_traffic(path))
    assert "--cover" in raised.value.hint
    from_profile(short, traffic=read_traffic(path, 0.99))


# Percentiles


def spread_by_hand(values: list[tuple[float, float]], share: float) -> float:
    reached = 0.0
    for value, part in sorted(values):
        reached += part
        if reached >= share - 1e-12:
            return value
    raise AssertionError


@pytest.mark.parametrize("cold", [0.0, 0.03, 0.5])
def test_what_shares_of_the_requests_take(cold: float, profile: Profile, tmp_path: Path) -> None:
    catalog = tiny_catalog({"cold_start_s": 2.0})
    rows = [(50 * (1 + i), 5 + (7 * i) % 90, 5.0) for i in range(20)]
    traffic = replace(read_traffic(trace(tmp_path / "t.csv", *rows)), per_hour=20.0)
    plan = plan_of(profile, catalog, traffic=traffic, cold_share=cold, remote_share=0.5)
    placement = tmp_path / "p.json"
    placement.write_text(json.dumps({"main": plan.main.name, "layers": plan.model_dump(mode="json")["layers"]}))
    alone = {n: plan_of(profile, catalog, n_in=n, n_out=10, placement_file=placement).ttft_s for n, _, _ in rows}
    wait_s = 2.0 + (200 * 2**20 + 8 * 60 * 2**20) / catalog.main.load_bytes_per_s
    parts = ((0.0, 1 - cold), (wait_s, cold))
    for index, share in enumerate((0.5, 0.95, 0.99)):
        ttft = [(alone[n] + late, part / 20) for n, _, _ in rows for late, part in parts if part]
        whole = [
            (alone[n] + late + out * plan.tpot_s, part / 20)
            for n, out, _ in rows
            for late, part in ((0.0, 1 - cold), (wait_s, cold))
            if part
        ]
        found = plan.spread[index]
        assert (found.share, found.ttft_s, found.total_s) == (
            share,
            pytest.approx(spread_by_hand(ttft, share)),
            pytest.approx(spread_by_hand(whole, share)),
        )
    assert verify(plan, profile, catalog, traffic.sizes.rows()) == ()
    for name in ("ttft_s", "total_s"):
        off = [one.model_copy(update={name: getattr(one, name) * 1.2}) if one.share == 0.95 else one for one in plan.spread]
        altered = plan.model_copy(update={"spread": tuple(off)})
        assert f"spread[1].{name}" in {f.field for f in verify(altered, profile, catalog, traffic.sizes.rows())}


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_ttft_binds_the_mean_or_a_percentile(solver: str, profile: Profile, tmp_path: Path) -> None:
    """Nine of ten prompts are short. A target that the mean keeps is not what the longest tenth keeps."""
    catalog = tiny_catalog({"menu": [{"name": f"m{mb}", "memory_mb": mb, "vcpus": mb / 1769} for mb in (1300, 1800, 2400, 3500)]})
    traffic = read_traffic(trace(tmp_path / "t.csv", *((50 + i, 10, 1) for i in range(90)), *((2000 + i, 10, 1) for i in range(10))))
    free = plan_of(profile, catalog, traffic=traffic, solver=solver)
    target_s = free.ttft_s * 1.01
    plans = {p: plan_of(profile, catalog, traffic=traffic, solver=solver, ttft_s=target_s, ttft_percentile=p) for p in (None, 50.0, 90.0)}
    for percentile, plan in plans.items():
        assert verify(plan, profile, catalog, traffic.sizes.rows()) == ()
        assert plan.outcome.held_ttft_s <= target_s * (1 + 1e-9)
        assert (plan.targets.ttft_at is None) == (percentile is None)
    assert plans[90.0].targets.ttft_at.n_in == 139 and plans[90.0].spread[0].ttft_s <= target_s  # type: ignore[union-attr]
    with pytest.raises(InfeasibleError, match="No plan meets a TTFT"):
        plan_of(profile, catalog, traffic=traffic, solver="exact", ttft_s=free.spread[0].ttft_s / 4, ttft_percentile=100.0)


def test_cold_requests_may_be_late_where_the_warm_ones_are_enough(profile: Profile) -> None:
    for cold, percentile, at in ((0.1, 90, (40, False)), (0.1, 95, (40, True)), (0.0, 99, (40, False))):
        plan = plan_of(profile, tiny_catalog(), cold_share=cold, objective="ttft", ttft_percentile=float(percentile))
        found = plan.targets.ttft_at
        assert found is not None and (found.n_in, found.cold) == at
        assert verify(plan, profile, tiny_catalog()) == ()


def test_a_front_is_what_no_other_request_exceeds() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        n_in, n_out = random.integers(1, 20, size=(2, 30))
        front = Sizes(n_in, n_out, np.full(30, 1 / 30)).front
        pairs = set(zip(n_in.tolist(), n_out.tolist(), strict=True))
        beaten = {p for p in pairs if any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in pairs)}
        assert list(front) == sorted(pairs - beaten)


@pytest.mark.parametrize("further", [50, 1])
def test_the_screen_and_the_refusal_name_one_length(further: int) -> None:
    """A request of 100 + 50 tokens has 151 with the first token of its answer: both say so."""
    served = Served(cover=0.9, share=0.9, tokens=100 + further, n_in=100, n_out=further)
    plan = Plan.model_construct(workload=WorkloadRef(n_in=100, n_out=further, served=served))
    (text,) = served_texts(plan)
    assert f"requests of up to {101 + further} tokens, with prompts of up to 100" in text
    with pytest.raises(UsageError, match=f"serves requests of up to {101 + further} tokens in all"):
        ServerConfig.model_construct(served=served).refuse_unserved(100, further + 2)

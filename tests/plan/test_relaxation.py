"""What bounds and plans are made of: the growing linear programme, columns that stand for others, rounding, and exchanges of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.problem.aim import Aim, meets
from remoe_cli.plan.problem.problem import Placement
from remoe_cli.plan.solve.columns import build_columns
from remoe_cli.plan.solve.exact import bound_node
from remoe_cli.plan.solve.local_search import improve
from remoe_cli.plan.solve.master_lp import RestrictedMaster
from remoe_cli.plan.solve.node import Node
from remoe_cli.plan.solve.rounding import polished, repaired, rounded
from remoe_cli.plan.solve.scan import scan
from tests.plan.test_exact import all_columns, instance
from tests.support.synthetic import problem_of, synthetic_profile, tiny_catalog


def test_a_growing_programme_by_hand() -> None:
    """Two layers whose columns cost 1 for 0.8 of the limit, or 3 for 0.2: one of each is best, at 2 / 0.6 for a unit of the limit."""
    lp = RestrictedMaster(1, 2, 1e3)
    c, rows, layer = np.array([1.0, 3.0, 1.0, 3.0]), np.array([[0.8, 0.2, 0.8, 0.2]]), np.array([0, 0, 1, 1])
    lp.add(c[[0, 2]], rows[:, [0, 2]], layer[[0, 2]])
    assert lp.solve() == (pytest.approx(2 + 600), pytest.approx([1e3]), pytest.approx([1, 1]))  # 0.6 over the limit, at its penalty
    lp.add(c[[1, 3]], rows[:, [1, 3]], layer[[1, 3]])
    value, u, x = lp.solve() or (0, 0, 0)
    assert (value, u, np.sum(x)) == (pytest.approx(4), pytest.approx([2 / 0.6]), pytest.approx(2))
    lp.add(np.array([1.5]), np.array([[0.3]]), np.array([0]))  # leaves 0.7 to the other layer: 5/6 of its cheap column
    assert lp.solve() == (pytest.approx(1.5 + 5 / 6 + 3 / 6), pytest.approx([2 / 0.6]), pytest.approx([0, 5 / 6, 0, 1 / 6, 1]))


@pytest.mark.parametrize("seed", [2, 5])
def test_a_merged_column_is_as_good_as_the_best_it_stands_for(seed: int, tmp_path: Path) -> None:
    """Two kinds of requests and divided layers; replicas that are cheaper than one, as each keeps within its CPU quota."""
    problem = instance(seed, tmp_path)[1]
    columns = all_columns(problem)
    merged, firsts = columns.merged()
    assert len(firsts) < len(columns.layer)
    decode_s, least_s = (each.decode_s(problem, problem.menu[:1]) for each in (columns, merged))
    assert (columns.functions > 1).any() if seed == 2 else (merged.bill_usd < columns.bill_usd[firsts]).any()
    for at, (first, end) in enumerate(zip(firsts, np.append(firsts[1:], len(columns.layer)), strict=True)):
        same = [(columns.layer[i], columns.at_set[i], columns.memory_mb[i], columns.count[i]) for i in range(first, end)]
        assert set(same) == {(merged.layer[at], merged.at_set[at], merged.memory_mb[at], merged.count[at])}
        assert merged.zt_s[:, at].tolist() == columns.zt_s[:, first:end].min(axis=1).tolist()
        assert merged.bill_usd[at] == columns.bill_usd[first:end].min()
        assert merged.start_s[at] == columns.start_s[first:end].min()
        assert set(merged.decode_at[:, at]) == set(columns.decode_at[0, first:end])
        assert least_s[at] == decode_s[first:end].min()
    assert (firsts[merged.starts] == columns.starts).all()


def test_nothing_is_priced_where_no_main_function_holds_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile, priced = synthetic_profile(tmp_path / "profile", experts=6), list[object]()
    monkeypatch.setattr(
        "remoe_cli.plan.solve.scan.build_columns", lambda *some, **more: priced.append(some) or build_columns(*some, **more)
    )
    for memory_mb in (100, 5000):
        menu = [{"name": "only", "memory_mb": memory_mb, "vcpus": 1.0}]
        found = scan(problem_of(profile, tiny_catalog({"menu": menu}), n_in=20, n_out=10), Aim())
        assert (found is None, bool(priced)) == ((True, False) if memory_mb == 100 else (False, True))


def some_node(seed: int, layers: int, width: int, limits: int) -> Node:
    """Random columns, where what costs less uses more of each limit, and all limits bind."""
    random = np.random.default_rng(seed)
    layer = np.repeat(np.arange(layers, dtype=np.int32), width)
    c = random.uniform(1, 2, size=layers * width)
    rows = random.uniform(0.5, 1.5, size=(limits, layers * width)) / c / (0.75 * layers)
    starts, names = np.arange(layers) * width, tuple(map(str, range(limits)))
    return Node(np.arange(layers * width), starts, layer, 0.0, 1.0, c, rows, names, (1.0,) * limits)


@pytest.mark.parametrize(("limits", "above"), [(1, 0.01), (2, 0.02), (4, 0.06)])
def test_rounded_plans_meet_the_limits_and_are_near_the_bound(limits: int, above: float) -> None:
    done = 0
    for seed in range(20):
        node = some_node(seed, 40, 12, limits)
        bound = bound_node(node)
        mixed = len(bound.pool) - 40  # columns beside one of each layer
        assert 1 <= mixed <= limits
        found = rounded(node, bound.pool)
        assert found is not None and (node.layer[found] == np.arange(40)).all() and node.meets(found)
        assert bound.lower <= node.value(found) <= bound.lower * (1 + above)
        done += node.value(polished(node, found)) == node.value(found)
    assert done >= 18


def test_repairs_and_polish_go_one_way() -> None:
    gains = 0
    for seed in range(20):
        node = some_node(seed, 10, 6, 2)
        cheapest = node.cheapest(node.c)
        assert not node.meets(cheapest)
        mended = repaired(node, cheapest)
        assert mended is not None and node.meets(mended)
        better = polished(node, mended)
        assert node.meets(better) and node.value(better) <= node.value(mended)
        gains += node.value(better) < node.value(mended)
    assert gains > 10
    hopeless = Node(node.at, node.starts, node.layer, 0.0, 1.0, node.c, node.rows * 10, node.names, node.limits)
    assert repaired(hopeless, cheapest) is None and rounded(hopeless, cheapest) is None


def test_exchanges_keep_sizes_and_limits_and_cost_what_is_said(tmp_path: Path) -> None:
    gains = []
    menu = [{"name": f"m{mb}", "memory_mb": mb, "vcpus": mb / 1769} for mb in range(768, 5000, 256)]
    catalog = tiny_catalog({"menu": menu}, memory_menu_mb=list(range(128, 2049, 128)))
    shape: dict[str, Any] = {"layers": 3, "experts": 12, "skew": 2.0, "expert_mb": 100, "main_vcpus": 1, "remote_expert": (1e-4, 1e-5)}
    for seed in (1, 2, 3):
        problem = problem_of(synthetic_profile(tmp_path / str(seed), seed=seed, **shape), catalog)
        free, least = scan(problem, Aim()), scan(problem, Aim("tpot"))
        assert free is not None and least is not None
        aim = Aim(tpot_s=(evaluate(problem, Placement(free.main.spec, free.layers)).tpot_s + least.value) / 2)
        found = scan(problem, aim)
        assert found is not None
        better = improve(problem, aim, found)
        outcome = evaluate(problem, Placement(better.main.spec, better.layers))
        assert meets(aim, outcome) and outcome.cost_usd_per_request == pytest.approx(better.value, rel=1e-12)
        for layer, other in zip(found.layers, better.layers, strict=True):
            assert len(layer.remote) == len(other.remote) and len(set(layer.remote) - set(other.remote)) <= 1
        gains.append(1 - better.value / found.value)
    assert min(gains) >= 0 and max(gains) > 1e-3, gains

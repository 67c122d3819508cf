"""The timeout of each expert function: what its longest call takes, with room, by hand and at the platform's limit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.errors import InfeasibleError
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import Lengths
from remoe_cli.plan.problem.traffic import Traffic
from remoe_cli.plan.verify.check import verify
from remoe_cli.profile.record import Profile
from tests.support.synthetic import plan_of, synthetic_profile, tiny_catalog

FUNCTION: dict[str, Any] = {"memory_menu_mb": [1769], "max_replicas": 1, "cold_start_s": 2.0, "load_bytes_per_s": 20.0 * 2**20}
WIRE: dict[str, Any] = {"warm_unbilled_s": 0.25, "warm_billed_s": 0.75, "network_bytes_per_s": 2 * 2048 * 1000.0, "wire_expansion": 1.0}


def slow(path: Path, per_token_s: float) -> Profile:
    """Four experts of 20 MB; each takes so long for a token at one vCPU."""
    return synthetic_profile(path, layers=1, experts=4, top_k=2, prompts=4, remote_expert=(0.0, per_token_s), decode_tokens=60)


def catalog(**update: Any) -> Catalog:
    return tiny_catalog(**(FUNCTION | WIRE | update))


@pytest.mark.parametrize(("per_token_s", "n_in"), [(0.001, 10), (0.05, 40), (0.1, 500), (0.1, 1000)])
def test_a_timeout_is_the_start_and_four_times_the_longest_call(per_token_s: float, n_in: int, tmp_path: Path) -> None:
    profile, prices = slow(tmp_path, per_token_s), catalog()
    plan = plan_of(profile, prices, remote_share=1.0, n_in=n_in, n_out=5)
    rows = 2 * n_in  # each token goes to two of the four experts, and all are in one function
    call_s = 1.0 + rows * per_token_s + rows / 1000
    start_s = 2.0 + 4.0  # four experts of 20 MB at 20 MB a second
    assert [layer.timeout_s for layer in plan.layers] == [max(30, math.ceil(start_s + 4 * call_s - 1e-6))]
    assert verify(plan, profile, prices) == ()


def test_the_longest_request_sets_it_and_not_the_mean(tmp_path: Path) -> None:
    profile, prices = slow(tmp_path, 0.05), catalog()
    rare = Traffic((Lengths(share=0.99, n_in=10, n_out=5), Lengths(share=0.01, n_in=1000, n_out=5)))
    assert plan_of(profile, prices, remote_share=1.0, traffic=rare).layers == (
        plan_of(profile, prices, remote_share=1.0, n_in=1000, n_out=5).layers
    )


def test_where_nothing_is_remote_there_is_none(tmp_path: Path) -> None:
    plan = plan_of(slow(tmp_path, 0.05), catalog(), remote_share=0.0)
    assert [layer.timeout_s for layer in plan.layers] == [0]


@pytest.mark.parametrize("solver", ["exact", "scan"])
def test_no_function_needs_longer_than_the_platform_lets_it(solver: str, tmp_path: Path) -> None:
    """With all experts in one function, the longest call of a prompt needs more than 480 s; with fewer, the others are local."""
    profile = slow(tmp_path, 0.06)
    menu = {"menu": [{"name": "m1000", "memory_mb": 1000, "vcpus": 1.0}]}
    for limit_s in (900.0, 500.0, 300.0, 60.0):
        prices = tiny_catalog(menu, **(FUNCTION | WIRE | {"timeout_s": limit_s}))
        plan = plan_of(profile, prices, solver=solver, n_in=1000, n_out=5)
        assert all(layer.timeout_s <= limit_s for layer in plan.layers)
        assert verify(plan, profile, prices) == ()
    with pytest.raises(InfeasibleError, match=r"time of expert functions is too short: with 1000 prompt tokens .* more than 300 s"):
        plan_of(profile, tiny_catalog(menu, **(FUNCTION | WIRE | {"timeout_s": 300.0})), remote_share=1.0, n_in=1000, n_out=5)


@pytest.mark.parametrize("stated", [0, 29, 31, 900])
def test_the_verifier_names_another_timeout(stated: int, tmp_path: Path) -> None:
    profile, prices = slow(tmp_path, 0.001), catalog()
    plan = plan_of(profile, prices, remote_share=1.0, n_in=10, n_out=5)
    altered = plan.model_copy(update={"layers": tuple(layer.model_copy(update={"timeout_s": stated}) for layer in plan.layers)})
    assert "layers[0].timeout_s" in {finding.field for finding in verify(altered, profile, prices)}

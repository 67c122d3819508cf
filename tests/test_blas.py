"""A plan is computed in one thread, and what comes after it has as many as before."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from remoe_cli.plan import build
from remoe_cli.plan.assess import frontier
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.request import PlanRequest, problem_of
from remoe_cli.plan.verify import check
from remoe_cli.progress import no_report
from tests.support.synthetic import synthetic_profile, tiny_catalog


def test_a_plan_and_what_checks_it_have_one_thread_for_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library says how many it has while each of them runs, and afterwards as many as before."""
    found: dict[str, int] = {}

    def watched(module: ModuleType, name: str) -> None:
        kept = getattr(module, name)

        def watching(*arguments: Any, **named: Any) -> Any:
            found[module.__name__.rpartition(".")[2]] = products()
            return kept(*arguments, **named)

        monkeypatch.setattr(module, name, watching)

    def products() -> int:
        return max(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")

    for module, name in ((build, "best_form"), (check, "verifier_inputs"), (frontier, "scan")):
        watched(module, name)
    with threadpool_limits(2, user_api="blas"):
        assert products() == 2
        profile, catalog = synthetic_profile(tmp_path, layers=2, experts=4), tiny_catalog()
        plan = build.make_plan(profile, catalog, PlanRequest(requests_per_hour=2.0))
        assert check.verify(plan, profile, catalog) == ()
        assert frontier.scanned_frontier(problem_of(plan, profile, catalog), Aim(), no_report)
        assert found == {"build": 1, "check": 1, "frontier": 1} and products() == 2

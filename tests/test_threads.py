"""Threads that compute: how OpenMP's wait, unless the user says otherwise, and how many numpy has for a plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from remoe_cli import lambda_limits, threads
from remoe_cli.plan import build
from remoe_cli.plan.assess import frontier
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.request import PlanRequest, problem_of
from remoe_cli.plan.verify import check
from remoe_cli.progress import no_report
from remoe_cli.runtime import container
from tests.support.synthetic import synthetic_profile, tiny_catalog

SHOW = """
import json, os, sys
from remoe_cli.cli import app
app.run = lambda: print(json.dumps(dict(os.environ))) or 0
app.main()
"""


@pytest.mark.parametrize(
    ("chosen", "found"),
    [({}, ("1000", None)), ({"OMP_WAIT_POLICY": "ACTIVE"}, (None, "ACTIVE")), ({"GOMP_SPINCOUNT": "7"}, ("7", None))],
    ids=["remoe's", "a policy", "a count"],
)
def test_the_command_line_sets_how_threads_wait_unless_the_user_has(chosen: dict[str, str], found: tuple[str | None, str | None]) -> None:
    rest = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", SHOW], env=rest | chosen, capture_output=True, text=True, check=True)
    environment = json.loads(done.stdout)
    assert (environment.get("GOMP_SPINCOUNT"), environment.get("OMP_WAIT_POLICY")) == found


def test_a_container_waits_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "REMOE_MAIN"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    with pytest.raises(SystemExit):
        container.main(["serve"])  # without its files it goes no further
    assert os.environ["GOMP_SPINCOUNT"] == threads.WAITS["GOMP_SPINCOUNT"]


def test_functions_wait_as_the_main_process_does() -> None:
    assert lambda_limits.thread_environment(3600).items() >= threads.WAITS.items()


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

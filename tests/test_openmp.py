"""How OpenMP's threads wait: in every process that computes as in this one, unless the user says otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from remoe_cli import lambda_limits, openmp
from remoe_cli.runtime import container

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
    assert os.environ["GOMP_SPINCOUNT"] == openmp.WAITS["GOMP_SPINCOUNT"]


def test_functions_wait_as_the_main_process_does() -> None:
    assert lambda_limits.thread_environment(3600).items() >= openmp.WAITS.items()

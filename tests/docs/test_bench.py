"""`make bench`: its script runs as it stands, on the real model and the twin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


@pytest.mark.nightly
def test_batching_prints_its_table(tmp_path: Path) -> None:
    small = ("--models", "demo", "--clients", "2", "--tokens", "8", "--rounds", "1")
    environment = os.environ | {"REMOE_STATE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "docs/measure/batching.py"), *small]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    alone, together = (line.split() for line in run.stdout.splitlines() if line.startswith("demo"))
    assert (alone[1], together[1]) == ("1", "2") and int(alone[6]) > int(together[6]) > 0  # calls of the hook

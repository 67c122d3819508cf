"""Asking make what it would do, whether or not make runs the tests."""

from __future__ import annotations

import os
from subprocess import CompletedProcess, run

from tests.support.paths import ROOT


def make(*arguments: str) -> CompletedProcess[str]:
    """Run make in the repository without the settings of a make that runs these tests."""
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "T")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    return run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

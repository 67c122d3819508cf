"""Make, pre-commit and CI run the same checks, and `make help` lists every target."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tests.docs.make import make
from tests.support.paths import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def dry_run(target: str) -> list[str]:
    """The commands of a target, when everything is installed."""
    return make("-n", "-o", ".venv/.installed", target).stdout.splitlines()


def test_the_workflow_calls_ci_run() -> None:
    steps = read(".github/workflows/ci.yml")["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert all(re.fullmatch(r"[\w/-]+@v\d+", step["uses"]) for step in steps if "uses" in step)


def test_ci_run_tests_and_lints() -> None:
    assert re.findall(r"(?m)^make (\w+)$", (ROOT / ".ci/run").read_text(encoding="utf-8")) == ["test", "lint"]


def test_the_hooks_are_the_checks_of_make_lint() -> None:
    hooks = [hook["entry"] for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    checks = [line.replace(" --check .", "").replace(" check .", " check") for line in dry_run("lint")]
    assert [hook.replace(" --fix", "") for hook in hooks] == checks


def test_make_help_lists_every_target() -> None:
    targets = re.search(r"(?m)^\.PHONY: (.*)$", MAKEFILE)
    assert targets
    assert re.findall(r"(?m)^make ([\w-]+) +\S", make("help").stdout) == targets[1].split()


def test_a_part_of_the_tests_runs_in_both_phases() -> None:
    part = make("-n", "test", "T=tests/plan").stdout
    assert re.findall(r'-m ("not alone"|alone) (\S+)', part) == [('"not alone"', "tests/plan"), ("alone", "tests/plan")]


def test_what_make_check_leaves_out_exists() -> None:
    left_out = re.findall(r"--ignore (\S+)", "\n".join(dry_run("check")))
    assert left_out and all((ROOT / name).exists() for name in left_out)

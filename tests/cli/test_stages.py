"""Every command does its long work in a stage, so that it prints a line now and then where there is no terminal.

The stages of a target are in tests/deploy/test_contract.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from remoe_cli.cli import app, calibrate, cost, drift, infer, output
from remoe_cli.errors import RemoeError
from remoe_cli.progress import Report
from tests.cli.test_help import TREE

# By command: its arguments, and for each function that may take long the stage that it is called in, in order. The last function ends
# the command.
Stages = dict[str, str]
READING = {"profile.prompts.read_prompts": "Reading the prompts"}
LONG: dict[str, list[tuple[str, Stages]]] = {
    "profile run": [
        ("m --data d -o out", READING | {"profile.run.find_named": "Finding the model"}),
        ("m --data d -o out --latency-from n", READING | {"model.checkpoint.find_named": "Finding the model"}),
    ],
    "profile import": [
        (
            "m r.npz --data d -o out --latency-from n",
            READING
            | {
                "model.checkpoint.find_named": "Finding the model",
                "model.spec.read_spec": "Finding the model",
                "profile.hardware.latency_from": "Finding the model",
                "profile.imports.importer.import_profile": "Importing r.npz",
            },
        )
    ],
    "profile merge": [
        ("a b -o out", {"profile.merge.merge": "Joining the slices"}),
        ("a b --weight a=1,b=1 -o out", {"profile.mix.mix": "Mixing the profiles"}),
    ],
    "profile measure": [("n --data d -o out", READING | {"deploy.local.calibrate.calibrate": ""})],  # opens its own stages
    "predict": [
        (
            "p --data d",
            {
                "profile.record.read_profile": "Reading the profile",
                "predict.history.features_of": "Reading the profile's prompts",
                "predict.history.histories": "Reading the profile's prompts",
                **READING,
                "predict.train.trained": "Predicting",
            },
        )
    ],
    "plan make": [
        (
            "p -o out.json --requests r.csv --data d",
            {
                "profile.record.read_profile": "Reading the profile",
                "plan.problem.trace_traffic.read_traffic": "Reading the requests",
                **READING,
                "plan.problem.predicted.predict_routing": "Predicting which experts the prompts use",
                "plan.build.make_plan": "Solving",
            },
        )
    ],
    "catalog update": [("-o out.toml", {"plan.catalog.update.update": "Reading AWS's price lists"})],
    "demo": [("", {"model.demo.demo_model": "Fetching and building the demo model"})],
    "doctor": [("", {"doctor.machine.findings": "Looking at this machine"})],
    "infer": [("n --data d", READING | {"runtime.client.answer": "Waiting for the answer"})],
    "simulate": [
        (
            "p.json --trace r.csv",
            {
                "deploy.inputs.read_inputs": "Reading the plan",
                "plan.problem.trace_requests.read_requests": "Reading the trace",
                "simulate.requests.source_of": "Reading the trace",
                "simulate.ways.ways": "Simulating",
                "simulate.summary.simulated": "Simulating",
                "simulate.break_even.break_even": "Break-even traffic",
            },
        )
    ],
    "export": [("p --to sglang -o out.json", {"plan.export.export": "Writing what it reads"})],
    "report": [
        ("p.json", {"report.inputs.read_inputs": "Reading the inputs"}),
        (
            "p.json",
            {"report.inputs.read_inputs": "Reading the inputs", "report.content.content_of": "", "report.page.write_page": "Drawing"},
        ),
    ],
    "package": [("p.json", {"deploy.inputs.read_inputs": "Checking the plan"})],
    "cost": [("n", {"usage.cost.report": "Reading the receipts"})],
    "calibrate": [
        (
            "n -o out",
            {
                "plan.problem.request.inputs_of": "Reading the profile",
                "usage.refit.refuse_old": "",  # quick, and before receipts are read
                "usage.refit.refuse_all_local": "",
                "usage.refit.refit": "Fitting the times",
                "plan.problem.request.request_of": "Planning again",
                "plan.problem.request.make_problem": "Planning again",
                "plan.problem.request.problem_of": "Planning again",
                "usage.again.again": "Planning again",
            },
        )
    ],
    "drift": [
        (
            "n",
            {
                "plan.problem.request.inputs_of": "Reading the profile",
                "usage.drift.served_routing": "Reading the receipts",
                "usage.drift.drift": "Comparing the routing",
                "plan.problem.request.problem_of": "Planning for the served routing",
                "plan.problem.request.request_of": "Planning for the served routing",
                "plan.problem.request.make_problem": "Planning for the served routing",
                "usage.served.with_routing": "Planning for the served routing",
                "usage.again.again": "Planning for the served routing",
            },
        )
    ],
}
QUICK = {"config show", "plan show"}
OF_A_TARGET = {"chat", "deploy", "list", "serve", "status", "logs", "destroy"}


class Open:
    """The stage that is open, and the functions that were called in each."""

    def __init__(self) -> None:
        self.title = ""
        self.calls: list[tuple[str, str]] = []

    @contextmanager
    def progress(self, title: str, *, of_bytes: bool = False) -> Iterator[Report]:
        assert not self.title, f"'{title}' is opened inside '{self.title}'"
        self.title = title
        try:
            yield lambda done, total, what="": None
        finally:
            self.title = ""

    def stub(self, name: str, ends: bool) -> MagicMock:
        def call(*args: Any, **options: Any) -> Any:
            self.calls.append((name, self.title))
            if ends:
                raise RemoeError("The stub ends the command.", "")
            if name.endswith("inputs_of"):
                return MagicMock(), MagicMock(), MagicMock()
            return SimpleNamespace(texts=("x",), skipped=0) if name.endswith("read_prompts") else MagicMock()

        return MagicMock(side_effect=call)


def test_every_command_has_a_row() -> None:
    commands = {path.removeprefix("remoe ") for path, (command, _) in TREE.items() if not hasattr(command, "commands")}
    assert commands == set(LONG) | QUICK | OF_A_TARGET


@pytest.mark.parametrize(
    ("command", "arguments", "stages"),
    [pytest.param(command, *row, id=f"{command} {row[0]}") for command, rows in LONG.items() for row in rows],
)
def test_long_work_is_done_in_a_stage(
    command: str, arguments: str, stages: Stages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened = Open()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REMOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(output, "progress", opened.progress)
    for module in (infer, cost, calibrate, drift):
        monkeypatch.setattr(module, "pick", MagicMock())
    monkeypatch.setattr(cost, "_standing", MagicMock())
    for name in stages:
        module, _, function = f"remoe_cli.{name}".rpartition(".")
        monkeypatch.setattr(importlib.import_module(module), function, opened.stub(name, name == list(stages)[-1]))
    monkeypatch.setattr("sys.argv", ["remoe", *command.split(), *arguments.split()])
    assert app.run() == 1
    assert list(dict.fromkeys(opened.calls)) == list(stages.items())  # one may be called twice

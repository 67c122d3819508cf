"""Asking and serving a model load no solver: what they import, in processes that have imported nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from remoe_cli.deploy import main_files
from remoe_cli.package.bundle import Manifest
from remoe_cli.package.partial_checkpoint import MANIFEST
from remoe_cli.plan.document import Source
from tests.support.by_hand import PROMPT_IDS, ByHand, by_hand

SOLVERS = {"pulp", "highspy"}
INFER = """
from pathlib import Path
import remoe_cli.cli.infer, remoe_cli.deploy.aws.target, remoe_cli.deploy.local.target, remoe_cli.runtime.client
from remoe_cli.plan.problem.request import inputs_of
from remoe_cli.runtime.expected_cost import cost_model
result = cost_model(*inputs_of(Path(arguments[0])))(20, 15).ttft_s
"""
SERVE = """
import remoe_cli.cli.serve, remoe_cli.deploy.aws.access, remoe_cli.deploy.local.target, remoe_cli.runtime.container
from remoe_cli.runtime import lambda_main, server
from remoe_cli.runtime.load_main import load_packaged
from remoe_cli.runtime.main_function import Request
result = load_packaged(arguments[1]).answer(Request(prompt_token_ids=tuple(json.loads(arguments[2])), max_new_tokens=4)).token_ids
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ByHand:
    return by_hand(tmp_path_factory.mktemp("imports"), ())


@pytest.fixture(scope="module")
def main_manifest(made: ByHand) -> Path:
    """Of the files of a main function that holds every expert."""
    record, folder = made.profile.record, made.plan_path.parent / "main"
    bundle = Manifest(plan=Source(path="", sha256=""), model=record.model, spec=record.spec, code_sha256="", functions=())
    main_files.write_main_files(main_files.server_config(made.plan, made.profile, made.catalog, bundle, str), made.plan_path, folder)
    return folder / MANIFEST


@pytest.mark.parametrize("code", [INFER, SERVE], ids=["infer", "serve"])
def test_no_solver_is_imported(code: str, made: ByHand, main_manifest: Path) -> None:
    program = f"import json, sys\narguments = sys.argv[1:]\n{code}\nprint(json.dumps([result, sorted(sys.modules)]))"
    command = [sys.executable, "-c", program, str(made.plan_path), str(main_manifest), json.dumps(PROMPT_IDS)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    result, modules = json.loads(run.stdout.splitlines()[-1])
    assert result == made.tokens(4) if code is SERVE else result > 0
    assert SOLVERS.isdisjoint(modules)

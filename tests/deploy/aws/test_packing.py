"""What a deployment on AWS packages into the cache: kept, made again, and never at the cost of others' files."""

from __future__ import annotations

from pathlib import Path

import pytest

from remoe_cli.deploy.aws import packing
from remoe_cli.deploy.aws.settings import AwsSettings
from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.errors import UsageError
from remoe_cli.package.bundle import function_zip
from remoe_cli.package.dependencies import FunctionPackage
from remoe_cli.plan.document import LayerPlan
from tests.support.by_hand import ByHand, by_hand
from tests.support.damage import flip
from tests.support.trees import tree

LAYERS = (LayerPlan(layer=0, remote=(1, 2), memory_mb=1769, replicas=1),)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ByHand:
    monkeypatch.setenv("REMOE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "code.zip").write_bytes(function_zip())
    monkeypatch.setattr(packing, "function_package", lambda architecture, python: FunctionPackage.of(tmp_path / "code.zip"))
    return by_hand(tmp_path, LAYERS)


def pack(made: ByHand, endpoint: Endpoint) -> packing.Package:
    settings = AwsSettings(name="tiny", architecture="x86_64", python="3.13", endpoint=endpoint)
    return packing.pack(made.plan, made.plan_path, made.profile, made.catalog, settings, SILENT)


@pytest.mark.parametrize(
    ("endpoint", "part"), [(Endpoint.none, "functions"), (Endpoint.none, "main-config"), (Endpoint.aws_lambda, "main")], ids=str
)
def test_packaged_files_are_kept_made_again_and_left_to_others(made: ByHand, tmp_path: Path, endpoint: Endpoint, part: str) -> None:
    first = pack(made, endpoint)
    (folder,) = (tmp_path / "cache" / "deployments").iterdir()
    before = tree(folder)
    assert pack(made, endpoint) == first and tree(folder) == before
    damaged = max((folder / part).iterdir(), key=lambda path: (path.name not in (".remoe", "main.json"), path.stat().st_size))
    flip(damaged, 100)
    assert pack(made, endpoint) == first
    assert {name: content for name, content in tree(folder).items() if ".remoe" not in name} == {
        name: content for name, content in before.items() if ".remoe" not in name
    }
    flip(damaged, 100)
    (folder / part / "notes.txt").write_text("mine")
    before = tree(folder)
    with pytest.raises(UsageError, match=r"holds files that remoe did not make, such as notes\.txt\."):
        pack(made, endpoint)
    assert tree(folder) == before

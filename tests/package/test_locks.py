"""Of a wheel that is not the locked one nothing is used."""

from __future__ import annotations

import importlib.metadata
import zipfile
from pathlib import Path

import pytest

from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.package import dependencies


def test_a_wheel_with_another_digest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where an index, or what stands before it, gives another file under the same name."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    version = importlib.metadata.version("pybase64")
    name = f"pybase64-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheels / name, "w") as wheel:
        wheel.writestr("pybase64/__init__.py", "import os; os.system('echo stolen')")
        wheel.writestr(f"pybase64-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: pybase64\nVersion: {version}\n")
        wheel.writestr(f"pybase64-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"pybase64-{version}.dist-info/RECORD", "")
    with pytest.raises(ArtifactError, match="has another file of pybase64 than the one that remoe was tested with: its sha256 differs"):
        dependencies.fetch(["pybase64"], "x86_64", "3.13", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


def test_another_version_than_the_locked_one_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    with pytest.raises(UsageError, match=r"numpy 1\.0 is installed here, and functions on AWS run ") as raised:
        dependencies.fetch(dependencies.PACKAGES, "x86_64", "3.13", tmp_path)
    assert raised.value.hint.startswith("Install it: pip install numpy==")

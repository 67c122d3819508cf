"""The function's zip for AWS: the same bytes each time, nothing in it that no function reads, and clear words when it cannot be made."""

from __future__ import annotations

import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from remoe_cli.artifacts import sha256_file
from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.package import dependencies
from remoe_cli.package.bundle import function_sources
from remoe_cli.package.dependencies import RUNTIMES, FunctionPackage, build, function_package
from remoe_cli.package.elf import stripped
from tests.zipped import ARCHITECTURE, Zipped

LIMIT_BYTES = 60 << 20
_MACHINES = {"x86_64": 62, "arm64": 183}  # e_machine


def test_two_builds_are_the_same_bytes(zipped: Zipped, tmp_path: Path, measured: Callable[[str], None]) -> None:
    again = tmp_path / "elsewhere" / "again.zip"
    build(again, ARCHITECTURE, zipped.python, zipped.interpreter)
    assert sha256_file(again) == sha256_file(zipped.zip)
    made = FunctionPackage.of(again)
    assert made.compiled and made.zipped_bytes < LIMIT_BYTES and made.unpacked_bytes < LIMIT_BYTES
    largest = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in made.largest[:4])
    measured(f"{ARCHITECTURE}: {made.zipped_bytes / 1e6:.1f} MB zipped, {made.unpacked_bytes / 1e6:.1f} MB unpacked ({largest})")


def test_it_holds_what_a_function_reads_with_its_licences(zipped: Zipped) -> None:
    with zipfile.ZipFile(zipped.zip) as archive:
        infos = archive.infolist()
        sources = {path: archive.read(f"function/{path.name}") for path in function_sources()}
    names = [info.filename for info in infos]
    assert names == sorted(names)
    assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)} and {info.external_attr >> 16 for info in infos} == {0o644}
    assert sources == {path: path.read_bytes() for path in function_sources()}
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "function", "numpy", "numpy.libs", "numkong", "numkong.libs", "pybase64"
    }  # fmt: skip
    for package in ("numpy", "numkong", "pybase64"):
        assert any(name.startswith(f"{package}-") and "/licenses/" in name for name in names)
        assert any(name.startswith(f"{package}-") and name.endswith("/METADATA") for name in names)
    assert not [name for name in names if "/tests/" in name or name.endswith((".pyi", ".h", ".a", "RECORD"))]
    compiled = {name.replace("__pycache__/", "").split(".")[0] for name in names if name.endswith(".pyc")}
    assert compiled == {name.split(".")[0] for name in names if name.endswith(".py")}


def _machines(path: Path) -> set[int]:
    with zipfile.ZipFile(path) as archive:
        libraries = [archive.read(name) for name in archive.namelist() if ".so" in name]
    assert len(libraries) > 10
    return {struct.unpack_from("<H", library, 18)[0] for library in libraries}


def test_either_architecture_is_made_here(zipped: Zipped, tmp_path: Path, measured: Callable[[str], None]) -> None:
    (other,) = {"x86_64", "arm64"} - {ARCHITECTURE}
    build(tmp_path / "other.zip", other, zipped.python, None)
    assert _machines(tmp_path / "other.zip") == {_MACHINES[other]} and _machines(zipped.zip) == {_MACHINES[ARCHITECTURE]}
    made = FunctionPackage.of(tmp_path / "other.zip")
    assert not made.compiled and made.unpacked_bytes < LIMIT_BYTES
    measured(f"{other}, without bytecode: {made.zipped_bytes / 1e6:.1f} MB zipped, {made.unpacked_bytes / 1e6:.1f} MB unpacked")


def test_it_is_made_once_for_the_same_inputs(zipped: Zipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str]] = []

    def copied(path: Path, architecture: str, python: str, interpreter: object) -> None:
        made.append((architecture, python))
        path.parent.mkdir(exist_ok=True, parents=True)
        shutil.copyfile(zipped.zip, path)

    monkeypatch.setenv("REMOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(dependencies, "build", copied)
    monkeypatch.setattr(dependencies, "find_interpreter", lambda python: None)
    first = function_package("arm64")
    assert function_package("arm64") == first
    function_package("x86_64")
    function_package("arm64", "3.14")
    changed = tmp_path / "changed.py"
    changed.write_text("# other code")
    monkeypatch.setattr(dependencies, "function_sources", lambda: [changed])
    function_package("arm64")
    assert made == [("arm64", "3.13"), ("x86_64", "3.13"), ("arm64", "3.14"), ("arm64", "3.13")]
    assert first.sha256 == sha256_file(zipped.zip)


@pytest.mark.parametrize(
    ("architecture", "python", "said"),
    [("riscv64", "3.13", "no architecture 'riscv64'"), ("arm64", "3.11", "do not run on Lambda's Python 3.11")],
)
def test_what_lambda_does_not_run_is_refused(architecture: str, python: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        function_package(architecture, python)
    assert "arm64" in raised.value.hint or all(version in raised.value.hint for version in RUNTIMES)


def test_without_an_index_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a pip that may look into one empty folder only."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        ArtifactError, match=r"pip cannot fetch .* for Python 3.13 on arm64: No matching distribution found for numpy"
    ) as raised:
        build(tmp_path / "x.zip", "arm64", "3.13", None)
    assert "numkong" in raised.value.hint
    assert not list(tmp_path.iterdir())


def test_only_libraries_are_stripped() -> None:
    assert stripped(b"import numpy\n") == b"import numpy\n"
    assert stripped(b"\x7fELF\x01\x01" + bytes(60)) == b"\x7fELF\x01\x01" + bytes(60)  # 32 bits

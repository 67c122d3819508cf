"""The zip that Lambda runs: the function's code and the wheels that it imports.

It is made on any machine for either architecture. pip fetches the wheels that the lock file names by their sha256 (locks.py), and no
others. Their versions must be those that are installed here, because packaging has proven that their arithmetic is torch's. They lose what
no function reads: tests, headers, stubs, tools, debugging symbols. They gain bytecode, made by a Python of this machine of the function's
version: in Lambda's read-only folder every cold start would compile all of numpy again.

The same inputs give the same bytes on one machine, and the same digest on every machine. The digest leaves out bytecode and compression,
which may differ with a patch version of Python or zlib (docs/adr/0007-function-package.md).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from remoe_cli import owned, recognise
from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.package import elf, locks
from remoe_cli.package.bundle import function_sources
from remoe_cli.settings import cache_dir

# Not this interpreter's: what Lambda runs need not be what its user runs. Amazon Linux 2023, of these, has glibc 2.34; the older
# runtimes have 2.26, which numpy's wheels do not run on (docs/adr/0007-function-package.md).
RUNTIMES = ("3.12", "3.13", "3.14")
PYTHON = "3.13"
_GLIBC_MINORS = range(34, 16, -1)
_MACHINES = {"x86_64": "x86_64", "arm64": "aarch64"}
PACKAGES = ("numpy", "numkong", "pybase64")

# Known by its name in the cache folder, where nothing else has such names: a damaged one must be replaced too.
_PACKAGE = recognise.ANY
_UNREAD_FOLDERS = {"tests", "testing", "f2py", "distutils", "_pyinstaller", "include", "..", "/"}  # and nothing outside
_UNREAD_SUFFIXES = {".pyi", ".a", ".h", ".c", ".pxd", ".pyx", ".pc", ".ini", ".toml"}
_READ_OF_DIST_INFO = ("METADATA", "licenses/")


@dataclass(frozen=True)
class FunctionPackage:
    """The zip at `path`.

    sha256     of names and contents of its files except bytecode
    compiled   whether it has bytecode
    largest    its folders and their unpacked bytes, largest first
    """

    path: Path
    sha256: str
    zipped_bytes: int
    unpacked_bytes: int
    compiled: bool
    largest: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, path: Path) -> FunctionPackage:
        with zipfile.ZipFile(path) as archive:
            files = {info.filename: info.file_size for info in archive.infolist()}
            digest = hashlib.sha256()
            for name in sorted(files):
                content = archive.read(name)  # which checks it
                if not name.endswith(".pyc"):
                    digest.update(f"{name}\0{files[name]}\0".encode())
                    digest.update(content)
        folders: dict[str, int] = {}
        for name, size in files.items():
            folder = name.partition("/")[0]
            folders[folder] = folders.get(folder, 0) + size
        return cls(
            path=path,
            sha256=digest.hexdigest(),
            zipped_bytes=path.stat().st_size,
            unpacked_bytes=sum(files.values()),
            compiled=any(name.endswith(".pyc") for name in files),
            largest=tuple(sorted(folders.items(), key=lambda item: (-item[1], item[0]))),
        )


def function_package(architecture: str, python: str = PYTHON) -> FunctionPackage:
    """Return the function's package for an architecture and a Python of Lambda's; the cache keeps it.

    Raises: UsageError for an architecture or a Python that Lambda does not have, and when this machine lacks that Python; ArtifactError
    when pip cannot fetch a wheel.
    """
    if architecture not in _MACHINES:
        raise UsageError(f"Lambda has no architecture {architecture!r}.", f"Use one of {', '.join(_MACHINES)}.")
    if python not in RUNTIMES:
        raise UsageError(f"The function's packages do not run on Lambda's Python {python}.", f"Use one of {', '.join(RUNTIMES)}.")
    if (interpreter := find_interpreter(python)) is None:
        raise UsageError(
            f"There is no Python {python} on this machine to make the functions' bytecode, without which they start much more slowly.",
            f"Install one beside yours, for example with 'uv python install {python}' or 'pyenv install {python}'.",
        )
    key = hashlib.sha256(repr((architecture, interpreter.version, python, _requirements(PACKAGES))).encode())
    for source in (Path(__file__), Path(elf.__file__), *function_sources(_MACHINES[architecture])):
        key.update(source.read_bytes())
    path = cache_dir() / "functions" / f"{key.hexdigest()[:32]}.zip"
    if path.exists():
        with suppress(zipfile.BadZipFile, zlib.error, OSError):  # a damaged file is made again
            return FunctionPackage.of(path)
    build(path, architecture, python, interpreter)
    return FunctionPackage.of(path)


def build(path: Path, architecture: str, python: str, interpreter: Interpreter | None) -> None:
    """Make the package at `path`, with bytecode if there is an `interpreter` to make it."""
    with tempfile.TemporaryDirectory() as wheels:
        fetch(PACKAGES, architecture, python, Path(wheels))
        pack(path, Path(wheels).iterdir(), interpreter, architecture)


def pack(path: Path, wheels: Iterable[Path], interpreter: Interpreter | None, architecture: str) -> None:
    """Zip these wheels and the function's code, with the libraries of one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for wheel in wheels:
            _unpack(wheel, root)
        (root / "function").mkdir()
        for source in function_sources(_MACHINES[architecture]):
            shutil.copyfile(source, root / "function" / source.name)
        if interpreter:
            _compile(root, interpreter)
        with owned.writing(path, _PACKAGE) as unfinished:
            _zip(root, unfinished)


def fetch(packages: Iterable[str], architecture: str, python: str, folder: Path, lock: str = locks.FUNCTION) -> None:
    """Download the locked wheels of these packages into `folder`.

    Raises: UsageError where other versions are installed here, ArtifactError when pip cannot fetch a wheel, or one of another digest.
    """
    wheels = _requirements(packages, lock)
    _check_installed(wheels)
    platforms = [f"--platform=manylinux_2_{minor}_{_MACHINES[architecture]}" for minor in _GLIBC_MINORS]
    platforms.append(f"--platform=manylinux2014_{_MACHINES[architecture]}")
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command += [f"--dest={folder}", f"--python-version={python}", "--implementation=cp", *platforms, "--require-hashes"]
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text("".join(locks.entry(lock, name) for name in packages))
        command += ["-r", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if other := _OTHER_DIGEST.search(done.stderr):
        raise ArtifactError(
            f"The package index has another file of {other[1]} than the one that remoe was tested with: its sha256 differs.",
            "Nothing of it was used. See which index pip asks ('pip config list'); for another version, change the lock: 'make locks'.",
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip printed nothing"])[-1].removeprefix("ERROR: ").rstrip(".")
        raise ArtifactError(
            f"pip cannot fetch the function's packages for Python {python} on {architecture}: {reason}.",
            "See that pip is installed here, that it reaches a package index, and that the index has wheels of "
            + ", ".join(wheels)
            + " for that platform.",
        )


# pip's words, then the package: "    numpy==2.4.6 from https://..." or "numpy from ..."
_OTHER_DIGEST = re.compile(r"DO NOT MATCH THE HASHES.*?\n\s+([A-Za-z0-9_.-]+)", re.DOTALL)


def _requirements(packages: Iterable[str], lock: str = locks.FUNCTION) -> list[str]:
    return [f"{name}=={locks.versions(lock)[name]}" for name in packages]


def _check_installed(wheels: Iterable[str]) -> None:
    """Refuse versions that packaging has not compared with torch on this machine.

    Raises: UsageError for them.
    """
    for wanted in wheels:
        name, _, version = wanted.partition("==")
        if (found := importlib.metadata.version(name)) != version:
            message = f"{name} {found} is installed here, and functions on AWS run {version}, whose wheels are known by their sha256."
            raise UsageError(message, f"Install it: pip install {wanted}.")


def _unpack(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if not info.is_dir() and _is_read(PurePosixPath(info.filename)):
                target = root / info.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(elf.stripped(archive.read(info)))


def _is_read(name: PurePosixPath) -> bool:
    """Return whether a function reads this file of a wheel, or its licence wants it kept."""
    top, _, rest = str(name).partition("/")
    if top.endswith(".dist-info"):
        return rest.startswith(_READ_OF_DIST_INFO)
    test_module = name.name.split(".")[0].endswith("_tests") or name.name == "conftest.py"
    return not (top.endswith(".data") or test_module or name.suffix in _UNREAD_SUFFIXES or _UNREAD_FOLDERS.intersection(name.parts))


@dataclass(frozen=True)
class Interpreter:
    """A Python on this machine, and its full version."""

    command: str
    version: str


def find_interpreter(python: str) -> Interpreter | None:
    """Find a Python of this minor version on this machine; None if there is none."""
    for command in (sys.executable, shutil.which(f"python{python}")):
        if command:
            argv = [command, "-c", "import platform, sys; print(platform.python_version(), sys.executable)"]
            printed = subprocess.run(argv, capture_output=True, text=True, check=False, env=_environment(python)).stdout
            version, _, executable = printed.strip().partition(" ")
            if version.startswith(f"{python}."):
                return Interpreter(executable, version)
    return None


def _environment(python: str) -> dict[str, str]:
    """Fix the hash seed, which decides the order of compiled sets, and the version that pyenv runs; import nothing from here."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return own | {"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1", "PYENV_VERSION": python}


def _compile(root: Path, interpreter: Interpreter) -> None:
    """Make bytecode that is never checked against its source, as an unpacked zip does not keep times."""
    options = ["-q", "--invalidation-mode=unchecked-hash", "-s", str(root), "-p", "/var/task"]
    argv = [interpreter.command, "-S", "-m", "compileall", *options, str(root)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=_environment(interpreter.version))
    if done.returncode:
        reason = (done.stdout.strip().splitlines() or ["no reason given"])[-1]
        raise ArtifactError(
            f"Python {interpreter.version} cannot compile the function's packages: {reason}.", "Check that this Python is complete."
        )


def _zip(root: Path, path: Path) -> None:
    """Zip a folder with sorted names and fixed times and modes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()):
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, (root / name).read_bytes())

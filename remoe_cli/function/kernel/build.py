"""Build the libraries for both processors of Lambda, and say in SHA256SUMS what they were built from.

`make kernel` runs it, with the compiler that the ziglang package of PyPI brings. One version of it makes the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

COMPILER = "0.17.1"
HERE = Path(__file__).resolve().parent
BESIDE = HERE.parent
# Lambda's functions have glibc 2.34; 2.17 lets every machine of a user load the libraries. The processor is the least one: the products of
# x86_64 ask for AVX2 themselves, after it was looked whether it is there.
TARGETS = {"x86_64": ("x86_64-linux-gnu.2.17", "x86_64"), "aarch64": ("aarch64-linux-gnu.2.17", "generic")}
LIBRARIES = (("packed", "aarch64"), ("packed", "x86_64"), ("products", "x86_64"))  # a source, and a processor that it is built for
OPTIONS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-Werror")


def build(source: str, machine: str, to: Path) -> None:
    """Build one library for one kind of processor."""
    target, processor = TARGETS[machine]
    command = [sys.executable, "-P", "-m", "ziglang", "cc", *OPTIONS, "-target", target, f"-mcpu={processor}", "-shared", "-s"]
    subprocess.run([*command, f"{source}.c", "-o", str(to)], check=True, cwd=HERE)


def digests() -> str:
    """Return the digests of the sources, of this script and of the libraries, as sha256sum writes them."""
    sources = (HERE / f"{source}.c" for source in sorted({source for source, _ in LIBRARIES}))
    files = (*sources, Path(__file__).resolve(), *(BESIDE / f"{source}-{machine}.so" for source, machine in LIBRARIES))
    return "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(HERE.parent)}\n" for file in files)


def main() -> None:
    if (found := importlib.metadata.version("ziglang")) != COMPILER:
        raise SystemExit(f"ziglang {found} is installed, and the libraries are built with {COMPILER}.")
    for source, machine in LIBRARIES:
        name = f"{source}-{machine}.so"
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / name
            build(source, machine, built)
            before = (BESIDE / name).read_bytes() if (BESIDE / name).exists() else b""
            same = before == built.read_bytes()
            if not same:
                (BESIDE / name).write_bytes(built.read_bytes())
        print(f"{name}: {(BESIDE / name).stat().st_size} bytes, {'the same as before' if same else 'changed'}")
    (HERE / "SHA256SUMS").write_text(digests())


if __name__ == "__main__":
    main()

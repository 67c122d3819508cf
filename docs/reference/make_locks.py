"""Write remoe_cli/package/locks/: the exact files, by their sha256, of which functions and images are made.

    function.txt    what an expert function imports, for every Python and architecture of Lambda
    image-cpu.txt   what the main function's image holds besides torch
    image-gpu.txt   the same with torch for GPUs and its libraries

Versions are those of constraints.txt, with which everything is tested. torch for CPUs is in an index of its own that uv is not asked for:
torch-cpu.txt is written by hand, and says how. Run as `make locks`, after a change of constraints.txt; uv asks the package index.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from remoe_cli.package.dependencies import PACKAGES
from remoe_cli.package.image import BASE, ROOTS

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "remoe_cli" / "package" / "locks"
OF_GPUS = re.compile(r"nvidia|cuda|triton")


def lock(name: str, roots: list[str], python: str, *options: str) -> None:
    """Resolve `roots` within constraints.txt, and write what they need with the digests of all of their files."""
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "-",
        "--quiet",
        "--generate-hashes",
        "--universal",
        "--no-header",
        "--no-annotate",
    ]
    command += ["--python-version", python, "--constraints", str(ROOT / "constraints.txt"), *options]
    done = subprocess.run(command, input="\n".join(roots), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    (LOCKS / name).write_text(f"# Written by 'make locks' from constraints.txt; do not change it by hand.\n{done.stdout}")
    print(LOCKS / name)


def main() -> None:
    image_python = BASE.python.rpartition(".")[0]
    of_torch = [Requirement(line).name for line in metadata.requires("torch") or () if "extra ==" not in line]
    rest = [name for name in ROOTS if name != "torch"]
    lock("function.txt", list(PACKAGES), "3.12", "--no-deps")
    lock("image-cpu.txt", [*rest, *(name for name in of_torch if not OF_GPUS.match(name))], image_python)
    lock("image-gpu.txt", [*rest, "torch"], image_python)


if __name__ == "__main__":
    main()

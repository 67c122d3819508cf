"""The lock files: every file that a function or an image is made of, by its sha256.

`make locks` writes them (docs/reference/make_locks.py). They are requirement files of pip, which takes no other file with --require-hashes.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from pathlib import Path

FUNCTION = "function.txt"
_ENTRY = re.compile(r"(?m)^([a-z0-9][a-z0-9._-]*)==(\S+?)(?:\s*;[^\\\n]*)?(?: \\\n\s+--hash=sha256:[0-9a-f]{64})+$")


def path(name: str) -> Path:
    """Return a lock file's path."""
    return Path(str(resources.files("remoe_cli.package"))) / "locks" / name


@cache
def versions(name: str) -> dict[str, str]:
    """Return the version of each package of a lock file, by its normalised name."""
    return {package: version.partition("+")[0] for package, version in _ENTRY.findall(path(name).read_text())}


def entry(name: str, package: str) -> str:
    """Return the lines of one package in a lock file, with its digests."""
    text = path(name).read_text()
    return next(found[0] for found in _ENTRY.finditer(text) if found[1] == package) + "\n"


def cuda_of_image() -> str:
    """Return the CUDA, as major.minor, that torch in the image for GPUs is built for."""
    return ".".join(versions("image-gpu.txt")["cuda-toolkit"].split(".")[:2])


def of_image(gpu: bool) -> tuple[str, str]:
    """Return the requirements of the main function's image: torch, and everything else."""
    if not gpu:
        return path("torch-cpu.txt").read_text(), path("image-cpu.txt").read_text()
    torch = entry("image-gpu.txt", "torch")
    return torch, path("image-gpu.txt").read_text().replace(torch, "")

"""The device of everything but the experts, which the plan chooses.

Nothing is served on another one in silence.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from remoe_cli.artifacts import Bytes, Part
from remoe_cli.errors import DeployError

if TYPE_CHECKING:
    import torch

ALLOW_CPU = "REMOE_ALLOW_CPU"
_DRIVER = Path("/proc/driver/nvidia/version")
_CPUS = Path("/proc/cpuinfo")
_LIBRARY_FULL = "STATUS_ALLOC_FAILED"  # of cuBLAS and its like, whose memory torch does not count
_log = logging.getLogger(__name__)


class Device(Part):
    """A device as status, receipts and GET /ping name it.

    name           of the GPU or CPU, as its maker calls it
    memory_bytes   of the GPU, or of this machine
    driver         version of the NVIDIA driver; None where there is none
    """

    kind: Literal["cpu", "cuda"]
    name: str
    memory_bytes: Bytes
    driver: str | None = None


def choose(gpu: bool) -> str:
    """Return torch's name of the device that a plan with or without `gpu` is served on.

    Raises: DeployError when the plan has a GPU and torch can use none here, unless $REMOE_ALLOW_CPU is 1.
    """
    import torch

    if not gpu:
        return "cpu"
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if usable:
        return "cuda"
    said = [str(remark.message).strip().splitlines()[0].rstrip(".") for remark in remarks if "CUDA" in str(remark.message)]
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is built for CPUs"
    elif said:
        why = said[0]
    elif driver := _driver():
        why = f"the NVIDIA driver {driver} does not run CUDA {torch.version.cuda}"
    else:
        why = "no NVIDIA GPU is visible"
    message = f"The plan puts everything but the experts on a GPU, and torch can use none here: {why}."
    if os.environ.get(ALLOW_CPU) == "1":
        _log.warning("%s It is served on the CPU, because %s is 1; the plan's times and its price are a GPU's.", message, ALLOW_CPU)
        return "cpu"
    raise DeployError(
        message, f"Serve it where a GPU is, plan for a main function without one, or set {ALLOW_CPU}=1 to serve on the CPU all the same."
    )


def describe(device: torch.device) -> Device:
    """Name a device that torch uses."""
    import torch

    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return Device(kind="cuda", name=found.name, memory_bytes=found.total_memory, driver=_driver())
    named = re.search(r"^model name\s*:\s*(.+)$", _text(_CPUS), re.MULTILINE)
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(kind="cpu", name=named[1] if named else os.uname().machine, memory_bytes=memory_bytes)


@contextmanager
def full_memory_named(hint: str) -> Iterator[None]:
    """Turn torch's errors for a full GPU into one that says what to do.

    Raises: DeployError.
    """
    import torch

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and _LIBRARY_FULL not in str(error):
            raise
        raise DeployError(f"The GPU's memory is full: {str(error).strip().splitlines()[0]}", hint) from None


def _driver() -> str | None:
    found = re.search(r"\b\d{3}(?:\.\d+)+\b", _text(_DRIVER))
    return found[0] if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

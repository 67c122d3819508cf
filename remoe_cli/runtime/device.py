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
from remoe_cli.runtime.device_choice import DeviceChoice

if TYPE_CHECKING:
    import torch

ALLOW_CPU = "REMOE_ALLOW_CPU"
_DRIVER = Path("/proc/driver/nvidia/version")
_CPUS = Path("/proc/cpuinfo")
_CUDA_TORCH = "Install torch for the CUDA version of this machine's driver (https://pytorch.org/get-started/locally)"
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


def choose(gpu: bool, device: DeviceChoice | None = None) -> str:
    """Return torch's name of the device that a plan with or without `gpu` is served on.

    `device` is what the user asks for instead: AUTO is a GPU where torch can use one.

    Raises: DeployError when the plan has a GPU and torch can use none here, unless $REMOE_ALLOW_CPU is 1, and when the user asks for one.
    """
    if device is DeviceChoice.CPU or (device is None and not gpu):
        if gpu:
            _log.warning("The plan's GPU is not used, because the CPU was asked for; the plan's times and its price are a GPU's.")
        return "cpu"
    why = _unusable()
    if device is DeviceChoice.AUTO:
        _log.warning(
            "Everything but the experts is on %s.", "the GPU" if why is None else f"the CPU, because torch can use no GPU here: {why}"
        )
    if why is None:
        return "cuda"
    if device is DeviceChoice.AUTO:
        return "cpu"
    if device is DeviceChoice.CUDA:
        raise DeployError(f"A GPU was asked for, and torch can use none here: {why}.", f"{_CUDA_TORCH}, or take --device cpu.")
    message = f"The plan puts everything but the experts on a GPU, and torch can use none here: {why}."
    if os.environ.get(ALLOW_CPU) == "1":
        _log.warning("%s It is served on the CPU, because %s is 1; the plan's times and its price are a GPU's.", message, ALLOW_CPU)
        return "cpu"
    raise DeployError(
        message, f"Serve it where a GPU is, plan for a main function without one, or set {ALLOW_CPU}=1 to serve on the CPU all the same."
    )


def _unusable() -> str | None:
    """Say why torch can use no GPU here; None where it can."""
    import torch

    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if usable:
        return None
    said = [str(remark.message).strip().splitlines()[0].rstrip(".") for remark in remarks if "CUDA" in str(remark.message)]
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built for CPUs"
    if said:
        return said[0]
    if driver := _driver():
        return f"the NVIDIA driver {driver} does not run CUDA {torch.version.cuda}"
    return "no NVIDIA GPU is visible"


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

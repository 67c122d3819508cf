"""Names the devices that a user may ask for. Commands list them, so nothing is imported here."""

from __future__ import annotations

from enum import StrEnum


class DeviceChoice(StrEnum):
    """Where a user wants everything but the experts; AUTO is a GPU where torch can use one."""

    CUDA = "cuda"
    CPU = "cpu"
    AUTO = "auto"

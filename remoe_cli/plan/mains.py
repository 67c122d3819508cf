"""Parts of the plan file: what a main function runs on, how it is bought, and what it takes."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from remoe_cli.artifacts import Part, is_false

MOST_REQUESTS = 128  # that a main server answers or keeps waiting
PROMPT_PART_TOKENS = 256  # of a prompt that are read at once while others are answered, so that no stream stops for long


class MainKind(StrEnum):
    """How a main function is bought.

    BY_USE      memory is paid by the second of use
    TO_ZERO     an instance is paid while it is up, and given back when no request comes
    ALWAYS_ON   an instance is paid by the hour, busy or not
    """

    BY_USE = "by-use"
    TO_ZERO = "scales-to-zero"
    ALWAYS_ON = "always-on"


class MainSpec(Part):
    """One row of the catalog's menu for the main function.

    memory_mb       CPU memory, which holds the local experts that are not on the GPU
    vcpus           None: as fast as the profile measured
    gpu_memory_mb   nominal memory of the GPU that comes with it, for the rest of the model and for local experts; None without a GPU, or
                    where GPU memory is bought by the GB-second
    usd_per_hour    price of an instance that is rented, busy or not; None: memory is paid by the second of use
    hardware        description of its speed (profile/hardware), for a profile that was not measured on such a machine
    scales_to_zero  the instance is given back after some time without requests, and a later request wakes one (catalog, table [zero])
    """

    name: str
    memory_mb: int
    vcpus: float | None = None
    gpu_memory_mb: int | None = None
    usd_per_hour: float | None = None
    hardware: str | None = None
    scales_to_zero: bool = Field(default=False, exclude_if=is_false)

    @property
    def kind(self) -> MainKind:
        """How it is bought."""
        if self.usd_per_hour is None:
            return MainKind.BY_USE
        return MainKind.TO_ZERO if self.scales_to_zero else MainKind.ALWAYS_ON

    @property
    def starts(self) -> bool:
        """Whether a request may find the main function cold."""
        return self.kind != MainKind.ALWAYS_ON


def places(at_once: int, most: int = MOST_REQUESTS) -> int:
    """Count the requests that a main server answers or keeps waiting; one more is refused.

    There are twice as many as are answered at once, at least.

    >>> places(1), places(100)
    (128, 200)
    """
    return max(most, 2 * at_once)

"""How much memory of this machine is free."""

from __future__ import annotations

from pathlib import Path

from remoe_cli import bounded

_MEMORY, _LIMIT = Path("/proc/meminfo"), bounded.Limit(2**16)


def available_bytes() -> int:
    """Read how much memory programs may still take: what the kernel keeps of files makes room for them."""
    lines = dict(line.split(":", 1) for line in bounded.read_bytes(_MEMORY, _LIMIT).decode().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024

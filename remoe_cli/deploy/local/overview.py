"""A deployment of the local twin, written for people."""

from __future__ import annotations

from typing import Any

from remoe_cli.deploy.console import Overview, Table
from remoe_cli.units import size

_COLUMNS = ("function", "MB", "instances", "invocations", "cold", "errors", "billed ms")


def overview(status: dict[str, Any]) -> Overview:
    """Write a status document for people."""
    above = [f"{status['name']} (local): {status['state']}"]
    if status["state"] != "running":
        return Overview(above=(*above, f"  {status.get('hint', '')}"))
    limits = status["limits"]
    above.append(f"  functions at {status['endpoint']}, limits: memory {limits['memory']}, cpu {limits['cpu']}")
    if main := status["main"]:
        what = f"server http://127.0.0.1:{main['port']}, pid {main['pid']}" if main["kind"] == "server" else f"function {main['name']}"
        above.append(f"  main {what}, {main['state']}, {size(main['resident_bytes'])} resident")
        if "expert_bytes_held" in main:
            held, whole = main["expert_bytes_held"], main["expert_bytes_of_model"]
            there = f" ({on_gpu} on the GPU)" if (on_gpu := main.get("gpu_experts")) else ""
            cached = f", and {more} remote ones in spare memory" if (more := main.get("cached_experts")) else ""
            experts = f"{main['local_experts']} of {main['experts_of_model']} experts{there}{cached}"
            above.append(f"  holds {experts}: {size(held)}, {held / whole:.0%}; all else is on {_named(main['device'])}")
            above.append(f"  {_spent(main['spent'], sum(f['billed_ms'] for f in status['functions']))}")
    else:
        above.append(f"  no main function; 'remoe serve {status['name']}' runs it on this machine")
    above += [f"  {trouble}" for trouble in (*status.get("trouble", ()), (main or {}).get("trouble")) if trouble]
    rows = tuple(
        (
            f["name"],
            str(f["memory_mb"]),
            str(len(f["instances"])),
            str(f["invocations"]),
            str(f["cold_starts"]),
            str(f["errors"]),
            str(f["billed_ms"]),
        )
        for f in status["functions"]
    )
    return Overview((Table("", _COLUMNS, rows),) if rows else (), above=tuple(above))


def _named(device: dict[str, Any] | str) -> str:
    if isinstance(device, str):  # of a main server that an earlier version has started
        return device
    driver = f", driver {device['driver']}" if device["driver"] else ""
    return f"{device['kind']}: {device['name']}, {size(device['memory_bytes'])}{driver}"


def _spent(spent: dict[str, dict[str, Any]], metered_ms: int) -> str:
    """Say what expert functions were billed for: what no receipt has is not lost."""
    loading_ms, answers_ms, cancelled_ms = (spent[purpose]["billed_ms"] for purpose in ("loading", "answers", "cancelled"))
    parts = [f"{loading_ms} ms for loading the main server", f"{answers_ms} ms for requests, in their receipts"]
    if cancelled_ms:
        parts.append(f"{cancelled_ms} ms for requests whose client left, or that the server's end cut off")
    if other_ms := metered_ms - loading_ms - answers_ms - cancelled_ms:
        parts.append(f"{other_ms} ms for other callers, or an earlier main server")
    return f"expert functions were billed {metered_ms} ms: {'; '.join(parts)}"

"""A deployment: whether it runs, what its main function runs on, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from remoe_cli.doctor.finding import Finding


def findings(status: dict[str, Any]) -> Iterator[Finding]:
    """Read the document of `remoe status NAME`, of any target."""
    name, runs = status["name"], status["state"] == "running"
    yield Finding(name="deployment", ok=runs, value=f"{name} ({status['target']}): {status['state']}", hint=status.get("hint") or "")
    for trouble in status.get("trouble", ()):
        yield Finding(name="trouble", ok=False, value=trouble, hint=f"'remoe logs {name}' says more.")
    main = status["main"]
    if main is None:
        yield Finding(name="main function", ok=True, value="none", hint=f"'remoe serve {name}' runs it on this machine.")
    elif runs:
        yield _main(name, main)
    functions = status["functions"]
    failed = sum(function.get("errors", 0) for function in functions)
    hint = f"'remoe logs {name}' says more." if failed else ""
    yield Finding(name="expert functions", ok=True, value=f"{len(functions)}, with {failed} failed calls", hint=hint)


def _main(name: str, main: dict[str, Any]) -> Finding:
    ok = main["state"] in ("running", "ready", "Active", "InService")
    device = main.get("device")
    where = f", on {device['kind']}: {device['name']}" if isinstance(device, dict) else ""
    hint = main.get("trouble") or ("" if ok else f"'remoe logs {name} --function main' says more.")
    return Finding(name="main function", ok=ok, value=f"{main['state']}{where}", hint=hint)

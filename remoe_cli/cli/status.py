"""`remoe status`: what stands, and what it holds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from remoe_cli.cli import output


def command(
    name: Annotated[str | None, typer.Argument(help="A deployment; all of them by default.")] = None,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Show deployments: functions, instances, memory limits, and what the main server really holds."""
    from remoe_cli.deploy.local import lifecycle
    from remoe_cli.deploy.local.target import status

    if name is not None:
        document = status(name)
        output.result(document, lambda: show(document))
        return
    documents = [status(each) for each in lifecycle.names()]
    output.result({"deployments": documents}, lambda: _show_all(documents))


def show(document: dict[str, Any]) -> None:
    """One deployment for people."""
    output.line(f"{document['name']} ({document['target']}): {document['state']}")
    if document["state"] != "running":
        output.line(f"  {document.get('hint', '')}")
        return
    limits = document["limits"]
    output.line(f"  functions at {document['endpoint']}, limits: memory {limits['memory']}, cpu {limits['cpu']}")
    if main := document["main"]:
        what = f"server pid {main['pid']}, port {main['port']}" if main["kind"] == "server" else f"function {main['name']}"
        output.line(f"  main {what}, {main['state']}, {main['resident_bytes'] / 1e6:.0f} MB resident")
        if "expert_bytes_held" in main:
            held, whole = main["expert_bytes_held"], main["expert_bytes_of_model"]
            experts = f"{main['local_experts']} of {main['experts_of_model']} experts"
            output.line(f"  holds {experts}: {held / 1e6:.1f} MB, {held / whole:.0%}")
    else:
        output.line(f"  no main function; 'remoe serve {document['name']}' runs it on this machine")
    if document["functions"]:
        rows = [
            (
                f["name"],
                str(f["memory_mb"]),
                str(len(f["instances"])),
                str(f["invocations"]),
                str(f["cold_starts"]),
                str(f["errors"]),
                str(f["billed_ms"]),
            )
            for f in document["functions"]
        ]
        output.table("", ("function", "MB", "instances", "invocations", "cold", "errors", "billed ms"), rows)


def _show_all(documents: list[dict[str, Any]]) -> None:
    if not documents:
        output.line("No deployments. Make one with 'remoe deploy PLAN'.")
    for document in documents:
        main = document["main"]
        held = f", main {main['resident_bytes'] / 1e6:.0f} MB" if main else ""
        output.line(f"{document['name']} ({document['target']}): {document['state']}, {len(document['functions'])} functions{held}")

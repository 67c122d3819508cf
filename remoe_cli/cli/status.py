"""`remoe status`: what stands, and what it holds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.target import ProfileOption, RegionOption, TargetName, TargetOption, pick
from remoe_cli.errors import UsageError

EXAMPLES = examples("remoe status", "remoe status olmoe --target aws")


def command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A deployment; by default all on this machine.")] = None,
    target: TargetOption = TargetName.local,
    region: RegionOption = None,
    profile: ProfileOption = None,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Show deployments: their functions, instances and memory limits, and what the main function holds."""
    if name is not None:
        document = pick(target, region, profile).status(name)
        output.result(document, lambda: show(document))
        return
    if target is TargetName.aws:
        raise UsageError("On AWS, one deployment is shown at a time.", "Give its NAME.")
    from remoe_cli.deploy.local import lifecycle

    here = pick(target, region, profile)
    documents = [here.status(each) for each in lifecycle.names()]
    output.result({"deployments": documents}, lambda: _show_all(documents))


def show(document: dict[str, Any]) -> None:
    """Print one deployment for people."""
    _show_on_aws(document) if document["target"] == "aws" else _show_here(document)


def _show_here(document: dict[str, Any]) -> None:
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


def _show_on_aws(document: dict[str, Any]) -> None:
    output.line(f"{document['name']} (aws, account {document['account']}, {document['region']}): {document['state']}")
    output.line(f"  stack {document['stack']}, last changed by {document['by']} at {document['since']}")
    output.line(f"  plan {document['plan']}")
    if document["hint"]:
        output.line(f"  {document['hint']}")
    if main := document["main"]:
        output.line(f"  main function {main['name']} on {main['kind']}: {main['state']}")
    elif document["state"] == "running":
        output.line(f"  no main function; 'remoe serve {document['name']} --target aws' runs it on this machine")
    if document["functions"]:
        rows = [(f["name"], str(f["memory_mb"]), f["state"], "; ".join(f["drift"]) or "none") for f in document["functions"]]
        output.table("", ("function", "MB", "state", "drift"), rows)


def _show_all(documents: list[dict[str, Any]]) -> None:
    if not documents:
        output.line("No deployments. Make one with 'remoe deploy PLAN'.")
    for document in documents:
        main = document["main"]
        held = f", main {main['resident_bytes'] / 1e6:.0f} MB" if main else ""
        output.line(f"{document['name']} ({document['target']}): {document['state']}, {len(document['functions'])} functions{held}")

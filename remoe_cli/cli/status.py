"""`remoe status`: what stands, and what it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.pipeline_files import refuse_other_file
from remoe_cli.cli.target import ProfileOption, RegionOption, TargetName, TargetOption, pick
from remoe_cli.errors import RemoeError
from remoe_cli.units import size

if TYPE_CHECKING:
    from remoe_cli.deploy.target import Target

EXAMPLES = examples("remoe status", "remoe status olmoe --target aws")


def command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", callback=refuse_other_file, help="A deployment; by default all.")] = None,
    target: TargetOption = TargetName.local,
    region: RegionOption = None,
    profile: ProfileOption = None,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Show deployments: their functions, instances and memory limits, and what the main function holds."""
    place = pick(target, region, profile)
    if name is not None:
        document = place.status(name)
        output.result(document, lambda: output.show_overview(place.overview(document)))
        return
    found = [described(place, target.value, each) for each in place.names()]
    documents = [each for each in found if each]
    output.result({"deployments": documents}, lambda: _show_all(documents))


def described(place: Target, target: str, name: str) -> dict[str, Any] | None:
    """Describe one deployment of several; None when it is gone by now.

    What cannot be read of one does not hide the others.
    """
    try:
        return place.status(name)
    except (RemoeError, OSError) as error:
        if name not in place.names():
            return None
        hint = f"{error.message} {error.hint}".rstrip() if isinstance(error, RemoeError) else f"{error}."
        return {"name": name, "target": target, "state": "unreadable", "endpoint": None, "main": None, "functions": [], "hint": hint}


def _show_all(documents: list[dict[str, Any]]) -> None:
    if not documents:
        output.paragraph("No deployments. Make one with 'remoe deploy PLAN'.")
    for document in documents:
        main = document["main"]
        held = f", main {size(main['resident_bytes'])}" if main and "resident_bytes" in main else ""
        output.paragraph(f"{document['name']} ({document['target']}): {document['state']}, {len(document['functions'])} functions{held}")
        if document.get("hint"):
            output.line(f"  {document['hint']}")

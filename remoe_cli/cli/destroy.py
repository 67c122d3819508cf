"""`remoe destroy`: end a deployment, without remains."""

from __future__ import annotations

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.pipeline_files import meant
from remoe_cli.cli.target import NameArgument, ProfileOption, RegionOption, TargetName, TargetOption, YesOption, pick

EXAMPLES = examples("remoe destroy demo", "remoe destroy olmoe --target aws --yes")


def command(
    context: typer.Context,
    name: NameArgument,
    target: TargetOption = TargetName.local,
    region: RegionOption = None,
    profile: ProfileOption = None,
    yes: YesOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """End a deployment: its processes and files on this machine, or its stack and bucket on AWS."""
    place = pick(target, region, profile, asks="destroy", yes=yes)
    document = place.destroy(name)
    book = place.receipts(name)
    document |= {"receipts": str(book.folder) if book.exists else None}

    def show() -> None:
        if document["state"] == "absent":
            where = "here: no file, and no process on this machine"
            if target is TargetName.aws:
                where = f"in account {document['account']}, {document['region']}"
            others = f" There are: {', '.join(known)}." if (known := place.names()) else ""
            output.paragraph(f"There is no deployment named '{name}' {where}.{others}")
            if (other := meant(context)) is not None:
                output.paragraph(f"{other.message} {other.hint}")
            return
        output.paragraph(f"{name} is gone." if document["left"] or document["kept"] else f"{name} is gone: nothing is left of it.")
        for each in document["kept"]:
            output.line(f"  kept, because remoe did not make it: {each}")
        for arn in document["left"]:
            output.line(f"  still has its tag (AWS may take minutes to forget what is deleted): {arn}")
        if document["receipts"]:
            output.paragraph(
                f"Its receipts stay in {document['receipts']}: 'remoe cost {name}' adds them up. Delete the folder to forget them."
            )

    output.result(document, show)

"""`remoe report`: a page, and pictures, of a profile, a plan and receipts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.replacing import ReplaceOption, agree_to_replace

if TYPE_CHECKING:
    from remoe_cli.report.content import Content

EXAMPLES = examples(
    "remoe report plans/olmoe.json   # with its profile, where that is on this machine",
    "remoe report profiles/olmoe -o olmoe.html --png figures/",
    "remoe report plans/olmoe.json answers.jsonl --trace trace.csv -o answers.html",
)


def command(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="[PROFILE|PLAN|RECEIPTS]...", help="A profile, a plan, and receipts: JSON lines, or a deployment's folder of them."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The page to write.")] = Path("report.html"),
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Requests with their times: break-even traffic is also that of their bursts."),
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Also draw pictures for papers here, as .png.")] = None,
    yes: ReplaceOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Show a profile, a plan or receipts as one HTML page that opens anywhere and loads nothing.

    Sliders in it work out the plan's costs again for other prices, round trips, traffic and requests at once. Prompts and answers are not
    in it.
    """
    from remoe_cli.report.inputs import read_inputs
    from remoe_cli.report.page import refuse_page, write_page

    refuse_page(out)
    places = [out]
    if png is not None:
        from remoe_cli.report.pictures import picture_paths, refuse_pictures

        refuse_pictures(png)
        places += picture_paths(png)
    with output.progress("Reading the inputs"):
        read = read_inputs(inputs, trace)
    agree_to_replace(yes, *places)
    from remoe_cli.report.content import content_of
    from remoe_cli.simulate.wording import break_even_document

    content = content_of(read, output.progress)
    with output.progress("Drawing"):
        write_page(content, out)
        pictures = []
        if png is not None:
            from remoe_cli.report.pictures import draw_pictures

            pictures = draw_pictures(content, png)
    for text in (*content.left_out, *content.details):
        output.say(text)
    document = {
        "path": str(out),
        "bytes": out.stat().st_size,
        "pictures": [str(path) for path in pictures],
        "model": content.model,
        "break_even": [break_even_document(one) for one in content.bursts],
        "left_out": [*content.left_out, *content.details],
    }
    output.result(document, lambda: _show(content, out, pictures))


def _show(content: Content, out: Path, pictures: list[Path]) -> None:
    """Print the essentials."""
    from remoe_cli.report.summary import labels, measured_table, ways_table

    for label, text in labels(content):
        output.labelled(label, text)
    for table in (ways_table(content), measured_table(content)):
        if table is not None:
            output.line()
            output.table(*table)
    for picture in pictures:
        output.line(f"{'picture':<{output.LABEL}}{picture}")
    output.line(f"{'report':<{output.LABEL}}{out}")

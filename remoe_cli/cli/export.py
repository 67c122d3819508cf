"""`remoe export`: placement and hot experts for other programs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.replacing import ReplaceOption, agree_to_replace

# typer makes choices of enums only; plan/export.py has what each program reads.
Program = Enum("Program", {name: name for name in ("ktransformers", "sglang", "llama.cpp", "exllamav3")}, type=str)  # type: ignore[misc]

EXAMPLES = examples(
    "remoe export profiles/olmoe --to sglang -o olmoe-experts.json",
    "remoe export plans/olmoe.json --to ktransformers -o olmoe-experts.pt",
    "remoe export plans/olmoe.json --to llama.cpp -o olmoe-arguments.txt",
)


def command(
    source: Annotated[Path, typer.Argument(metavar="PROFILE|PLAN", help="What 'remoe profile' or 'remoe plan' made.", show_default=False)],
    to: Annotated[Program, typer.Option(help="The program that shall read it; llama.cpp and exllamav3 need a plan.")],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The file to write; its suffix is the program's.")],
    yes: ReplaceOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Write which experts are used most, or are on the GPU, in the form that another program reads.

    vLLM is not among them: it has no option for such a file, as its load balancer (--enable-eplb) counts while it serves.
    """
    from remoe_cli.plan.export import export, format_of

    format_of(to.value, out)
    agree_to_replace(yes, out)
    with output.progress("Writing what it reads"):
        made = export(source, to.value, out)
    document = {"path": str(out), "program": to.value, "profile": str(made.profile.path), "plan": str(source) if made.plan else None}
    output.result(document, lambda: output.line(f"For {to.value}: {out}"))

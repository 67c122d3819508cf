"""`remoe plan show`: a stored plan, as `remoe plan` showed it when it was made."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.options import PlanArgument

if TYPE_CHECKING:
    from remoe_cli.plan.document import Plan

EXAMPLES = examples("remoe plan show plans/olmoe.json", "remoe plan show plans/olmoe.json --verbose")


def command(
    plan: PlanArgument,
    verbose: output.VerboseOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Show a plan that was made before: the verdict, money and times, and the alternatives.

    Nothing is solved again: neither the profile nor the catalog is read.
    """
    from remoe_cli.plan.document import read_plan

    stored = read_plan(plan)
    output.result({"path": str(plan)} | stored.model_dump(mode="json"), lambda: show(stored, plan))


def show(plan: Plan, path: Path) -> None:
    """Print the plan for people: money and the verdict first, layers only with --verbose."""
    from remoe_cli.plan.explain.rows import alternative_texts, baseline_columns, baseline_rows, layer_columns, layer_rows, summary_rows

    for name, text in summary_rows(plan):
        output.labelled(name, text)
    output.line()
    if output.is_verbose():
        if any(layer.remote or layer.gpu for layer in plan.layers):
            output.table("Layers", layer_columns(plan), layer_rows(plan))
        else:
            output.paragraph("No expert is remote, so there is no table of layers.")
            output.line()
    output.table("Alternatives", baseline_columns(plan), baseline_rows(plan))
    for text in alternative_texts(plan):
        output.paragraph(text)
    output.line()
    for note in plan.notes:
        output.labelled("note", note)
    output.line(f"{'plan':<{output.LABEL}}{path}")
    dry_run = " --target aws --dry-run" if plan.main.name.startswith(("lambda-", "ml.")) else ""  # other main functions are the twin's
    output.line(f"{'next':<{output.LABEL}}remoe deploy {shlex.quote(str(path))}{dry_run}")

"""`remoe profile measure`: a copy of a deployment's profile with the call times measured on it."""

from __future__ import annotations

from typing import Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.options import DataOption, FieldOption, LimitOption, read_data
from remoe_cli.cli.pipeline_files import refuse_other_file
from remoe_cli.cli.profile_shared import MaxNewTokensOption, OutOption, finish
from remoe_cli.cli.replacing import ReplaceOption, agree_to_replace

EXAMPLES = examples(
    "remoe profile measure olmoe -o profiles/olmoe-measured",
    "remoe profile measure olmoe --data prompts.jsonl -o profiles/olmoe-measured",
)


def command(
    name: Annotated[
        str, typer.Argument(metavar="NAME", callback=refuse_other_file, help="A deployment that runs on this machine (--target local).")
    ],
    out: OutOption,
    data: DataOption = None,
    field: FieldOption = "prompt",
    limit: LimitOption = 16,
    max_new_tokens: MaxNewTokensOption = 64,
    yes: ReplaceOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Measure a local deployment's warm calls and cold starts, and copy its profile with these times.

    With --data it also answers the prompts, and the profile gets the times of whole answers.
    """
    from remoe_cli.deploy.local.calibrate import calibrate
    from remoe_cli.profile.record import refuse_foreign

    refuse_foreign(out)
    agree_to_replace(yes, out / "profile.json")
    texts = () if data is None else read_data(data, field, limit).texts
    finish(calibrate(name, out, texts, max_new_tokens, output.console()), out)

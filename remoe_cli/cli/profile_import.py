"""`remoe profile import`: a profile from routing that another program recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.options import DataOption, ExpertForm, FieldOption, LimitOption, read_data
from remoe_cli.cli.profile_shared import LATENCY_FROM, MaxPromptTokensOption, OutOption, described_latency, finish
from remoe_cli.cli.replacing import ReplaceOption, agree_to_replace

EXAMPLES = examples(
    "remoe profile import gpt-oss-20b/ counts.npz --latency-from paper -o profiles/gpt-oss",
    "remoe profile import olmoe/ counts.npz --latency-from g6e.xlarge --data prompts.jsonl -o olmoe",
    "remoe profile import olmoe/ counts.npz --latency-from g6e.xlarge --experts int8 -o olmoe-int8",
)


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder with at least the model's config.json, or a Hugging Face id.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The recorded routing: which experts each token or prompt used.")],
    latency_from: Annotated[str, LATENCY_FROM],
    out: OutOption,
    data: DataOption = None,
    field: FieldOption = "prompt",
    limit: LimitOption = None,
    max_prompt_tokens: MaxPromptTokensOption = 1024,
    vectors_from: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="Take the embeddings of --data from this model; by default from MODEL's own weights."),
    ] = None,
    experts: Annotated[
        ExpertForm | None,
        typer.Option(
            help="Plan for experts of expert functions that are quantised. What that loses is not measured: the model is not run."
        ),
    ] = None,
    yes: ReplaceOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Make a profile from routing in a file, recorded by another program. The model is not run.

    Give the prompts of that recording in --data if you want to predict the routing of new prompts.
    """
    from remoe_cli.profile.imports.importer import import_profile
    from remoe_cli.profile.record import refuse_foreign

    refuse_foreign(out)
    agree_to_replace(yes, out / "profile.json")
    prompts = None if data is None else read_data(data, field, limit)
    latency = described_latency(model, latency_from, experts and experts.value)
    remarks: list[str] = []
    with output.progress(f"Importing {file}"):
        made = import_profile(
            model,
            file,
            out,
            latency=latency,
            prompts=prompts,
            vectors_from=vectors_from,
            max_prompt_tokens=max_prompt_tokens,
            experts=experts and experts.value,
            say=remarks.append,
        )
    finish(made, out, remarks)

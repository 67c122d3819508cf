"""`remoe profile run`: run a model on prompts, and record the experts they use and its times."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.options import DATA, DeviceOption, ExpertForm, FieldOption, LimitOption, read_data
from remoe_cli.cli.profile_shared import LATENCY_FROM, MaxNewTokensOption, MaxPromptTokensOption, OutOption, described_latency, finish
from remoe_cli.cli.replacing import ReplaceOption, agree_to_replace
from remoe_cli.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from remoe_cli.profile.prompts import PromptSet
    from remoe_cli.profile.record import Profile

ExpertsOption = Annotated[
    ExpertForm | None,
    typer.Option(help="Quantise the experts of expert functions, and measure what that loses. The checkpoint stays as it is."),
]
_SHARD = re.compile(r"([1-9]\d*)/([1-9]\d*)")

EXAMPLES = examples(
    "remoe profile ~/models/olmoe --data prompts.jsonl -o profiles/olmoe",
    "remoe profile run ORG/MODEL --data prompts.jsonl --shard 1/4 -o part-1   # one of four machines",
    "head -n 50 prompts.jsonl | remoe profile run ORG/MODEL --data - -o profiles/model",
)


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a transformers checkpoint, or a Hugging Face id.")],
    data: Annotated[str, DATA],
    out: OutOption,
    field: FieldOption = "prompt",
    limit: LimitOption = None,
    max_new_tokens: MaxNewTokensOption = 64,
    max_prompt_tokens: MaxPromptTokensOption = 1024,
    batch_size: Annotated[int, typer.Option(min=1, metavar="PROMPTS", help="Prompts that run together.")] = 16,
    latency_from: Annotated[str | None, LATENCY_FROM] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Profile only slice I of N of the prompts; 'remoe profile merge' joins the slices."),
    ] = None,
    device_map: Annotated[str | None, typer.Option(metavar="MAP", help="transformers' device_map, such as 'auto', to use GPUs.")] = None,
    device: DeviceOption = None,
    experts: ExpertsOption = None,
    assistant: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A small model with the same tokenizer, to draft tokens: count and time its drafts too."),
    ] = None,
    yes: ReplaceOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Run a model on your prompts and record which experts they use, and how long things take.

    After an interruption the same command goes on where it stopped.
    """
    from remoe_cli.profile.record import refuse_foreign
    from remoe_cli.runtime.device import choose, full_memory_named

    refuse_foreign(out)
    if device and device_map:
        raise UsageError("--device and --device-map both say where the model is.", "Leave one of them out.")
    at = choose(False, device)
    prompts = read_data(data, field, limit)
    options = {
        "max_new_tokens": max_new_tokens,
        "max_prompt_tokens": max_prompt_tokens,
        "batch_size": batch_size,
        "shard": _shard(shard),
        "device_map": device_map,
        "device": at,
        "may_replace": lambda path: agree_to_replace(yes, path),
        "latency": None if latency_from is None else described_latency(model, latency_from, experts and experts.value, assistant),
        "experts": experts and experts.value,
        "assistant": assistant,
    }
    with full_memory_named("Take a smaller --batch-size or --max-prompt-tokens, or profile on the CPU.") if at != "cpu" else nullcontext():
        profiled = _recorded(model, prompts, out, options)
    finish(profiled, out)


def _recorded(model: str, prompts: PromptSet, out: Path, options: dict[str, Any]) -> Profile:
    from remoe_cli.profile.run import profile

    try:
        return profile(model, prompts, out, progress=output.progress, say=output.say, **options)
    except KeyboardInterrupt:
        output.say(f"\nInterrupted. What is done is kept in {out}; the same command goes on from there.")
        raise


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = _SHARD.fullmatch(text)
    if not parts or int(parts[1]) > int(parts[2]):
        raise UsageError(f"--shard is '{text}', not a slice such as 1/4.", "Give I/N with I from 1 to N.")
    return int(parts[1]), int(parts[2])

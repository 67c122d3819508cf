"""`remoe profile`: which experts a model uses on the user's prompts, and how long things take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remoe_cli.cli import output
from remoe_cli.errors import UsageError

if TYPE_CHECKING:
    from remoe_cli.profile.latency_record import Latency
    from remoe_cli.profile.prompts import PromptSet
    from remoe_cli.profile.record import Profile

_ASKED = 16  # prompts that a measured deployment answers, unless --limit says otherwise
_SHARD = re.compile(r"([1-9]\d*)/([1-9]\d*)")


def command(
    out: Annotated[Path, typer.Option("-o", "--output", help="Directory of the profile; a rerun after an interruption goes on in it.")],
    model: Annotated[str | None, typer.Argument(help="Folder of a transformers checkpoint, or a hub id.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Prompts: a .jsonl, .txt, .csv or .parquet file, or a hub dataset id.")] = None,
    field: Annotated[str, typer.Option(help="Field of the prompts that holds the text.")] = "prompt",
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N prompts only.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 64,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longer prompts are cut to this many tokens.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that run together.")] = 16,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Profile slice I of N; 'remoe profile merge' joins the slices.")] = None,
    device_map: Annotated[str | None, typer.Option(help="transformers' device_map, such as 'auto', to use GPUs.")] = None,
    latency_from: Annotated[
        str | None,
        typer.Option(help="Describe the hardware instead of measuring this machine: a ready description's name or a .toml file."),
    ] = None,
    routing: Annotated[
        Path | None, typer.Option(help="Take the routing from a file that another program recorded; the model is not run.")
    ] = None,
    vectors_from: Annotated[str | None, typer.Option(help="With --routing: checkpoint whose embeddings make the prompt vectors.")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Measure this deployment on the twin, with --data also while it answers; writes a copy of its profile with that in it."
        ),
    ] = None,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Record which experts MODEL uses on your prompts, in prefill and in decode, and how long things take."""
    from remoe_cli.cli.prompts import read_prompts

    if target is not None:
        if model or routing or latency_from or shard or vectors_from or device_map:
            raise UsageError(
                "--target measures a deployment, whose plan names its model and profile.",
                "Leave the other options out, except -o and --data.",
            )
        from remoe_cli.deploy.local.calibrate import calibrate

        texts = read_prompts(data, field, limit or _ASKED).texts if data else ()
        finish(calibrate(target, out, texts, max_new_tokens, output.say), out)
        return
    if model is None or (data is None and routing is None):
        raise UsageError("Give a MODEL with --data PROMPTS or --routing FILE, or a --target NAME.", "See 'remoe profile --help'.")
    unused = {"--vectors-from": vectors_from} if routing is None else {"--shard": shard, "--device-map": device_map}
    if given := [name for name, value in unused.items() if value]:
        raise UsageError(f"{given[0]} means nothing {'without' if routing is None else 'with'} --routing.", "Leave it out.")
    prompts = None if data is None else read_prompts(data, field, limit)
    if routing is not None:
        finish(_imported(model, routing, out, prompts, vectors_from, latency_from, max_prompt_tokens), out)
        return
    assert prompts is not None
    options = {"max_new_tokens": max_new_tokens, "max_prompt_tokens": max_prompt_tokens, "batch_size": batch_size}
    latency = None if latency_from is None else _described(model, latency_from)
    finish(_recorded(model, prompts, out, options | {"shard": _shard(shard), "device_map": device_map, "latency": latency}), out)


def finish(made: Profile, out: Path) -> None:
    """Train the profile's predictor, and show what was made."""
    from remoe_cli.predict.train import train

    trained = None if made.record.dataset.shard else train(made)
    record, arrays = made.record, made.arrays
    doubts = record.latency.warnings
    document: dict[str, Any] = {
        "path": str(out),
        "model": record.model.path,
        "revision": record.model.revision,
        "prompts": len(arrays["prompt_tokens"]),
        "shard": record.dataset.shard,
        "layers": len(record.spec.moe_layers),
        "experts_per_layer": record.spec.experts_per_layer,
        "top_k": record.spec.top_k,
        "routing": record.routing.model_dump(mode="json"),
        "prefill_tokens": int(arrays["prompt_tokens"].sum()),
        "decode_tokens": int(arrays["decode_tokens"].sum()),
        "predictor": trained and trained.default,
        "latency": record.latency.source,
        "warnings": list(doubts),
    }

    def show() -> None:
        output.line(
            f"{document['prompts']} prompts: {document['prefill_tokens']:,} prefill and {document['decode_tokens']:,} decode tokens"
        )
        output.line(f"{document['layers']} MoE layers x {document['experts_per_layer']} experts, top-{document['top_k']}")
        output.line(f"Times {record.latency.source}: {record.latency.machine}, {record.latency.measured_on}")
        if trained:
            scores = ", ".join(f"{name} {bits:.3f}" for name, bits in trained.validation_bits.items())
            output.line(
                f"Default predictor: {trained.default} (divergence in bits on {trained.validation_prompts} held-out prompts: {scores})"
            )
        output.line(f"Profile: {out}")

    for doubt in doubts:
        output.say(f"warning: {doubt}")
    output.result(document, show)


def _recorded(model: str, prompts: PromptSet, out: Path, options: dict[str, Any]) -> Profile:
    from remoe_cli.profile.run import profile

    try:
        with output.progress("Profiling prompts") as progress:
            return profile(model, prompts, out, progress=progress, say=output.say, **options)
    except KeyboardInterrupt:
        output.say(f"\nInterrupted. What is done is kept in {out}; the same command goes on from there.")
        raise


def _imported(
    model: str, routing: Path, out: Path, prompts: PromptSet | None, vectors_from: str | None, latency_from: str | None, limit: int
) -> Profile:
    from remoe_cli.profile.hardware import hardware_names
    from remoe_cli.profile.imports.importer import import_profile

    if latency_from is None:
        raise UsageError(
            "Routing from a file needs a description of the hardware, as the model is not run here.",
            f"Add --latency-from with a .toml file or one of: {', '.join(hardware_names())}.",
        )
    latency = _described(model, latency_from)
    return import_profile(model, routing, out, latency=latency, prompts=prompts, vectors_from=vectors_from, max_prompt_tokens=limit)


def _described(model: str, latency_from: str) -> Latency:
    from remoe_cli.model.checkpoint import find
    from remoe_cli.model.spec import read_spec
    from remoe_cli.profile.hardware import latency_from as described

    return described(latency_from, read_spec(find(model)))


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = _SHARD.fullmatch(text)
    if not parts or int(parts[1]) > int(parts[2]):
        raise UsageError(f"--shard is '{text}', not a slice such as 1/4.", "Give I/N with I from 1 to N.")
    return int(parts[1]), int(parts[2])

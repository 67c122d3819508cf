"""`remoe profile`: which experts a model uses on the user's prompts, and how long things take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from remoe_cli.cli import output


def command(
    model: Annotated[str, typer.Argument(help="Folder of a transformers checkpoint, or a hub id.")],
    data: Annotated[str, typer.Option("--data", help="Prompts: a .jsonl, .txt, .csv or .parquet file, or a hub dataset id.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="Directory of the profile; a rerun after an interruption goes on in it.")],
    field: Annotated[str, typer.Option(help="Field of the prompts that holds the text.")] = "prompt",
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N prompts only.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 64,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longer prompts are cut to this many tokens.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that run together.")] = 16,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Record which experts MODEL uses on your prompts, in prefill and in decode, and how long things take."""
    from remoe_cli.profile.prompts import read_prompts
    from remoe_cli.profile.run import profile

    prompts = read_prompts(data, field, limit)
    try:
        with output.progress("Profiling prompts") as progress:
            made = profile(
                model,
                prompts,
                out,
                max_new_tokens=max_new_tokens,
                max_prompt_tokens=max_prompt_tokens,
                batch_size=batch_size,
                progress=progress,
            )
    except KeyboardInterrupt:
        output.say(f"\nInterrupted. What is done is kept in {out}; the same command goes on from there.")
        raise
    spec, arrays = made.record.spec, made.arrays
    document = {
        "path": str(out),
        "model": made.record.model.path,
        "revision": made.record.model.revision,
        "prompts": made.record.dataset.prompts,
        "layers": len(spec.moe_layers),
        "experts_per_layer": spec.experts_per_layer,
        "top_k": spec.top_k,
        "prefill_tokens": int(arrays["prompt_tokens"].sum()),
        "decode_tokens": int(arrays["decode_tokens"].sum()),
    }

    def show() -> None:
        output.line(
            f"{document['prompts']} prompts: {document['prefill_tokens']:,} prefill and {document['decode_tokens']:,} decode tokens"
        )
        output.line(f"{len(spec.moe_layers)} MoE layers x {spec.experts_per_layer} experts, top-{spec.top_k}")
        output.line(f"Profile: {out}")

    output.result(document, show)

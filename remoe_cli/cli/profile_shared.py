"""What the commands of `remoe profile` share: describing hardware, and showing the profile made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from remoe_cli.cli import output

if TYPE_CHECKING:
    from remoe_cli.predict.train import PredictorRecord
    from remoe_cli.profile.latency_record import Latency
    from remoe_cli.profile.record import Profile

OutOption = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Directory to write the profile to.")]
MaxPromptTokensOption = Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Cut longer prompts to this many tokens.")]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Longest answer to a prompt, in tokens.")]
LATENCY_FROM = typer.Option(
    metavar="NAME",
    help="Take all times from a description of the hardware instead of measuring this machine: "
    "a .toml file, or a description that comes with remoe, such as 'g6e.xlarge'.",
)


def finish(made: Profile, out: Path, remarks: Sequence[str] = (), measured: Mapping[str, tuple[float, str]] | None = None) -> None:
    """Train the profile's predictor, and show what was made, with `remarks` among the warnings.

    `measured` are medians in seconds that were measured now, each with what it is of.
    """
    from remoe_cli.profile.loss_record import loss_warning

    trained = None if made.record.dataset.shard else trained_predictor(made)
    record, arrays = made.record, made.arrays
    warnings = (*record.latency.warnings, *remarks)
    if record.spec.remote is not None and (warning := loss_warning(record.loss)) is not None:
        warnings = (*warnings, warning)
    document: dict[str, Any] = {
        "path": str(out),
        "model": record.model.path,
        "revision": record.model.revision,
        "prompts": len(arrays["prompt_tokens"]),
        "shard": record.dataset.shard,
        "layers": len(record.spec.moe_layers),
        "experts_per_layer": record.spec.experts_per_layer,
        "top_k": record.spec.top_k,
        "stored": record.spec.stored and record.spec.stored.model_dump(),
        **({} if record.spec.remote is None else {"experts": record.spec.remote.form}),
        **({} if record.loss is None else {"loss": record.loss.document}),
        "routing": record.routing.model_dump(mode="json"),
        "prefill_tokens": int(arrays["prompt_tokens"].sum()),
        "decode_tokens": int(arrays["decode_tokens"].sum()),
        "predictor": trained and trained.default,
        "latency": record.latency.source,
        "warnings": list(warnings),
    }
    if (assistant := assistant_figures(made)) is not None:
        document["assistant"] = assistant
    if measured is not None:
        document["measured"] = {what: {"median_s": median_s, "of": of} for what, (median_s, of) in measured.items()}

    def show() -> None:
        if measured is not None:
            rows = [(what, f"{median_s * 1e3:,.1f} ms", of) for what, (median_s, of) in measured.items()]
            output.table("Measured", ("", "median", "of"), rows)
        output.paragraph(
            f"{document['prompts']} prompts: {document['prefill_tokens']:,} prefill and {document['decode_tokens']:,} decode tokens"
        )
        output.paragraph(f"{document['layers']} MoE layers x {document['experts_per_layer']} experts, top-{document['top_k']}")
        if record.spec.stored_as:
            output.line(record.spec.stored_as)
        if record.loss is not None:
            output.line(f"What that loses: {record.loss.sentence}")
        if assistant is not None:
            output.paragraph(
                f"Assistant {assistant['path']}: {assistant['decode_s'] * 1e3:.3g} ms for a drafted token. With --speculate auto a "
                f"token of an answer takes {assistant['passes']:.2f} passes with it, {assistant['passes_without']:.2f} without."
            )
        output.line(f"Times {record.latency.source}: {record.latency.machine}, {record.latency.measured_on}")
        if trained:
            scores = ", ".join(f"{name} {bits:.3f}" for name, bits in trained.validation_bits.items())
            scored = (
                f"Jensen-Shannon divergence in bits on {trained.validation_prompts} held-out prompts, 0 is perfect: {scores}"
                if scores
                else "Not scored: too few prompts to hold some out."
            )
            output.paragraph(f"Predictor for new prompts: {trained.default}. {scored}")
        output.line(f"Profile: {out}")

    for warning in warnings:
        output.say(f"warning: {warning}")
    output.result(document, show)


def assistant_figures(made: Profile) -> dict[str, Any] | None:
    """Say what an assistant takes for a drafted token, and what its drafts do; None if unknown."""
    from remoe_cli.plan.problem.drafting import Assisted, drafting_of

    reference, times, known = made.record.assistant, made.record.latency.assistant, drafting_of(made)
    if reference is None or times is None or Assisted("auto") not in known:
        return None
    passes, without = known[Assisted("auto")].passes, known["auto"].passes
    return {"path": reference.path, "decode_s": times.decode_s, "passes": passes, "passes_without": without}


def trained_predictor(profile: Profile) -> PredictorRecord | None:
    """Train and save the predictor of a profile; None where there are too few prompts for one."""
    with output.progress("Training the predictor"):
        from remoe_cli.predict.train import train

        return train(profile)


def described_latency(
    model: str, latency_from: str, experts: Literal["int8", "int4"] | None = None, assistant: str | None = None
) -> Latency:
    from remoe_cli.model.checkpoint import find_named
    from remoe_cli.model.spec import read_spec
    from remoe_cli.profile.hardware import latency_from as described

    with output.progress("Finding the model"):
        beside = None
        if assistant is not None:
            from remoe_cli.model.assistant import read_assistant_spec

            beside = read_assistant_spec(find_named(assistant))
        return described(latency_from, read_spec(find_named(model), experts), assistant=beside)

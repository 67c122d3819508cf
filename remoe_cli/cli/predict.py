"""`remoe predict`: which experts a new prompt will use, and how well each predictor knows that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.options import DataOption, FieldOption, ProfileArgument, PromptOption, prompts_of, read_data
from remoe_cli.cli.profile_shared import trained_predictor
from remoe_cli.cli.replacing import ReplaceOption, agree_to_replace
from remoe_cli.errors import UsageError

if TYPE_CHECKING:
    from remoe_cli.model.chat import Prompt
    from remoe_cli.predict.evaluate import Evaluation
    from remoe_cli.predict.fate import Fate
    from remoe_cli.predict.history import History, PromptFeatures, View
    from remoe_cli.profile.record import Profile

_PLACES = ("most used", "second", "third")
_LEGEND = (
    "Divergence is that of the predicted use of experts from the counted one: less is better. Remote hits are the choices that go to "
    "remote experts if each layer's half that is predicted to be used least is remote. The noise floor is what a perfect predictor "
    "would score if a prompt's tokens were drawn independently, because so few show its use only roughly; where many prompts begin "
    "alike, a predictor may score less. Ridge and neighbours are remoe's predictors; "
    "docs/explanation/prediction.md describes the others."
)

_EVALUATION, _ADVANCED = "Evaluation", "Advanced"

EXAMPLES = examples(
    "remoe predict profiles/olmoe --prompt 'Write a haiku about rivers.'",
    "remoe predict profiles/olmoe --data tomorrow.jsonl -o predicted.safetensors",
    "remoe predict profiles/olmoe --evaluate --plot scores.png",
)


def command(
    profile: ProfileArgument,
    prompt: PromptOption = None,
    data: DataOption = None,
    field: FieldOption = "prompt",
    out: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write all predictions here, as .safetensors.")] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Score all predictors on prompts of the profile instead.", rich_help_panel=_EVALUATION)
    ] = False,
    folds: Annotated[
        int, typer.Option(min=2, metavar="N", help="Parts of the profile; each is predicted from the others.", rich_help_panel=_EVALUATION)
    ] = 5,
    fate: Annotated[
        bool,
        typer.Option("--fate", help="Score Fate too: it asks the model's own routers, which it loads.", rich_help_panel=_EVALUATION),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the scores here (.png, .svg or .pdf).", rich_help_panel=_EVALUATION)
    ] = None,
    vectors_from: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Compare prompts by this model's embeddings, not by the profiled model's; needs --profiled-data.",
            rich_help_panel=_ADVANCED,
        ),
    ] = None,
    profiled_data: Annotated[
        str | None, typer.Option(metavar="FILE", help="The prompts that were profiled, for --vectors-from.", rich_help_panel=_ADVANCED)
    ] = None,
    yes: ReplaceOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Predict how often new prompts will use each expert, or score the predictors.

    The prediction is learned from the profile's prompts. The model is not run.
    """
    from remoe_cli.owned import refuse_file
    from remoe_cli.profile.record import read_profile, refuse_foreign
    from remoe_cli.recognise import arrays
    from remoe_cli.report.picture import refuse_picture

    if (prompt is not None) + (data is not None) + evaluate != 1:
        hint = "--data holds new prompts; --profiled-data the profile's own." if data else "See 'remoe predict --help'."
        raise UsageError("Give one of --prompt TEXT, --data FILE or --evaluate.", hint)
    if not evaluate and (plot or fate):
        raise UsageError("--plot and --fate belong to --evaluate.", "Add --evaluate, or leave them out.")
    if out is not None:
        refuse_file(out, arrays("prediction"))
    if plot is not None:
        refuse_picture(plot)
    if evaluate:
        refuse_foreign(profile)
    agree_to_replace(yes, *(path for path in (out, plot) if path is not None))
    with output.progress("Reading the profile"):
        read = read_profile(profile)
    profiled = None if profiled_data is None else read_data(profiled_data, field)
    with output.progress("Reading the profile's prompts"):
        from remoe_cli.predict.history import features_of, histories  # imports torch, for which a wrong path need not wait

        known = features_of(read, vectors_from, profiled)
        views = histories(read, known)
    if evaluate:
        _evaluate(read, views, _fate(read, known) if fate else None, folds, plot)
    else:
        _predict(read, views["request"], prompts_of(prompt, data, field).texts, out)


def _predict(profile: Profile, history: History, texts: tuple[Prompt, ...], out: Path | None) -> None:
    import numpy as np

    from remoe_cli.artifacts import write_arrays
    from remoe_cli.model.chat import as_text
    from remoe_cli.predict.history import features_from
    from remoe_cli.predict.train import trained

    with output.progress("Predicting"):
        predictor = trained(profile, history)
        settings = profile.record.settings
        prompts = features_from(history.prompts.table, texts, settings.max_prompt_tokens if settings else None)
        activation = predictor.predict(prompts)
        low, high = predictor.interval(prompts)
    if out is not None:
        arrays = {"activation": activation, "lower": low, "upper": high}
        write_arrays(out, {name: np.asarray(array, dtype=np.float32) for name, array in arrays.items()}, "prediction")
    layers = _layers(profile)
    document: dict[str, Any] = {
        "path": None if out is None else str(out),
        "predictor": predictor.record.default,
        "validation_bits": predictor.record.validation_bits,
        "prompts": len(texts),
        "layers": layers,
        "experts_per_layer": profile.record.spec.experts_per_layer,
        "interval": predictor.fitted.coverage,
        "most_used": [
            [
                {"expert": int(e), "share": float(row[e]), "lower": float(lo[e]), "upper": float(hi[e])}
                for e in (-row).argsort()[: len(_PLACES)]
            ]
            for row, lo, hi in zip(activation[0], low[0], high[0], strict=True)
        ],
    }

    def show() -> None:
        rows = [
            (str(layer), *(f"{x['expert']}: {x['share']:.0%} ({x['lower']:.0%} to {x['upper']:.0%})" for x in best))
            for layer, best in zip(layers, document["most_used"], strict=True)
        ]
        title = f"Most used experts (expert: share of choices) of {as_text(texts[0])[:60]!r}"
        output.table(title, ("layer", *_PLACES[: len(rows[0]) - 1]), rows)
        output.paragraph(
            f"Predictor: {predictor.record.default}. In {predictor.fitted.coverage:.0%} of cases the share is in the range in brackets."
        )
        if out is not None:
            output.line(f"All {len(texts)} predictions: {out}")

    output.result(document, show)


def _layers(profile: Profile) -> list[int]:
    routing = profile.record.routing
    return list(profile.record.spec.moe_layers if routing.layers is None else routing.layers)


def _fate(profile: Profile, known: PromptFeatures) -> Fate:
    from remoe_cli.model.checkpoint import find_profiled
    from remoe_cli.predict.fate import ask_routers

    if profile.record.vectors is not None or known.table.checkpoint.name != profile.record.model.path:
        raise UsageError(
            "Fate needs the routers of the profiled model, but this profile's vectors come from another model.", "Leave --fate out."
        )
    model = profile.record.model
    with output.progress("Asking the model's routers about every token of the prompts"):
        return ask_routers(find_profiled(model.path, model.revision), known.bags.tokens, _layers(profile))


def _evaluate(profile: Profile, views: dict[View, History], fate: Fate | None, folds: int, plot: Path | None) -> None:
    from remoe_cli.predict import evaluate as scoring

    winner = trained_predictor(profile)
    found = []
    for view, history in views.items():
        with output.progress(f"Scoring predictors ({view})") as progress:
            found.append(scoring.evaluate(history, view, k=folds, fate=fate, progress=progress))
    with output.progress("Comparing prompts in pairs"):
        pairs = scoring.similarity(views["request"])
        if plot is not None:
            from remoe_cli.report.prediction import draw

            draw(found, pairs, plot)
    document = {
        "path": str(profile.path),
        "folds": folds,
        "default": winner and winner.default,
        "validation_bits": winner.validation_bits if winner else {},
        "similarity_correlation": pairs.correlation,
        "plot": None if plot is None else str(plot),
        "evaluations": [one.model_dump(mode="json") for one in found],
    }

    def show() -> None:
        for one in found:
            _show(one)
        output.paragraph(_LEGEND)
        output.paragraph(f"Similar meaning and similar use of experts correlate with r = {pairs.correlation:.2f} over pairs of prompts.")
        if winner:
            output.paragraph(
                f"Default predictor of this profile: {winner.default} (least divergence on {winner.validation_prompts} held-out prompts)."
            )
        if plot is not None:
            output.line(f"Picture: {plot}")

    output.result(document, show)


def _show(one: Evaluation) -> None:
    rows = [
        (
            name,
            f"{score.jsd_bits:.4f}",
            f"{score.standard_error:.4f}",
            f"{score.remote_hit_share:.1%}",
            f"{score.build_s:.3f}",
            f"{score.search_ms:.2f}",
        )
        for name, score in sorted(one.predictors.items(), key=lambda item: item[1].jsd_bits)
    ]
    rows.append(("perfect (noise floor)", f"{one.noise_floor_bits:.4f}", "", f"{one.oracle_remote_hit_share:.1%}", "", ""))
    header = ("predictor", "divergence, bits", "std. error", "remote hits", "fit, s", "predict, ms")
    output.table(f"{one.view}: {one.prompts} prompts", header, rows)
    output.paragraph(f"{one.interval_nominal:.0%} intervals contain {one.interval_coverage:.1%} of the held-out frequencies.")
    output.line()

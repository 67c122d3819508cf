"""The essentials of a report in rows of text, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from remoe_cli.plan.explain.rows import baseline_columns, baseline_rows
from remoe_cli.plan.wording import VERDICT_WORDS, bought, form_text, prices, seconds
from remoe_cli.report.charts import bursts_sentence, measured_rows
from remoe_cli.report.content import Content

Rows = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def labels(content: Content) -> Iterator[tuple[str, str]]:
    """Yield (label, text) of what a report says."""
    if content.model:
        yield "model", content.model
    if (plan := content.plan) is not None:
        remote = sum(len(layer.remote) for layer in plan.layers)
        yield "verdict", VERDICT_WORDS[plan.verdict]
        yield "cost", prices(plan.cost_usd_per_request, plan.workload)
        yield "times", f"TTFT {seconds(plan.ttft_s)}, TPOT {plan.tpot_s * 1e3:.4g} ms"
        yield "main function", bought(plan.main.name, plan.instances)
        yield "remote experts", f"{remote:,} of {plan.model.experts_per_layer * len(plan.layers):,}"
        yield from (("expert form", text) for text in form_text(plan))
    if (routing := content.routing) is not None:
        yield "routing", f"{routing.prompts:,} prompts; {routing.skew.half()} of {routing.experts} experts take half of a layer's choices"
        if routing.pairs is not None:
            yield "similarity", f"r = {routing.pairs.correlation:.2f} between similar meaning and similar routing of prompts"
    if (found := content.predictors) is not None:
        name = found.record.default
        yield "predictor", f"{name}, {found.record.validation_bits[name]:.4f} bits (noise floor {found.floor_bits:.4f})"
    if content.bursts:
        yield "break-even", bursts_sentence(content.bursts)
    for start in content.starts:
        yield "cold start", f"{start.what}: {seconds(start.total_s)}"


def ways_table(content: Content) -> Rows | None:
    """Write the table of what else could run the model, where there is a plan."""
    return None if content.plan is None else ("Alternatives", baseline_columns(content.plan), baseline_rows(content.plan))


def measured_table(content: Content) -> Rows | None:
    """Write the table of predicted and measured figures, where there are receipts."""
    if content.receipts is None:
        return None
    columns = ("", "requests", "measured", "predicted", "measured /\npredicted", "95%\nwithin")
    return "Medians of the receipts", columns, tuple(measured_rows(content.receipts.figures))

"""The sections of a page: what each says, and its charts.

What the content does not have has no section.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from remoe_cli import __version__
from remoe_cli.plan.document import Plan
from remoe_cli.plan.explain.rows import layer_columns, layer_rows
from remoe_cli.plan.wording import VERDICT_WORDS, bought, capitalized, figure, form_text, prices, seconds
from remoe_cli.report import charts, costs, svg
from remoe_cli.report.content import Content
from remoe_cli.report.routing import Routing


@dataclass(frozen=True)
class Section:
    """A section: `short` is its name in the navigation, `inner` its HTML."""

    name: str
    short: str
    title: str
    inner: str
    wide: bool = False


def section(one: Section) -> str:
    """Write a section."""
    return (
        f'<section id="{one.name}" class="{"wide" if one.wide else "one"}" aria-labelledby="title-{one.name}">'
        f'<h2 id="title-{one.name}">{svg.escape(one.title)}</h2>{one.inner}</section>'
    )


def _p(text: str) -> str:
    return f"<p>{svg.escape(text)}</p>"


def header(content: Content) -> str:
    """Write the head of a page: the model, the verdict and what matters most."""
    plan = content.plan
    cards = "".join(f"<li><b>{svg.escape(value)}</b><span>{svg.escape(name)}</span></li>" for value, name in _cards(content))
    verdict = ""
    if plan is not None:
        words = svg.escape(capitalized(VERDICT_WORDS[plan.verdict]))
        verdict = f'<p class="verdict"><b>{words}.</b> {svg.escape(plan.reason)}</p>'
    title = f'<p class="eyebrow">remoe report</p><h1>{svg.escape(content.model or "Receipts")}</h1>'
    return f'<header>{title}{verdict}<ul class="cards">{cards}</ul></header>'


def _cards(content: Content) -> Iterator[tuple[str, str]]:
    """Yield (figure, what it is) of what matters most."""
    plan, routing = content.plan, content.routing
    if plan is not None:
        price, *more = prices(plan.cost_usd_per_request, plan.workload).split(", ")
        value, _, unit = price.partition(" ")
        yield value, "; ".join([unit, *more])
        yield seconds(plan.ttft_s), "to the first token (TTFT), mean"
        yield f"{figure(plan.tpot_s * 1e3)} ms", "for each further token (TPOT)"
        remote = sum(len(layer.remote) for layer in plan.layers)
        experts = plan.model.experts_per_layer * len(plan.layers)
        yield f"{remote:,} of {experts:,}", "experts in functions"
        yield bought(plan.main.name, plan.instances), "main function"
        if plan.speculate != "off":
            yield str(plan.speculate), "draft tokens of a pass"
    elif routing is not None:
        yield f"{routing.prompts:,}", "prompts"
        yield f"{routing.tokens:,}", "tokens with routing"
        yield f"{len(routing.layers)} × {routing.experts}", f"MoE layers × experts, top-{routing.top_k}"
        yield f"{routing.skew.half()} of {routing.experts}", "experts take half of the choices (median layer)"
    if content.receipts is not None:
        yield f"{len(content.receipts.figures):,}", "receipts"


def sections(content: Content) -> Iterator[Section]:
    """List the sections, in order."""
    plan, routing, table = content.plan, content.routing, content.table
    if plan is not None:
        inner = costs.section(plan, table)
        yield Section("costs", "Costs", "What it costs, and what else would", inner, wide=True)
        yield Section("placement", "Placement", "Where the experts are", _placement(plan, routing), wide=True)
    if routing is not None:
        yield Section("activation", "Use of experts", "Which experts are used", _activation(routing), wide=True)
    if plan is not None and table is not None:
        words = "What a month costs, whatever the traffic. Instances are added as the requests need them. It follows the sliders above."
        yield Section("by-traffic", "Traffic", "Cost against traffic", _p(words) + costs.traffic(plan, table))
    if content.bursts:
        words = (
            "Below the line this plan costs less than the cheapest instance that is always on and answers the requests; above it, that "
            "instance does. Burstiness is the coefficient of variation of the times between requests: 1 is random, more are bursts. Each "
            "point is simulated; the band is the range of its runs."
        )
        inner = _p(words) + _p(charts.bursts_sentence(content.bursts)) + charts.bursts(content.bursts, plan)
        yield Section("break-even", "Break-even", "Up to which traffic it is cheaper", inner)
    if plan is not None and content.frontier:
        words = "No point below the line was found. To the left plans are faster, and dearer."
        yield Section("frontier", "Frontier", "Cost of each TPOT", _p(words) + charts.frontier(content.frontier, plan))
    if routing is not None:
        words = f"In the median layer, {routing.skew.half()} of {routing.experts} experts take half of all choices."
        words += " The steeper the curve, the more experts are rarely used."
        yield Section("skew", "Skew", "How unevenly experts are used", _p(words) + charts.skew(routing))
    if routing is not None and routing.pairs is not None:
        words = "Where this cloud rises, prompts of similar meaning use similar experts, and predictors can learn that."
        words += f" The correlation is {routing.pairs.correlation:.2f}."
        yield Section("pairs", "Similarity", "Similar prompts, similar experts", _p(words) + charts.pairs(routing.pairs))
    if content.predictors is not None:
        record = content.predictors.record
        words = (
            f"Divergence of the predicted use of experts from the counted one, on {record.validation_prompts} prompts that were held out."
        )
        yield Section("predictors", "Predictors", "How well use can be predicted", _p(words) + charts.predictors(content.predictors))
    if content.starts:
        words = "What a request waits for when nothing is warm."
        if plan is not None and plan.cold_start_s:
            words += f" Together a cold start adds {seconds(plan.cold_start_s)} to the TTFT of this plan."
        yield Section("cold-start", "Cold start", "What a cold start consists of", _p(words) + charts.cold_starts(content.starts))
    if content.receipts is not None:
        yield Section("measured", "Measured", "Predicted and measured", _measured(content), wide=True)


def _figure(name: str, words: str, rest: str, controls: str) -> str:
    return (
        f'<figure aria-label="{svg.escape(words)}">{controls}<div><canvas tabindex="0" role="application" aria-roledescription="map" '
        f'aria-label="{svg.escape(f"{words}. Arrow keys move from cell to cell.")}" aria-describedby="reading-{name}"></canvas></div>'
        f'<p class="reading" id="reading-{name}" role="status" data-rest="{svg.escape(rest)}">{svg.escape(rest)}</p></figure>'
    )


_ORDER = '<label><input type="checkbox" data-order{checked}> most used experts first</label>'


def _placement(plan: Plan, routing: Routing | None) -> str:
    places = [("remote", "in expert functions", sum(len(layer.remote) for layer in plan.layers))]
    gpu = sum(len(layer.gpu) for layer in plan.layers)
    cpu = plan.model.experts_per_layer * len(plan.layers) - gpu - places[0][2]
    places += [("cpu", "in CPU memory of the main function", cpu), ("gpu", "on its GPU", gpu)]
    there = [(kind, words, count) for kind, words, count in places if count]
    order = _ORDER.format(checked=" checked") if routing is not None else ""
    rest = "Point at an expert, or move with the arrow keys, to see where it is and what that costs. Layers are numbered as in the model."
    return (
        "".join(_p(f"Form of the experts in functions: {text}.") for text in form_text(plan))
        + svg.legend(("box", kind, f"{count:,} {words}") for kind, words, count in there)
        + _figure("placement", "Where each expert of each layer is", rest, f'<div class="controls">{order}</div>')
        + svg.details("Layers as a table", svg.table("Layers", layer_columns(plan), layer_rows(plan)))
    )


def _activation(routing: Routing) -> str:
    choices = "".join(f'<option value="{index}">{svg.escape(use.title)}</option>' for index, use in enumerate(routing.uses))
    choice = f"<label>Tokens <select>{choices}</select></label>" if len(routing.uses) > 1 else ""
    words = "A cell is darker (in a dark page, brighter) the more tokens use the expert."
    if (groups := routing.groups) is not None:
        kind = "meaning" if groups.by_meaning else "routing"
        words += (
            f" The prompts are in {len(groups.sizes)} groups of similar {kind}: the routing of a prompt is on average {groups.within:.3f} "
            f"alike to that of its group, and {groups.across:.3f} to that of all prompts (1 is equal)."
        )
    most = 2**routing.octaves
    ticks = [(0, f"1/{most} or less"), (210, "even use"), (420, f"{most} × or more")]
    scale = (
        '<svg class="scale" viewBox="0 0 420 34" role="img" aria-label="Scale of use, from rare to frequent">'
        '<rect width="420" height="14" fill="url(#ramp)"/>'
        + "".join(svg.text(x, 29, text, f"tick {('', 'mid', 'end')[index]}") for index, (x, text) in enumerate(ticks))
        + "</svg>"
    )
    first = routing.uses[0].shares
    rows = [
        (str(layer), *(f"{expert}: {100 * row[expert]:.1f}%" for expert in np.argsort(-row, kind="stable")[:4]), f"{100 * row.min():.2g}%")
        for layer, row in zip(routing.layers, first, strict=True)
    ]
    columns = ("layer", *("most used", "second", "third", "fourth")[: min(4, routing.experts)], "least used")
    rest = "Point at a cell, or move with the arrow keys, to see its figures."
    return (
        _p(words)
        + _figure(
            "activation",
            "How often each expert of each layer is used",
            rest,
            f'<div class="controls">{choice}{_ORDER.format(checked="")}</div>',
        )
        + scale
        + svg.details("Most used experts as a table", svg.table("Share of all tokens that use an expert", columns, rows))
    )


def _measured(content: Content) -> str:
    assert content.receipts is not None
    figures = content.receipts.figures
    drawn = list(charts.measured(figures))
    cold = sum(one.is_cold for one in figures)
    words = f"{len(figures):,} requests, {f'{cold:,}' if cold else 'none'} of which waited for something to start."
    if drawn:
        words += " Each mark is a request; on the dashed line the plan's prediction is right, in the band it is within 20%."
    if len(figures) > charts.MOST_MARKS:
        words += f" {charts.MOST_MARKS:,} of them are drawn; the table has all."
    if content.receipts.without:
        words += f" {content.receipts.without:,} documents had no receipt."
    columns = ("", "requests", "median measured", "median predicted", "measured / predicted", "95% within")
    marks = svg.legend((("dot", "warm", "warm"), ("cross", "cold", "cold: waited for a start"))) if drawn else ""
    return (
        _p(words)
        + f'<div class="split">{"".join(f"<figure>{one}</figure>" for one in drawn)}</div>'
        + marks
        + svg.table("Measured and predicted", columns, charts.measured_rows(figures))
    )


def footer(content: Content) -> str:
    """Write the foot of a page: what it is made from, and what was assumed or left out."""
    rows = "".join(
        f'<tr><th scope="row">{svg.escape(what)}</th><td>{svg.escape(name)}</td><td>{svg.escape(digest)}</td></tr>'
        for what, name, digest in content.sources
    )
    notes = "".join(_p(text) for text in (*content.left_out, *(content.plan.notes if content.plan else ())))
    made = f"Made by remoe {svg.escape(__version__)}. The page loads nothing and sends nothing."
    script = "<noscript><p>The maps and the sliders need JavaScript; all figures are in the tables.</p></noscript>"
    return f"<footer><h2>Made from</h2><table><tbody>{rows}</tbody></table>{notes}<p>{made}</p>{script}</footer>"

"""What a plan says of quantised weights.

That is how they are stored and read, in which form functions compute experts, and why in that one.
"""

from __future__ import annotations

from collections.abc import Iterator

from remoe_cli.plan.assess.unquantised import scanned
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.problem import Placement, Problem
from remoe_cli.plan.problem.request import forms_of
from remoe_cli.plan.wording import dollars, seconds
from remoe_cli.units import size

_SAME = 5e-4  # relative difference below which two plans are told as alike


def form_notes(whole: Problem, chosen: Problem, placement: Placement, aim: Aim, searched: bool) -> Iterator[str]:
    """Say so in sentences; nothing where no weights are quantised.

    `chosen` is the problem in the plan's form, of the forms of `whole`. With `searched`, the best known plan in the other form is looked
    for, to say what it costs.
    """
    spec = chosen.spec
    if spec.stored_as is None:
        return
    if spec.remote is not None:
        yield f"{spec.stored_as} The profile says what that loses."
    else:
        yield spec.read_as or f"{spec.stored_as} So this plan is for the copy."
    is_quantised = spec.fetched_expert_bytes != spec.expert_bytes
    if is_quantised and any(layer.remote for layer in placement.layers):
        yield f"{_form(chosen)} {_why(whole, chosen, placement, aim, searched)}"
    if spec.remote is None:
        yield "Whole models that stay quantised are among the alternatives."


def _form(problem: Problem) -> str:
    spec = problem.spec
    if spec.is_packed:
        stored, plain = size(spec.fetched_expert_bytes), size(spec.expert_bytes)
        return f"Expert functions have their experts packed: they compute from the stored bytes, {stored} an expert instead of {plain}."
    return (
        f"Expert functions have their experts ready: each is dequantised when it is loaded, and then takes {size(spec.expert_bytes)} of "
        f"memory instead of {size(spec.read_expert_bytes)}."
    )


def _why(whole: Problem, chosen: Problem, placement: Placement, aim: Aim, searched: bool) -> str:
    spec = chosen.spec
    name = spec.remote.form.upper() if spec.remote is not None else spec.stored.format if spec.stored is not None else ""
    other = next((form for form in forms_of(whole) if form.spec.is_packed != spec.is_packed), None)
    if other is not None:
        return _compared(other.with_drafts(chosen.speculate), aim.value(evaluate(chosen, placement)), aim, searched)
    if spec.is_packed:
        return f"Experts in {name} always are, for the memory that this saves."
    if spec.stored is not None and spec.stored.either:
        return "The profile has no times of packed ones, so only this form could be weighed."
    return f"They cannot be packed: functions have no product for {name} as this checkpoint stores it."


def _compared(other: Problem, own: float, aim: Aim, searched: bool) -> str:
    """Compare the plan with the best known one in the other form."""
    form = "Packed" if other.spec.is_packed else "Ready"
    if not searched:
        return f"{form} ones were weighed too, and no plan with them is better."
    if (found := scanned(other, aim)) is None:
        return f"{form} ones were weighed too, and no plan with them that the fast scan finds keeps the limits."
    value = aim.value(evaluate(other, found))
    difference = value / own - 1 if own > 0 else 0.0
    against = "as much" if abs(difference) < _SAME else f"{abs(difference):.1%} {'more' if difference > 0 else 'less'}"
    figure = f"costs {dollars(value)} a request" if aim.objective == "cost" else f"has a {aim.objective.upper()} of {seconds(value)}"
    return f"{form} ones were weighed too: the best plan with them that the fast scan finds {figure}, {against}."

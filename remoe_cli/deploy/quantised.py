"""Say and judge what experts that are quantised on request lose and save, before they are deployed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from remoe_cli.deploy.inputs import Inputs
from remoe_cli.errors import InfeasibleError, OverBudgetError
from remoe_cli.plan.problem.request import request_of
from remoe_cli.plan.wording import dollars
from remoe_cli.profile.loss_record import QuantisationLoss, refuse_loss


@dataclass(frozen=True)
class Terms:
    """What quantised experts change.

    as_stored_usd   cost of a request in the plan of the same request without; None where there is no such plan
    """

    form: str
    loss: QuantisationLoss | None
    cost_usd: float
    as_stored_usd: float | None

    @property
    def document(self) -> dict[str, Any]:
        return {
            "experts": self.form,
            "loss": self.loss and self.loss.document,
            "cost_usd_per_request": self.cost_usd,
            "as_stored_usd_per_request": self.as_stored_usd,
        }

    @property
    def sentences(self) -> tuple[str, str]:
        """The loss and the saving, for people."""
        lost = "not measured" if self.loss is None else self.loss.sentence
        return f"Remote experts are in {self.form.upper()}. What that loses: {lost}.", f"What that saves: {self._saved}."

    @property
    def _saved(self) -> str:
        if self.as_stored_usd is None:
            return "there is no plan without it that keeps the targets"
        if self.as_stored_usd <= 0:
            return "nothing, as requests cost nothing"
        change = 1 - self.cost_usd / self.as_stored_usd
        without = f"a request costs {dollars(self.cost_usd)}, and {dollars(self.as_stored_usd)} with experts as they are"
        return f"{change:.1%}; {without}" if change > 0 else f"nothing; {without}"


def terms(inputs: Inputs) -> Terms | None:
    """Work out what a plan's quantised experts lose and save; None where none are quantised on request.

    The plan without is made for the same requests and targets, but for a budget that none keeps; a forced placement is compared with one
    of as many remote experts.
    """
    plan, profile, catalog = inputs
    if (form := plan.model.experts) is None:
        return None
    from remoe_cli.plan.build import make_plan  # loads the solver, which nothing else needs here

    other: float | None = None
    if (without := profile.as_stored()) is not None:
        request = replace(request_of(plan), examine=False)
        if plan.method == "given":  # a forced share is asked for again as it is
            request = replace(request, remote_share=plan.remote_share)
        # Over the budget, the cheapest plan tells what is saved.
        cheapest = replace(request, aim=replace(request.aim, objective="cost", budget_usd=None))
        for asked in (request, cheapest):
            try:
                other = make_plan(without, catalog, asked).cost_usd_per_request
                break
            except OverBudgetError:
                continue
            except InfeasibleError:
                break
    return Terms(form, profile.record.loss, plan.cost_usd_per_request, other)


def agreed_terms(inputs: Inputs, accepted: bool, say: Callable[[str], None]) -> Terms | None:
    """Say what a plan's quantised experts lose and save, and refuse what loses too much.

    `accepted` lets it pass.

    Raises: UsageError for too much loss.
    """
    if (found := terms(inputs)) is not None:
        for sentence in found.sentences:
            say(sentence)
        refuse_loss(found.form, found.loss, accepted)
    return found

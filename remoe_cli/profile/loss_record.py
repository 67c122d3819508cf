"""What a model loses by experts that are quantised on request, and how much of that is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from remoe_cli.artifacts import NonNegative, Part, Positive, Tokens
from remoe_cli.errors import UsageError

# docs/how-to/lower-the-bill.md says where these come from.
MOST_DIVERGENCE_BITS = 0.01
MOST_PERPLEXITY_RISE = 0.01


class QuantisationLoss(Part):
    """The model with all routed experts quantised, held against the same model without.

    They are compared on prompts of the profile.

    Quantising takes each weight to the nearest number and learns nothing from data, so every prompt is held out. A plan keeps some experts
    as they are: it loses at most about this.

    prompts                  how many were compared
    text_tokens              tokens of the prompts that were predicted, for the perplexities
    answer_tokens            tokens of the unquantised model's greedy answers, for the rest
    rise_error               standard error of `perplexity_rise`: of so few tokens it is not known better
    divergence_bits          mean Jensen-Shannon divergence between the two distributions of the next token, from 0 to 1
    agreement                share of answer tokens at which both choose the same
    """

    prompts: Tokens
    text_tokens: Tokens
    answer_tokens: Tokens
    unquantised_perplexity: Positive
    perplexity: Positive
    rise_error: NonNegative
    divergence_bits: NonNegative
    agreement: NonNegative

    @property
    def perplexity_rise(self) -> float:
        """By how much the perplexity is higher, as a share; below 0 where it is lower."""
        return self.perplexity / self.unquantised_perplexity - 1

    @property
    def sentence(self) -> str:
        """The loss for people."""
        rise = f"{self.perplexity_rise:+.2%}, give or take {self.rise_error:.2%}"
        return (
            f"perplexity {self.unquantised_perplexity:.4g} -> {self.perplexity:.4g} ({rise}), next tokens differ by"
            f" {self.divergence_bits:.2g} bits (Jensen-Shannon), the same greedy choice at {self.agreement:.1%} of"
            f" {self.answer_tokens:,} tokens; {self.prompts} prompts, all experts quantised"
        )

    @property
    def excess(self) -> str | None:
        """Say which limit the loss exceeds; None where it exceeds none."""
        if self.divergence_bits > MOST_DIVERGENCE_BITS:
            return f"next tokens differ by {self.divergence_bits:.2g} bits, and {MOST_DIVERGENCE_BITS:g} is the most"
        if self.perplexity_rise - 2 * self.rise_error > MOST_PERPLEXITY_RISE:
            return (
                f"the perplexity is {self.perplexity_rise:.1%} higher, give or take {self.rise_error:.1%}, and"
                f" {MOST_PERPLEXITY_RISE:.0%} is the most"
            )
        return None

    @property
    def document(self) -> dict[str, Any]:
        """The loss for programs, with what follows from its figures."""
        return self.model_dump() | {"perplexity_rise": self.perplexity_rise, "excess": self.excess}


def worst_loss(losses: Sequence[QuantisationLoss | None]) -> QuantisationLoss | None:
    """Choose the loss that holds for all parts of a profile, in whatever order they are.

    It is one over a limit; where none is, but one was not measured, None; else that of the largest divergence.
    """
    measured = [loss for loss in losses if loss is not None]
    worst = max(measured, key=lambda loss: (loss.excess is not None, loss.divergence_bits, *loss.model_dump().values()), default=None)
    return worst if worst is None or worst.excess is not None or len(measured) == len(losses) else None


def loss_warning(loss: QuantisationLoss | None) -> str | None:
    """Warn of a loss that `refuse_loss` refuses; None where it does not."""
    excess = _excess(loss)
    return excess and f"A deployment of quantised experts needs --accept-loss here: {excess}."


def _excess(loss: QuantisationLoss | None) -> str | None:
    return "nobody has measured what they lose" if loss is None else loss.excess


def refuse_loss(form: str, loss: QuantisationLoss | None, accepted: bool) -> None:
    """Refuse experts whose quantising loses too much, unless that is accepted.

    Raises: UsageError that names the limit, also where the loss was not measured.
    """
    if accepted:
        return
    if (excess := _excess(loss)) is not None:
        raise UsageError(
            f"Experts in {form.upper()} change the model too much: {excess}.",
            "Profile without --experts, or with another form; or accept it with --accept-loss.",
        )

"""What quantised experts lose: held against the same figures worked out another way."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from remoe_cli.errors import ModelError, UsageError
from remoe_cli.function.dequantise import dequantise
from remoe_cli.function.expert_ffn import widen
from remoe_cli.model.experts import expert_layers
from remoe_cli.model.quantise import INT4, quantise
from remoe_cli.profile import loss
from remoe_cli.profile.loss_record import QuantisationLoss, refuse_loss, worst_loss
from tests.support.families import build

PROMPTS = [list(range(1, 12)), [7, 3], [5], list(range(30, 50))]


def test_it_is_what_a_second_model_with_quantised_experts_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "ANSWER_TOKENS", 6)
    model = build("mixtral", torch.float32, num_hidden_layers=3)
    model.generation_config.eos_token_id = None
    other = copy.deepcopy(model)
    for layer in expert_layers(other):
        for parameter in layer.parameters().values():
            for row in range(layer.experts):
                stored = quantise(parameter[row].detach().numpy(), INT4, "float32")
                parameter.data[row] = torch.from_numpy(widen(dequantise("words", stored, "float32"), "float32"))
    shares: list[float] = []
    matrices: list[int] = []
    monkeypatch.setattr(loss, "quantise", lambda weights, *rest: matrices.append(hash(weights.tobytes())) or quantise(weights, *rest))
    found = loss.measure_loss(model, PROMPTS, INT4, shares.append)

    own, quantised, apart, same, answered, text = 0.0, 0.0, 0.0, 0, 0, 0
    differences: list[Tensor] = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            for _ in range(6):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            p, q = (x(ids).logits[0, :-1].double().softmax(-1) for x in (model, other))
        begin = len(prompt) - 1
        own -= float(p[torch.arange(begin), ids[0, 1 : begin + 1]].log().sum())
        quantised -= float(q[torch.arange(begin), ids[0, 1 : begin + 1]].log().sum())
        differences.append((p.log() - q.log())[torch.arange(begin), ids[0, 1 : begin + 1]])
        text, answered = text + begin, answered + 6
        middle = (p + q)[begin:] / 2

        def bits(x: Tensor, middle: Tensor = middle, begin: int = begin) -> float:
            return float((x[begin:] * (x[begin:] / middle).log2()).sum())

        apart += (bits(p) + bits(q)) / 2
        same += int((p[begin:].argmax(-1) == q[begin:].argmax(-1)).sum())
    assert (found.prompts, found.text_tokens, found.answer_tokens) == (4, text, answered)
    assert found.unquantised_perplexity == pytest.approx(math.exp(own / text), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(quantised / text), rel=1e-5)
    ratios = torch.cat(differences)
    error = float(ratios.std(unbiased=False)) / math.sqrt(text) * found.perplexity / found.unquantised_perplexity
    assert found.rise_error == pytest.approx(error, rel=1e-3)
    assert found.divergence_bits == pytest.approx(apart / answered, rel=1e-3) and found.divergence_bits > 0
    assert found.agreement == pytest.approx(same / answered)
    # Equal steps, one for each layer: what is left is told from how long the last ones took.
    assert len(shares) == 4 and shares[0] == pytest.approx(1 / 3) and np.allclose(np.diff(shares), 2 / 9)
    # For the texts of all prompts together, each matrix is quantised once.
    assert len(matrices) == len(set(matrices)) > 2 * 2 * 3


def test_prompts_that_predict_nothing_are_refused() -> None:
    with pytest.raises(ModelError, match="one token each"):
        loss.measure_loss(build("mixtral", torch.float32), [[1], [2]], INT4)


def measured_with(change: Callable[[Tensor, bool, int], None], monkeypatch: pytest.MonkeyPatch) -> QuantisationLoss:
    """Measure a model whose logits are changed: `change` gets those of a text, whether experts are quantised, and where answers begin."""
    monkeypatch.setattr(loss, "ANSWER_TOKENS", 3)
    model, logits, passes = build("mixtral", torch.float32), loss._logits, itertools.count()

    def changed(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
        made, quantised = logits(model, ids, mask).clone(), bool(next(passes) % 2)
        for row, prompt in zip(made, sorted(PROMPTS[:2], key=len), strict=True):
            change(row, quantised, len(prompt) - 1)
        return made

    monkeypatch.setattr(loss, "_logits", changed)
    return loss.measure_loss(model, PROMPTS[:2], INT4)


def no_numbers(row: Tensor, quantised: bool, answer: int) -> None:
    row[answer if quantised else len(row) :] = math.nan


def all_no_numbers(row: Tensor, quantised: bool, answer: int) -> None:
    row[:] = math.nan if quantised else row


def infinite_loss(row: Tensor, quantised: bool, answer: int) -> None:
    row[:, :50] = -math.inf  # the prompts' own tokens


def unlikely(row: Tensor, quantised: bool, answer: int) -> None:
    row[:, 0] = 1e30  # a perplexity that no float holds


@pytest.mark.parametrize("change", [no_numbers, all_no_numbers, infinite_loss, unlikely])
def test_predictions_that_are_no_numbers_never_pass(change: Callable[[Tensor, bool, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no finite numbers"):
        measured_with(change, monkeypatch)


def test_tokens_without_probability_add_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models mask what pads their vocabulary."""

    def masked(row: Tensor, quantised: bool, answer: int) -> None:
        row[:, -8:] = -math.inf

    def nearly_masked(row: Tensor, quantised: bool, answer: int) -> None:
        row[:, -8:] = -80.0

    with monkeypatch.context() as patch:
        found = measured_with(masked, patch)
    assert found.divergence_bits == pytest.approx(measured_with(nearly_masked, monkeypatch).divergence_bits, rel=1e-4) != 0


def lost(perplexity: float = 10.0, bits: float = 0.0, error: float = 0.001) -> QuantisationLoss:
    return QuantisationLoss(
        prompts=1,
        text_tokens=10,
        answer_tokens=10,
        unquantised_perplexity=10.0,
        perplexity=perplexity,
        rise_error=error,
        divergence_bits=bits,
        agreement=0.5,
    )


def test_the_worst_loss_of_several_is_the_same_in_any_order() -> None:
    small, larger, dear, much = lost(bits=0.001), lost(9.0, bits=0.002), lost(10.2, bits=0.0001), lost(bits=0.02)
    for losses, worst in (
        ((small, larger), larger),
        ((small, dear, larger), dear),
        ((dear, much, None), much),
        ((small, None), None),
        ((None, None), None),
    ):
        assert {worst_loss(order) for order in itertools.permutations(losses)} == {worst}


def test_too_much_is_refused_unless_it_is_accepted() -> None:
    refuse_loss("int8", lost(10.09, 0.0099), accepted=False)
    refuse_loss("int8", lost(9.0), accepted=False)
    refuse_loss("int8", lost(10.2, error=0.006), accepted=False)  # perhaps it is less than 1%
    for found, why in (
        (lost(bits=0.011), "0.011 bits, and 0.01 is the most"),
        (lost(10.2), "2.0% higher, give or take 0.1%, and 1% is the most"),
        (None, "nobody"),
    ):
        with pytest.raises(UsageError, match=f"Experts in INT8 change the model too much: .*{why}"):
            refuse_loss("int8", found, accepted=False)
        refuse_loss("int8", found, accepted=True)
    assert "perplexity 10 -> 10.2 (+2.00%, give or take 0.10%)" in lost(10.2).sentence and np.isclose(lost(10.2).perplexity_rise, 0.02)

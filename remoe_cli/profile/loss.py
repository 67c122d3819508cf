"""Measuring what a model loses by experts that are quantised on request.

The model answers some prompts greedily. Then both models predict the same tokens: the prompts' and the answers'. The quantised model is
never in memory: where its pass comes to an expert, that one is quantised, used for the rows of all texts, and forgotten.
So each is quantised once. The logits of both models are in memory together: of 16 texts of at most 160 tokens, with 262,144 tokens in
the vocabulary, 1.3 GB each in 16 bits. The weights of such a model take many times that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from remoe_cli import interrupts
from remoe_cli.errors import ModelError
from remoe_cli.function.dequantise import dequantise
from remoe_cli.function.expert_ffn import widen
from remoe_cli.model.experts import ExpertLayer, Runner, attach, expert_layers, run_expert, run_experts
from remoe_cli.model.ffn import from_storage, to_storage
from remoe_cli.model.quantise import Integers, quantise
from remoe_cli.profile.loss_record import QuantisationLoss
from remoe_cli.profile.routing import RoutingRecorder

PROMPTS, TEXT_TOKENS, ANSWER_TOKENS = 16, 128, 32
_TOGETHER = 4  # texts of like length that have little padding, where no expert is quantised


def measure_loss(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], to: Integers, report: Callable[[float], None] = lambda share: None
) -> QuantisationLoss:
    """Compare a loaded model with the same model with quantised experts, on the token ids of prompts.

    What is attached to the model's experts hook is replaced by what runs them as they are. `report` gets the share that is done.

    Raises: ModelError for prompts too short to predict anything, for predictions that are no numbers, and what `quantise` raises.
    """
    if not any(len(prompt) > 1 for prompt in prompts):
        raise ModelError("The prompts have one token each, so what quantising loses cannot be measured.", "Profile with longer prompts.")
    plain = _plain()
    try:
        with torch.inference_mode():
            attach(model, plain)
            texts = sorted(_answered(model, prompts), key=lambda text: len(text.ids))
            report(1 / 3)
            few = [texts[start : start + _TOGETHER] for start in range(0, len(texts), _TOGETHER)]
            own = [row for some in few for row in _logits(model, *_padded(some))]
            ids, mask = _padded(texts)
            quantised = _of_texts(quantised_runner(to), mask.to(model.device))
            attach(model, _counted(quantised, len(expert_layers(model)), report))
            total = _Sums().plus(texts, own, list(_logits(model, ids, mask)))
    finally:
        attach(model, plain)
    return _loss(total, len(texts))


def _loss(total: _Sums, prompts: int) -> QuantisationLoss:
    """Compute the loss from its sums.

    Raises: ModelError for sums that are no finite numbers: nothing compares with them, so they would pass every limit.
    """
    if not all(map(math.isfinite, (total.own_loss, total.quantised_loss, total.squares, total.divergence_bits))):
        raise _no_numbers()
    try:
        own, quantised = (math.exp(loss / total.text_tokens) for loss in (total.own_loss, total.quantised_loss))
        rise_error = total.rise_error
    except OverflowError:
        raise _no_numbers() from None
    return QuantisationLoss(
        prompts=prompts,
        text_tokens=total.text_tokens,
        answer_tokens=total.answer_tokens,
        unquantised_perplexity=own,
        perplexity=quantised,
        rise_error=rise_error,
        divergence_bits=max(0.0, total.divergence_bits) / total.answer_tokens,
        agreement=total.agreed / total.answer_tokens,
    )


def _no_numbers() -> ModelError:
    return ModelError(
        "What quantising loses cannot be measured: the probabilities that the model gives to tokens of the prompts and answers, with or "
        "without quantised experts, are no finite numbers.",
        "Profile without --experts, or with other prompts.",
    )


@dataclass(frozen=True)
class _Text:
    """Token ids of a prompt and its answer; the answer begins at `answer`."""

    ids: Sequence[int]
    answer: int


def _plain() -> Runner:
    recorder = RoutingRecorder()

    def run(layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        interrupts.check()
        out = recorder(layer, hidden, index, weights)
        recorder.seen.clear()
        return out

    return run


def _counted(run: Runner, calls: int, report: Callable[[float], None]) -> Runner:
    """Report after each of so many calls of a runner, for two thirds of the work: quantising is most of it, so time left can be told."""
    done = itertools.count(1)

    def counted(layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = run(layer, hidden, index, weights)
        report((1 + 2 * next(done) / calls) / 3)
        return out

    return counted


def quantised_runner(to: Integers) -> Runner:
    """Make a runner whose experts are quantised when they are used, and forgotten."""

    def away(layer: ExpertLayer, rows: dict[int, Tensor]) -> Callable[[], dict[int, Tensor]]:
        outputs = {}
        for expert, x in rows.items():
            interrupts.check()
            outputs[expert] = run_expert(_one_quantised(layer, expert, to), 0, x)
        return lambda: outputs

    return lambda layer, hidden, index, weights: run_experts(layer, hidden, index, weights, {}, away)


def _of_texts(run: Runner, mask: Tensor) -> Runner:
    """Let no expert compute what is padded in the batch of `mask` [B, T]."""
    padding = mask.reshape(-1, 1) == 0
    return lambda layer, hidden, index, weights: run(layer, hidden, index.masked_fill(padding, layer.experts), weights)


def _one_quantised(layer: ExpertLayer, expert: int, to: Integers) -> ExpertLayer:
    """Make a layer of one expert, whose matrices are what the function's are."""
    module = type(layer.module).__new__(type(layer.module))
    module.__dict__.update({**layer.module.__dict__, "_parameters": dict(layer.module._parameters)})
    for name, parameter in layer.parameters().items():
        own = parameter[expert].cpu()
        if not name.endswith("_bias"):
            dtype = str(own.dtype).removeprefix("torch.")
            matrix = own.T if layer.module.is_transposed else own
            stored = dequantise(to.form, quantise(widen(to_storage(matrix), dtype), to, dtype), dtype)
            own = from_storage(stored, own.dtype)
            own = own.T.contiguous() if layer.module.is_transposed else own
        module._parameters[name] = nn.Parameter(own[None], requires_grad=False)
    return replace(layer, module=module)


def _answered(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Iterator[_Text]:
    """Let the model answer each prompt greedily."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts]).to(model.device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts]).to(model.device)
    ends = model.generation_config.eos_token_id
    output: Any = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        disable_compile=True,
        pad_token_id=model.generation_config.pad_token_id or 0,
    )
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    for prompt, answer in zip(prompts, output[:, length:].tolist(), strict=True):
        end = next((place + 1 for place, token in enumerate(answer) if token in stops), len(answer))
        yield _Text((*prompt, *answer[:end]), len(prompt))


def _padded(texts: Sequence[_Text]) -> tuple[Tensor, Tensor]:
    """Put texts into one batch, with its mask: [B, T] both.

    What is padded follows a text, so nothing before it sees it.
    """
    length = max(len(text.ids) for text in texts)
    ids = torch.tensor([[*text.ids, *[0] * (length - len(text.ids))] for text in texts])
    return ids, torch.tensor([[1] * len(text.ids) + [0] * (length - len(text.ids)) for text in texts])


def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Predict each next token."""
    logits: Tensor = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    return logits


@dataclass(frozen=True)
class _Sums:
    """Sums over tokens: losses in nats and squares of their differences over the prompts', the rest over the answers'."""

    text_tokens: int = 0
    answer_tokens: int = 0
    own_loss: float = 0.0
    quantised_loss: float = 0.0
    squares: float = 0.0
    divergence_bits: float = 0.0
    agreed: int = 0

    @property
    def rise_error(self) -> float:
        """The standard error of the ratio of both perplexities."""
        mean = (self.quantised_loss - self.own_loss) / self.text_tokens
        variance = max(0.0, self.squares / self.text_tokens - mean**2)
        return math.exp(mean) * math.sqrt(variance / self.text_tokens)

    def plus(self, texts: Sequence[_Text], own: Sequence[Tensor], quantised: Sequence[Tensor]) -> _Sums:
        """Add texts with the logits of both models, [T, V] for each text."""
        total = self
        for text, ours, theirs in zip(texts, own, quantised, strict=True):
            last = len(text.ids) - 1
            p, q = (x[:last].float().log_softmax(dim=-1) for x in (ours, theirs))
            nexts = torch.tensor(text.ids[1:]).to(p.device)[:, None]
            said = text.answer - 1  # from here on, what is predicted is the answer
            losses = [-x.gather(1, nexts)[:said].double() for x in (p, q)]
            middle = torch.logaddexp(p[said:], q[said:]) - math.log(2)
            apart = sum(float(_weighted(x[said:], middle).double().sum()) for x in (p, q))
            same = int((p[said:].argmax(dim=-1) == q[said:].argmax(dim=-1)).sum())
            total = _Sums(
                total.text_tokens + said,
                total.answer_tokens + last - said,
                total.own_loss + float(losses[0].sum()),
                total.quantised_loss + float(losses[1].sum()),
                total.squares + float((losses[1] - losses[0]).square().sum()),
                total.divergence_bits + apart / 2 / math.log(2),
                total.agreed + same,
            )
        return total


def _weighted(x: Tensor, middle: Tensor) -> Tensor:
    """Compute the terms of x's divergence from `middle`, both log-probabilities; a token without probability has none.

    Shapes: all [T, V].
    """
    return (x.exp() * (x - middle)).masked_fill(x == -math.inf, 0.0)

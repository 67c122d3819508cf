"""Times whole forward passes, and divides each among its layers' non-expert modules and its experts.

An expert takes longer in a pass than alone in a loop: other work has taken the caches and let the threads go to sleep. So both parts are
timed in the same passes, and their sum is what a pass takes. Where the other modules are on an accelerator and the experts beside it, the
copies between the two are a third part. Experts that are on accelerators themselves (a device map put them there) take no part: remoe
would not have them there, and latency.py times them on the CPU alone.

Source: method.md, section 2.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from remoe_cli import interrupts
from remoe_cli.model.exchange import Exchange
from remoe_cli.model.experts import ExpertLayer, attach, expert_layers, run_expert, run_experts
from remoe_cli.profile.latency_record import LayerTimes

PROMPT_TOKENS = (16, 64, 192)
_CACHED_TOKENS = 64
ROUNDS = 3  # each of them times everything, so that a busy spell of the machine is in a part of all figures
_FORWARD_S, _PASSES_S = 0.17, 5.0  # of forward passes for one setting in a round, and in all rounds


@dataclass(frozen=True)
class ExpertCall:
    """One expert in a pass: the number of its hidden layer, its rows, and what they took."""

    layer: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    layers_s   seconds of each decoder layer without its experts and copies, then of the rest
    copies_s   seconds of the copies of each MoE layer, both ways together; none on a CPU
    """

    layers_s: tuple[float, ...]
    experts: tuple[ExpertCall, ...]
    copies_s: tuple[float, ...] = ()

    @property
    def whole_s(self) -> float:
        return sum(self.layers_s) + sum(call.seconds for call in self.experts) + sum(self.copies_s)


@dataclass(frozen=True)
class PassTimes:
    """Passes of one token after a cached prompt, and of prompts of PROMPT_TOKENS.

    names   of the decoder layers
    """

    names: tuple[str, ...]
    decode: tuple[Pass, ...]
    prefill: tuple[tuple[Pass, ...], ...]

    @property
    def nonexpert(self) -> LayerTimes:
        """The medians of each layer's non-expert modules."""
        settings = (self.decode, *self.prefill)
        columns = [[statistics.median(times) for times in zip(*(one.layers_s for one in passes), strict=True)] for passes in settings]
        wholes = [[one.whole_s for one in passes] for passes in settings]
        return LayerTimes(
            names=(*self.names, "rest"),
            tokens=(0, *PROMPT_TOKENS),
            seconds=tuple(zip(*columns, strict=True)),
            spread=max(statistics.median(seconds) / min(seconds) for seconds in wholes),
        )

    @property
    def copies(self) -> list[tuple[int, float]]:
        """The tokens of a pass, and the median of one copy in it, one way; none on a CPU."""
        settings = zip((1, *PROMPT_TOKENS), (self.decode, *self.prefill), strict=True)
        taken = [(tokens, [s / 2 for one in passes for s in one.copies_s]) for tokens, passes in settings]
        return [(tokens, statistics.median(seconds)) for tokens, seconds in taken if seconds]


@dataclass
class _TimedExchange(Exchange):
    """Copies one after the other, and notes what they take."""

    seconds: float = 0.0

    def to_host(self, *tensors: Tensor) -> Callable[[], list[Tensor]]:
        start = now(tensors[0].device)
        arrived = super().to_host(*tensors)()
        self.seconds += time.perf_counter() - start
        return lambda: arrived

    def to_device(self, device: torch.device, *tensors: Tensor) -> list[Tensor]:
        start = time.perf_counter()
        arrived = super().to_device(device, *tensors)
        self.seconds += now(device) - start
        return arrived


@dataclass
class _Experts:
    """Runs all experts on the CPU, and notes what each takes, and the copies of a layer.

    none   let them take no time instead
    """

    none: bool
    calls: list[ExpertCall] = field(default_factory=list)
    copies: list[tuple[int, float]] = field(default_factory=list)
    _exchange: _TimedExchange = field(default_factory=_TimedExchange)

    def __call__(self, layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self._exchange.seconds = 0.0
        out = run_experts(layer, hidden, index, weights, {}, self._run, self._exchange)
        if hidden.device.type != "cpu":
            self.copies.append((layer.layer, self._exchange.seconds))
        return out

    def _run(self, layer: ExpertLayer, rows: dict[int, Tensor]) -> Callable[[], dict[int, Tensor]]:
        return lambda: rows if self.none else {expert: self._timed(layer, expert, x) for expert, x in rows.items()}

    def _timed(self, layer: ExpertLayer, expert: int, x: Tensor) -> Tensor:
        start = time.perf_counter()
        out = run_expert(layer, expert, x)
        self.calls.append(ExpertCall(layer.layer, len(x), time.perf_counter() - start))
        return out


def time_passes(model: PreTrainedModel) -> PassTimes:
    """Time passes of a loaded model.

    What is attached to its experts hook is detached.
    """
    moe_layers = expert_layers(model)
    experts = _Experts(none=any(p.device.type != "cpu" for layer in moe_layers for p in layer.parameters().values()))
    layers = decoder_layers(model, moe_layers[0])
    attach(model, experts)
    decode, *prefill = _passes(model, layers, experts, [(1, _CACHED_TOKENS), *((n, 0) for n in PROMPT_TOKENS)])
    return PassTimes(tuple(layers), decode, tuple(prefill))


def decoder_layers(model: PreTrainedModel, layer: ExpertLayer) -> dict[str, nn.Module]:
    """Return all decoder layers by name: the siblings of the one that holds `layer`.

    Those without experts are among them.
    """
    parent = layer.name.rpartition(f".{layer.layer}.")[0]
    return {f"{parent}.{name}": module for name, module in model.get_submodule(parent).named_children()}


def _passes(
    model: PreTrainedModel, layers: dict[str, nn.Module], experts: _Experts, settings: Sequence[tuple[int, int]]
) -> list[tuple[Pass, ...]]:
    """Time forward passes for each setting: a number of tokens, after a number of cached ones."""
    forwards = [_forward(model, tokens, cached) for tokens, cached in settings]
    passes: list[list[Pass]] = [[] for _ in settings]
    numbers = [int(name.rpartition(".")[2]) for name in layers]
    with _timed(list(layers.values()), model.device) as seconds:
        for forward, done in [*zip(forwards, passes, strict=True)] * ROUNDS:
            before = spent = sum(one.whole_s for one in done)
            while spent - before < _FORWARD_S and spent < _PASSES_S:
                interrupts.check()
                seconds[:] = [0.0] * len(seconds)
                experts.calls.clear()
                experts.copies.clear()
                start = now(model.device)
                forward()
                whole = now(model.device) - start
                within: dict[int, float] = defaultdict(float)
                for layer, taken in (*((call.layer, call.seconds) for call in experts.calls), *experts.copies):
                    within[layer] += taken
                own = [spent_s - within[number] for spent_s, number in zip(seconds, numbers, strict=True)]
                done.append(Pass((*own, whole - sum(seconds)), tuple(experts.calls), tuple(taken for _, taken in experts.copies)))
                spent += whole
    return [tuple(done) for done in passes]


def _forward(model: PreTrainedModel, tokens: int, cached: int) -> Callable[[], object]:
    """Prepare forward passes of `tokens` tokens after `cached` ones, and run one.

    Each has other tokens, so that its experts come from memory.
    """
    vocabulary, drawn = model.get_input_embeddings().weight.shape[0], torch.Generator().manual_seed(0)

    def run(tokens: int, cache: Any = None) -> Any:
        ids = torch.randint(vocabulary, (1, tokens), generator=drawn).to(model.device)
        return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    forward = partial(run, tokens, run(cached).past_key_values if cached else None)
    forward()
    return forward


@contextmanager
def _timed(modules: Sequence[nn.Module], device: torch.device) -> Iterator[list[float]]:
    """Add to the list that it yields the seconds that each module spends in forward, until the context ends."""
    seconds = [0.0] * len(modules)

    def start(i: int, *_: object) -> None:
        seconds[i] -= now(device)

    def stop(i: int, *_: object) -> None:
        seconds[i] += now(device)

    with ExitStack() as stack:
        for i, module in enumerate(modules):
            stack.callback(module.register_forward_pre_hook(partial(start, i)).remove)
            stack.callback(module.register_forward_hook(partial(stop, i)).remove)
        yield seconds


def now(device: torch.device) -> float:
    """Wait until an accelerator has done all its work, and return the time in seconds."""
    if device.type != "cpu":
        for index in range(torch.accelerator.device_count()):
            torch.accelerator.synchronize(index)
    return time.perf_counter()

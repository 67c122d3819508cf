"""What a served request tells about its calls and its routing: numbers, and none of its text.

`remoe calibrate` fits the times of calls to it, and `remoe drift` compares its routing with the profile's. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Annotated, TypeVar

from pydantic import Field

from remoe_cli.artifacts import MOST_EXPERTS, MOST_LAYERS, Bytes, Figure, Megabytes, Part, Tokens, is_empty
from remoe_cli.runtime.answer import Generated
from remoe_cli.runtime.invoke import Invocation, Sample
from remoe_cli.runtime.served_hits import DECODE, PREFILL

_TOKENS, _CALLS = 8, 256  # of one request: a few requests tell as much as the profile's own measurement
_COMPUTING, _COLD = 64, 16
T = TypeVar("T")
Counts = Annotated[tuple[Annotated[tuple[Tokens, ...], Field(max_length=MOST_EXPERTS)], ...], Field(max_length=MOST_LAYERS)]
ObservedSample = tuple[Bytes, Figure, Figure, Figure]
ColdCall = tuple[Figure, Figure, Figure]  # seconds waited, of the instance's start, and in the function
Computing = tuple[Tokens, Tokens, Megabytes, Figure]  # experts and rows of a warm call, the function's memory, and seconds of computing


class Observed(Part):
    """What one request tells.

    revision   of the model
    prefill    how often prompt tokens chose each expert, by MoE layer
    decode     the same of generated tokens that were fed back
    tokens     some tokens after the first, and their calls, as `Generated.further` has them
    first      some calls of the first token; they carry a prompt's rows
    shared     some calls of tokens that were made together with those of other requests, or in a pass with a draft; each call is told by
               one of them
    computing  what some calls computed, and how long
    cold       some calls that started an instance

    Shapes: prefill and decode [L, E].
    """

    revision: str
    prefill: Counts = ()
    decode: Counts = ()
    tokens: Annotated[tuple[tuple[Figure, tuple[ObservedSample, ...]], ...], Field(max_length=_TOKENS)] = ()
    first: Annotated[tuple[ObservedSample, ...], Field(max_length=_CALLS)] = ()
    shared: Annotated[tuple[ObservedSample, ...], Field(max_length=_CALLS, exclude_if=is_empty)] = ()
    computing: Annotated[tuple[Computing, ...], Field(max_length=_COMPUTING)] = ()
    cold: Annotated[tuple[ColdCall, ...], Field(max_length=_COLD)] = ()


def observe(made: Sequence[Generated], revision: str) -> Observed:
    """Say what the answers to one request tell: all of its routing, and a sample of its calls."""
    hits = [each.hits.counts for each in made if each.hits is not None]
    counts = [sum(each[phase] for each in hits).tolist() if hits else [] for phase in (PREFILL, DECODE)]
    # Of a call that was shared, one answer pays the start, and one the try: so it is told once.
    paid = [pair for each in made for pair in zip(each.invocations, each.billed, strict=True)]
    first = [call for each in made for call in each.invocations[: each.invoked[0] if each.invoked else 0] if _is_warm(call)]
    warm = [call for call, part in paid if _is_warm(call) and call.rows and part.billed_tries]
    cold = [
        call
        for call, part in paid
        if call.init_ms is not None and not (call.retries or call.failed or call.starts_ahead) and part.cold_tries
    ]
    tokens = _few_calls([token for each in made for token in each.further])
    shared = [call for each in made for call in _shared_calls(each)]
    left = max(0, _CALLS - sum(len(of_token) for _, of_token in tokens))
    return Observed(
        revision=revision,
        prefill=counts[PREFILL],
        decode=counts[DECODE],
        tokens=tuple(tokens),
        first=tuple(_rounded(call.sample) for call in _some(first, _CALLS)),
        shared=tuple(_rounded(call.sample) for call in _some(shared, left)),
        computing=tuple((call.experts, call.rows, call.memory_mb, round(call.compute_s, 6)) for call in _some(warm, _COMPUTING)),
        cold=tuple(
            (round(call.elapsed_s, 6), round((call.init_ms or 0.0) / 1000, 6), round(call.duration_ms / 1000, 6))
            for call in _some(cold, _COLD)
        ),
    )


def _shared_calls(made: Generated) -> Iterator[Invocation]:
    """Yield the warm calls of further tokens that were not made alone."""
    for i in range(1, len(made.invoked)):
        if not made.is_sample(i):
            span = slice(made.invoked[i - 1], made.invoked[i])
            yield from (
                call for call, part in zip(made.invocations[span], made.billed[span], strict=True) if _is_warm(call) and part.billed_tries
            )


def _is_warm(call: Invocation) -> bool:
    return call.plain and not call.failed


def _few_calls(tokens: Sequence[tuple[float, tuple[Sample, ...]]]) -> list[tuple[float, tuple[Sample, ...]]]:
    """Choose tokens by chance, not every n-th: those of some places of a text may have more calls than others."""
    chosen = _some(tokens, _TOKENS)
    while len(chosen) > 1 and sum(len(calls) for _, calls in chosen) > _CALLS:
        chosen = chosen[:-1]
    return [(round(seconds, 6), tuple(map(_rounded, calls))) for seconds, calls in chosen]


def _some(items: Sequence[T], most: int) -> Sequence[T]:
    if len(items) <= most:
        return items
    return [items[i] for i in sorted(Random(len(items)).sample(range(len(items)), most))]


def _rounded(sample: Sample) -> Sample:
    """Round times to a microsecond, below which no clock here tells anything."""
    size, *seconds = sample
    elapsed_s, duration_s, compute_s = (round(each, 6) for each in seconds)
    return size, elapsed_s, duration_s, compute_s

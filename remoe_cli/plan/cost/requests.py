"""What single requests take of the limits under a placement.

Solvers hold limits for a few long requests (`Workload.held`). Most of what a request takes grows with its lengths, but not all: replicas
share a shorter prompt's experts in another way. So `first_broken` looks at every request that a plan is for.

Shapes: P prompts or requests, E experts.
Source: method.md, section 4, for the limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.cost import expert_functions, main_function
from remoe_cli.plan.cost.placement import layer_outcomes, total
from remoe_cli.plan.document import LayerPlan, MainSpec
from remoe_cli.plan.problem.aim import SLACK
from remoe_cli.plan.problem.hits import owner_of
from remoe_cli.plan.problem.problem import Placement, Problem
from remoe_cli.plan.problem.sizes import Size

_AT_ONCE = 2**20  # figures in one table of prompts and experts


@dataclass(frozen=True)
class _Sent:
    """What the experts of one layer take of each prompt [P]: seconds, and those and the rows of its largest invocation."""

    layer_s: Floats
    call_s: Floats
    rows: Floats


def warm_ttft_s(problem: Problem, placement: Placement, prompts: Ints) -> Floats:
    """Compute TTFT of warm requests with prompts of these lengths.

    Shapes: int64 [P]; [P].
    """
    seconds = np.array([main_function.prefill_rest_s(problem, placement.main, float(n_in)) for n_in in prompts.tolist()])
    for index in range(len(placement.layers)):
        seconds = seconds + _sent(problem, placement, index, prompts).layer_s
    return seconds


def cold_wait_s(problem: Problem, placement: Placement) -> float:
    """Compute what a request that finds everything cold waits beside that.

    Beside a rented main function, its expert functions start one after the other; where it starts itself, they do so meanwhile.
    """
    if placement.main.usd_per_hour is None:
        local = sum(problem.spec.experts_per_layer - len(layer.remote) for layer in placement.layers)
        return main_function.start_s(problem, placement.main, local)
    biggest = [np.array(max(map(len, layer.parts))) for layer in placement.layers if layer.parts]
    return sum(float(expert_functions.cold_s(problem, experts)) for experts in biggest)


def longest_s(problem: Problem, placement: Placement, tpot_s: float, requests: tuple[Size, ...]) -> Floats:
    """Compute the longest time of each request: that of a cold one, where requests may be cold.

    Shapes: [P].
    """
    prompts, which = np.unique(np.array([size.n_in for size in requests]), return_inverse=True)
    seconds = warm_ttft_s(problem, placement, prompts)[which] + tpot_s * np.array([size.n_out for size in requests])
    return seconds + (cold_wait_s(problem, placement) if main_function.is_ever_cold(problem, placement.main) else 0.0)


def longest_call_s(problem: Problem, placement: Placement, index: int, prompts: Ints) -> float:
    """Compute the longest invocation of one layer's functions, of any of the prompts or of a token."""
    layer = placement.layers[index]
    biggest = np.array([max(map(len, layer.parts))])
    step_s = float(expert_functions.longest_step_s(problem, np.array([float(layer.memory_mb)]), biggest)[0, 0])
    return max(step_s, float(_sent(problem, placement, index, prompts).call_s.max()))


def with_timeouts(problem: Problem, layers: tuple[LayerPlan, ...], main: MainSpec) -> tuple[LayerPlan, ...]:
    """Give each layer's functions the timeout that its longest call needs."""
    placement, longest = Placement(main, layers), np.array([problem.workload.most_in])

    def timeout_s(index: int, layer: LayerPlan) -> int:
        if not layer.remote:
            return 0
        call_s = longest_call_s(problem, placement, index, longest)
        return expert_functions.timeout_s(problem, max(map(len, layer.parts)), call_s)

    return tuple(layer.model_copy(update={"timeout_s": timeout_s(index, layer)}) for index, layer in enumerate(layers))


@dataclass(frozen=True)
class Broken:
    """A request that breaks a limit, and how, as part of a sentence."""

    size: Size
    text: str


def first_broken(problem: Problem, placement: Placement) -> Broken | None:
    """Find a request of the workload that breaks a limit of time or payload, if there is one."""
    return next(broken(problem, placement), None)


def broken(problem: Problem, placement: Placement) -> Iterator[Broken]:
    """Find, for each limit of time and payload, the request that breaks it most."""
    sizes, limit = problem.workload.traffic.sizes, problem.catalog.function.payload_limit_bytes
    prompts, which = np.unique(sizes.n_in, return_inverse=True)
    ttft_s = np.array([main_function.prefill_rest_s(problem, placement.main, float(n_in)) for n_in in prompts.tolist()])
    for index, layer in enumerate(placement.layers):
        sent = _sent(problem, placement, index, prompts)
        ttft_s = ttft_s + sent.layer_s
        if not layer.remote:
            continue
        at, experts = int(sent.rows.argmax()), max(map(len, layer.parts))
        if (payload := float(expert_functions.payload_bytes(problem, sent.rows[at]))) > limit * (1 + SLACK):
            text = f"a prompt of {prompts[at]} tokens sends {payload:.0f} bytes to layer {layer.layer}, and the limit is {limit}"
            yield Broken(_longest_of(sizes.n_in, sizes.n_out, int(prompts[at])), text)
        at = int(sent.call_s.argmax())
        call_s = longest_call_s(problem, placement, index, prompts[at : at + 1])
        allowed_s, most_s = float(expert_functions.allowed_s(problem, experts, call_s)), expert_functions.most_allowed_s(problem)
        if allowed_s > most_s * (1 + SLACK):
            text = (
                f"a prompt of {prompts[at]} tokens takes a function of layer {layer.layer} up to {call_s:.4g} s, which with its start and "
                f"{expert_functions.CALL_ROOM:g} times that as room is {allowed_s:.4g} s, and it may work for {most_s:g} s"
            )
            yield Broken(_longest_of(sizes.n_in, sizes.n_out, int(prompts[at])), text)
    tpot_s = total(problem, placement, layer_outcomes(problem, placement)).tpot_s
    cold_s = cold_wait_s(problem, placement) if main_function.is_ever_cold(problem, placement.main) else 0.0
    seconds = ttft_s[which] + sizes.n_out * tpot_s + cold_s
    at, limit_s = int(seconds.argmax()), main_function.longest_request_s(problem, placement.main)
    if seconds[at] > limit_s * (1 + SLACK):
        size = Size(int(sizes.n_in[at]), int(sizes.n_out[at]))
        cold = f", of which a cold start is {cold_s:.4g} s" if cold_s else ""
        text = f"a request of {size.n_in} + {size.n_out} tokens takes up to {seconds[at]:.4g} s{cold}"
        yield Broken(size, f"{text}, and {placement.main.name} ends it after {limit_s:g} s")


def _longest_of(n_in: Ints, n_out: Ints, prompt: int) -> Size:
    return Size(prompt, int(n_out[n_in == prompt].max()))


def _sent(problem: Problem, placement: Placement, index: int, prompts: Ints) -> _Sent:
    """Price one layer for prompts of many lengths, a limited number at a time."""
    step = max(1, _AT_ONCE // problem.spec.experts_per_layer)
    pieces = [_piece(problem, placement, index, prompts[at : at + step]) for at in range(0, len(prompts), step)]
    return _Sent(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("layer_s", "call_s", "rows")))


def _piece(problem: Problem, placement: Placement, index: int, prompts: Ints) -> _Sent:
    layer, tokens = placement.layers[index], problem.workload.use[index] * prompts[:, None]
    owner = owner_of(problem.spec.experts_per_layer, layer.parts)[0]
    local_s = main_function.expert_prefill_s(problem, placement.main, tokens)[:, owner < 0].sum(axis=1)
    if not layer.parts:
        nothing = np.zeros(len(prompts))
        return _Sent(local_s, nothing, nothing)
    work_s = expert_functions.expert_work_s(problem, layer.memory_mb, tokens)
    group = _shared_out(problem, owner, tokens, layer.replicas)
    call_s = largest = np.zeros(len(prompts))
    for number in range(max(len(layer.parts), layer.replicas)):
        here = group == number
        rows = np.where(here, tokens, 0.0).sum(axis=1)
        inside_s = expert_functions.inside_s(problem, layer.memory_mb, np.where(here, work_s, 0.0).sum(axis=1), rows)
        call_s = np.maximum(call_s, np.where(rows > 0, expert_functions.warm(problem).elapsed_s + inside_s, 0.0))
        largest = np.maximum(largest, rows)
    return _Sent(np.maximum(local_s, call_s), call_s, largest)


def _shared_out(problem: Problem, owner: Ints, tokens: Floats, replicas: int) -> Ints:
    """Do what `shared_out` does, for many prompts at once.

    Shapes: `owner` [E], `tokens` [P, E]; int64 [P, E].
    """
    if replicas <= 1:
        return np.broadcast_to(owner, tokens.shape)
    work_s = np.where(owner >= 0, expert_functions.expert_work_s(problem, problem.catalog.function.mb_per_vcpu, tokens), 0.0)
    group, load, rows = np.full(tokens.shape, -1), np.zeros((len(tokens), replicas)), np.arange(len(tokens))
    for expert in np.argsort(-work_s, axis=1, kind="stable").T:
        added = work_s[rows, expert]
        least = load.argmin(axis=1)
        load[rows, least] += added
        group[rows, expert] = np.where(added > 0, least, -1)
    return group

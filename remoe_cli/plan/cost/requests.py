"""What single requests take of the limits under a placement.

Solvers hold limits for a few long requests (`Workload.held`). Most of what a request takes grows with its lengths, but not all: replicas
share a shorter prompt's experts in another way. So `first_broken` looks at every request that a plan is for.

Shapes: P prompts or requests, E experts.
Source: method.md, section 4, for the limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.cost import expert_functions, main_function
from remoe_cli.plan.cost.placement import evaluate, turn_s
from remoe_cli.plan.cost.prompts import longest_wait_s, prefill_s, sent, waits
from remoe_cli.plan.document import LayerPlan, MainSpec, Spread
from remoe_cli.plan.problem.aim import SLACK
from remoe_cli.plan.problem.problem import Placement, Problem
from remoe_cli.plan.problem.sizes import Size
from remoe_cli.plan.wording import request_tokens

SPREAD = (0.5, 0.95, 0.99)  # shares of the requests whose times a plan states


def longest_s(problem: Problem, placement: Placement, tpot_s: float, requests: tuple[Size, ...]) -> Floats:
    """Compute the longest time of each request: that of a cold one, where requests may be cold.

    Shapes: [P].
    """
    prompts, which = np.unique(np.array([size.n_in for size in requests]), return_inverse=True)
    seconds = prefill_s(problem, placement, prompts)[which] + tpot_s * np.array([size.n_out for size in requests])
    return (
        seconds
        + turn_s(problem, placement)
        + (longest_wait_s(problem, placement) if main_function.is_ever_cold(problem, placement.main) else 0.0)
    )


def longest_call_s(problem: Problem, placement: Placement, index: int, prompts: Ints) -> float:
    """Compute the longest invocation of one layer's functions, of any of the prompts or of a token."""
    problem, layer = problem.at_main(placement.main), placement.layers[index]
    biggest = np.array([max(map(len, layer.parts))])
    step_s = float(expert_functions.longest_step_s(problem, np.array([float(layer.memory_mb)]), biggest)[0, 0])
    return max(step_s, float(sent(problem, placement, index, prompts).call_s.max()))


def with_timeouts(problem: Problem, layers: tuple[LayerPlan, ...], main: MainSpec) -> tuple[LayerPlan, ...]:
    """Give each layer's functions the timeout that its longest call needs."""
    placement, longest = Placement(main, layers), np.array([problem.workload.most_in])

    def timeout_s(index: int, layer: LayerPlan) -> int:
        if not layer.remote:
            return 0
        call_s = longest_call_s(problem, placement, index, longest)
        return expert_functions.timeout_s(problem, max(map(len, layer.parts)), call_s)

    return tuple(layer.model_copy(update={"timeout_s": timeout_s(index, layer)}) for index, layer in enumerate(layers))


def spread(problem: Problem, placement: Placement, tpot_s: float) -> tuple[Spread, ...]:
    """Compute the times that shares of the requests do not exceed.

    As many of them are cold as the plan says.
    """
    sizes, kinds = problem.workload.traffic.sizes, [kind for kind in waits(problem, placement) if kind[0] > 0]
    prompts, which = np.unique(sizes.n_in, return_inverse=True)
    ttft_s = prefill_s(problem, placement, prompts)[which] + turn_s(problem, placement)
    shares = np.concatenate([sizes.share * share for share, _ in kinds])
    each = [np.concatenate([warm + wait_s for _, wait_s in kinds]) for warm in (ttft_s, ttft_s + sizes.n_out * tpot_s)]
    found = [[_at_share(seconds, shares, share) for seconds in each] for share in SPREAD]
    return tuple(Spread(share=share, ttft_s=ttft, total_s=whole) for share, (ttft, whole) in zip(SPREAD, found, strict=True))


def _at_share(values: Floats, shares: Floats, share: float) -> float:
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(shares[order])
    return float(values[order[min(len(order) - 1, int(np.searchsorted(reached, share * reached[-1] * (1 - 1e-9))))]])


@dataclass(frozen=True)
class Broken:
    """A request that breaks a limit, and how, as part of a sentence."""

    size: Size
    text: str


def first_broken(problem: Problem, placement: Placement) -> Broken | None:
    """Find a request of the workload that breaks a limit of time or payload, if there is one."""
    return next(broken(problem, placement), None)


def holding_too(problem: Problem, size: Size) -> Problem | None:
    """Let solvers hold the limits for one more request.

    None where they did already: then their tolerance and that of the check differ.
    """
    held = problem.workload.also_held
    return None if size in held else replace(problem, workload=replace(problem.workload, also_held=(*held, size)))


def broken(problem: Problem, placement: Placement) -> Iterator[Broken]:
    """Find, for each limit of time and payload, the request that breaks it most."""
    problem = problem.at_main(placement.main)
    requests, limit = problem.workload.traffic.sizes, problem.catalog.function.payload_limit_bytes
    front = np.array(requests.front, dtype=np.int64)
    n_in, n_out = np.concatenate([requests.n_in, front[:, 0]]), np.concatenate([requests.n_out, front[:, 1]])
    prompts, which = np.unique(n_in, return_inverse=True)
    ttft_s = np.array([main_function.prefill_rest_s(problem, placement.main, float(n_in)) for n_in in prompts.tolist()])
    for index, layer in enumerate(placement.layers):
        here = sent(problem, placement, index, prompts)
        ttft_s = ttft_s + here.layer_s
        if not layer.remote:
            continue
        at, experts = int(here.rows.argmax()), max(map(len, layer.parts))
        if (payload := float(expert_functions.payload_bytes(problem, here.rows[at]))) > limit * (1 + SLACK):
            text = f"a prompt of {prompts[at]} tokens sends {payload:.0f} bytes to layer {layer.layer}, and the limit is {limit}"
            yield Broken(_longest_of(n_in, n_out, int(prompts[at])), text)
        payload = float(expert_functions.payload_bytes(problem, expert_functions.most_step_rows(problem, experts)))
        if not problem.is_one_token and payload > limit:
            text = f"a decode step of {problem.step_tokens} tokens sends up to {payload:.0f} bytes to layer {layer.layer}"
            yield Broken(requests.front[0], f"{text}, and the limit is {limit}")
        at = int(here.call_s.argmax())
        call_s = longest_call_s(problem, placement, index, prompts[at : at + 1])
        allowed_s, most_s = float(expert_functions.allowed_s(problem, experts, call_s)), expert_functions.most_allowed_s(problem)
        if allowed_s > most_s * (1 + SLACK):
            text = (
                f"a prompt of {prompts[at]} tokens takes a function of layer {layer.layer} up to {call_s:.4g} s, which with its start and "
                f"{expert_functions.CALL_ROOM:g} times that as room is {allowed_s:.4g} s, and it may work for {most_s:g} s"
            )
            yield Broken(_longest_of(n_in, n_out, int(prompts[at])), text)
    tpot_s = evaluate(problem, placement).tpot_s
    cold_s = longest_wait_s(problem, placement) if main_function.is_ever_cold(problem, placement.main) else 0.0
    seconds = ttft_s[which] + n_out * tpot_s + cold_s + turn_s(problem, placement)
    at, limit_s = int(seconds.argmax()), main_function.longest_request_s(problem, placement.main)
    if seconds[at] > limit_s * (1 + SLACK):
        size = Size(int(n_in[at]), int(n_out[at]))
        cold = f", of which a cold start is {cold_s:.4g} s" if cold_s else ""
        text = f"a request of {request_tokens(size.n_in, size.n_out)} takes up to {seconds[at]:.4g} s{cold}"
        yield Broken(size, f"{text}, and {placement.main.name} ends it after {limit_s:g} s")


def _longest_of(n_in: Ints, n_out: Ints, prompt: int) -> Size:
    return Size(prompt, int(n_out[n_in == prompt].max()))

"""What one way of serving takes and costs for each request, as the cost model says.

Sources: docs/reference/method.md, sections 3, 4 and 10; prices are those of plan/cost/prices.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.assess.baselines import all_local_on
from remoe_cli.plan.cost import assistant, expert_functions, main_function, prices
from remoe_cli.plan.cost.prompts import cold_wait_s, functions_wait_s, prefill_s
from remoe_cli.plan.cost.steps import layer_steps, step_times
from remoe_cli.plan.document import Baseline, BaselineName, Plan, Served
from remoe_cli.plan.mains import MOST_REQUESTS, PROMPT_PART_TOKENS, places
from remoe_cli.plan.problem.hits import owner_of
from remoe_cli.plan.problem.problem import Main, Placement, Problem
from remoe_cli.plan.wording import BASELINE_NAMES, bought
from remoe_cli.profile.hardware import as_stored, read_hardware, whole_on_gpu

_LENGTHS = 33  # prompt lengths at which prefill is priced; between them, it is interpolated
_DRAWN_STARTS = 1024  # of all expert functions, one after the other
_SELDOM = 0.5  # overlapping calls of a request up to which no further instance is expected


@dataclass(frozen=True)
class Functions:
    """The expert functions beside a main function.

    waits_s     starting all of them, one layer after the other, beside a main function that is up: equally likely values
    start_usd   starting one instance of each
    idle_s      an instance that had no call for so long is gone
    needed      needed[c]: how many instances of each are there while c requests run
    """

    waits_s: Floats
    start_usd: float
    idle_s: float
    needed: tuple[int, ...]


@dataclass(frozen=True)
class Service:
    """One way to serve the model.

    spec                 the main function, for people
    instances            None: as many as requests need, each paid by use
    at_once              requests that one instance serves at once
    prompts, prefill_s, prefill_usd    prompt tokens [G], ascending; reading such a prompt, warm and alone, and its expert functions
    part_tokens          of a prompt, read at once while the instance answers others
    step_s               [at_once + 1]: mean time of the decode steps for a token of each, that so many requests share
    token_sd_s           standard deviation of the time of a token of a request that is served alone
    token_usd            [at_once + 1]: expert functions of one token of such a step
    usd_per_hour         of all rented instances while they are up
    usd_per_s            of an instance that serves requests, where it is paid by use
    usd_per_request      fee and log of a request
    start_s, start_usd   a main function that starts: how long, and what it reads from S3
    idle_s               a main function without requests for so long is gone; endless where it is always on
    most                 requests that run at once, or run and wait
    limit_s              the platform ends a longer request, which is paid and not answered
    longest              most tokens of prompt, answer and both together that the deployment takes; None: it takes all
    """

    name: str
    spec: str
    instances: int | None
    prompts: Floats
    prefill_s: Floats
    prefill_usd: Floats
    step_s: Floats
    token_usd: Floats
    token_sd_s: float = 0.0
    usd_per_hour: float = 0.0
    usd_per_s: float = 0.0
    usd_per_request: float = 0.0
    start_s: float = 0.0
    start_usd: float = 0.0
    idle_s: float = math.inf
    most: int = MOST_REQUESTS
    at_once: int = 1
    part_tokens: float = math.inf
    limit_s: float = math.inf
    longest: Served | None = None
    functions: Functions | None = None


def of_placement(problem: Problem, placement: Placement, name: str, n_in: Floats, mean_out: float) -> Service:
    """Price a placement for prompts of all lengths in `n_in`, and answers of `mean_out` further tokens.

    Where its instances serve several requests at once, a decode step takes as long as so many requests make it.
    """
    main, problem = placement.main, problem.at_main(placement.main)
    has_functions = any(layer.parts for layer in placement.layers)
    money = main_function.prices_of(problem, Main(main, placement.instances))
    by_use, limit = main.usd_per_hour is None, problem.catalog.function.concurrency_limit
    at_once = max(len(layer.parts) * layer.replicas for layer in placement.layers)
    zero, at_a_time = problem.catalog.zero if main.scales_to_zero else None, problem.concurrency
    part_tokens = PROMPT_PART_TOKENS if at_a_time > 1 else math.inf
    prompts = _some_of(n_in, part_tokens)
    most = at_a_time * max(1, limit // (1 + at_once)) if by_use else places(at_a_time) * placement.instances
    steps = {number: _step(replace(problem, concurrency=number), placement) for number in _numbers(at_a_time)}
    full = steps[at_a_time]
    return Service(
        name=name,
        spec=bought(main.name, placement.instances),
        instances=None if by_use else placement.instances,
        at_once=at_a_time,
        part_tokens=part_tokens,
        prompts=prompts,
        prefill_s=prefill_s(problem, placement, prompts.astype(np.int64)),
        prefill_usd=sum((_prefill_usd(problem, placement, at, prompts) for at in range(len(placement.layers))), np.zeros(len(prompts))),
        step_s=_between({number: step.seconds for number, step in steps.items()}),
        token_usd=_between({number: step.usd for number, step in steps.items()}),
        token_sd_s=math.sqrt(sum(token.variance_s2 for token in steps[1].tokens)),
        usd_per_hour=(main.usd_per_hour or 0.0) * placement.instances,
        usd_per_s=money.usd_per_s if by_use else 0.0,
        usd_per_request=money.usd_per_request,
        start_s=cold_wait_s(problem, placement) if main.starts else 0.0,
        start_usd=prices.main_reads(problem.catalog, main) * money.usd_per_read,
        idle_s=problem.catalog.function.idle_ttl_s if by_use else math.inf if zero is None else zero.idle_s,
        most=most,
        limit_s=main_function.longest_request_s(problem, main),
        functions=_functions(problem, placement, full, mean_out, most) if has_functions else None,
    )


def others(problem: Problem, plan: Plan, n_in: Floats, mean_out: float) -> Iterator[Service]:
    """Price what else could serve the same requests.

    That is all experts local, by use and always on, and the whole model on a rented GPU.
    """
    local = [one for spec in problem.menu if (one := all_local_on(problem, spec)) is not None]
    for rented in (False, True):
        able = [one for one in local if (one.placement.main.usd_per_hour is not None) == rented and not one.placement.main.scales_to_zero]
        if able:
            best = min(able, key=lambda one: one.outcome.cost_usd_per_request)
            yield of_placement(problem, best.placement, BASELINE_NAMES[BaselineName.ALL_LOCAL], n_in, mean_out)
    for name in (BaselineName.GPU, BaselineName.STORED_GPU):
        baseline = plan.baselines.get(name)
        if baseline is not None and baseline.usd_per_hour is not None:
            yield _on_gpu(problem, name, baseline, n_in, mean_out)


def _on_gpu(problem: Problem, name: BaselineName, baseline: Baseline, n_in: Floats, mean_out: float) -> Service:
    """Price the whole model on the GPU that the plan compares itself with."""
    spec = next(each for each in problem.catalog.reference.gpus if each.name == baseline.spec)
    hardware = read_hardware(spec.hardware or problem.catalog.reference.hardware)
    nonexpert, expert = whole_on_gpu(hardware, problem.spec)
    helper = assistant.times_on(problem, hardware, None)
    if name is BaselineName.STORED_GPU:
        nonexpert, expert = as_stored(nonexpert, expert, problem.spec)
    prompts, use, n = _some_of(n_in), problem.workload.use, problem.concurrency
    prompt_s = np.array([float(nonexpert.seconds(tokens)) + float(expert.seconds(use * tokens, 1).sum()) for tokens in prompts.tolist()])
    prompt_s = prompt_s + [assistant.prompt_s(problem, helper, tokens) for tokens in prompts.tolist()]
    step_s, layers = dict[int, float](), range(len(problem.workload.patterns))
    for number in _numbers(n):
        here = replace(problem, concurrency=number)
        if here.is_one_token:
            step_s[number] = float(nonexpert.seconds(1)) + float(problem.workload.decode_hits.sum()) * float(expert.seconds(1, 1))
            continue
        each_s = expert.seconds(np.arange(here.step_tokens + 1.0), 1)
        rows_s = (float(each_s[here.step_rows(layer)].sum(axis=0).mean()) for layer in layers)
        pass_s = main_function.mean_of_steps(here, lambda rows: float(nonexpert.seconds(rows))) + sum(rows_s)
        step_s[number] = problem.drafting.passes * (pass_s + assistant.step_s(here, helper))
    per_hour = problem.workload.requests_per_hour or 0.0
    request_s = float(np.interp(n_in, prompts, prompt_s).mean()) + (mean_out + (n > 1)) * step_s[n] / n
    instances = max(1, math.ceil(request_s * per_hour / 3600 - 1e-9))
    return Service(
        name=BASELINE_NAMES[name],
        spec=bought(spec.name, instances),
        instances=instances,
        at_once=n,
        most=places(n) * instances,
        prompts=prompts,
        prefill_s=prompt_s,
        prefill_usd=np.zeros(len(prompts)),
        step_s=_between(step_s),
        token_usd=np.zeros(n + 1),
        usd_per_hour=instances * (spec.usd_per_hour or 0.0),
    )


def _numbers(most: int) -> list[int]:
    """Choose the numbers of requests for which a shared step is priced; between them, it is interpolated."""
    return sorted({most, *(2**power for power in range(most.bit_length()))})


def _between(priced: dict[int, float]) -> Floats:
    """Interpolate figures of steps of some numbers of requests to all numbers up to the largest; 0 for none."""
    numbers = sorted(priced)
    every: Floats = np.interp(np.arange(numbers[-1] + 1.0), [0, *numbers], [0.0, *(priced[number] for number in numbers)])
    return every


def _some_of(n_in: Floats, part_tokens: float = math.inf) -> Floats:
    """Choose up to _LENGTHS lengths from the shortest to the longest, and of those read in parts: the part, and shorter ones."""
    least, most = float(np.min(n_in)), float(np.max(n_in))
    parts = [part_tokens] if most > part_tokens else []
    return np.unique([*np.round(np.geomspace(1.0 if parts else least, most, _LENGTHS)), *parts])


@dataclass(frozen=True)
class _Token:
    """One layer of one further token: mean and variance of its time, its calls, one's time, their price."""

    seconds: float
    variance_s2: float
    calls: float
    call_s: float
    usd: float


@dataclass(frozen=True)
class _Step:
    """The decode steps for a token of each request: their time, the expert functions of one of the tokens, and the layers."""

    seconds: float
    usd: float
    tokens: tuple[_Token, ...]


def _step(problem: Problem, placement: Placement) -> _Step:
    """Price the decode steps of as many requests as the problem serves at once."""
    tokens = tuple(_token(problem, placement, index) for index in range(len(placement.layers)))
    seconds = problem.drafting.passes * main_function.decode_rest_s(problem, placement.main) + sum(token.seconds for token in tokens)
    return _Step(seconds, sum(token.usd for token in tokens), tokens)


def _token(problem: Problem, placement: Placement, index: int) -> _Token:
    workload, main, layer = problem.workload, placement.main, placement.layers[index]
    step_s, parts = main_function.expert_step_s(problem, main), layer.parts
    if not problem.is_one_token:
        return _shared_token(problem, placement, index)
    if not parts and not layer.gpu:
        return _Token(float(workload.decode_hits[index].sum()) * step_s, 0.0, 0.0, 0.0, 0.0)
    hits = workload.hits.of_parts(index, parts, layer.gpu)
    waits_s = hits.local * step_s
    if hits.gpu is not None:
        waits_s = np.maximum(waits_s, hits.gpu * main_function.gpu_expert_step_s(problem, main))
    if not parts:
        return _Token(*_moments(hits.shares[0], waits_s), 0.0, 0.0, 0.0)
    remote_s = expert_functions.decode_wait_s(problem, layer.memory_mb, hits.busiest)
    billed_s, calls = expert_functions.decode_billed(problem, [layer.memory_mb], hits)
    usd = expert_functions.bill_usd(problem, [layer.memory_mb], _biggest(layer.parts), billed_s, calls)
    called = float(hits.shares[0][hits.busiest > 0].sum())
    call_s = float(hits.shares[0] @ remote_s) / called if called else 0.0
    return _Token(*_moments(hits.shares[0], np.maximum(waits_s, remote_s)), float(calls[0, 0]), call_s, float(usd[0, 0]))


def _shared_token(problem: Problem, placement: Placement, index: int) -> _Token:
    """Look at one layer of steps of several rows: how long they take for a token, and a request's part of their calls."""
    layer, n, passes = placement.layers[index], problem.concurrency, problem.drafting.passes
    owner = owner_of(problem.spec.experts_per_layer, layer.parts, layer.gpu)
    steps = layer_steps(problem, index, owner, layer.memory_mb, step_times(problem, placement.main))
    seconds, calls = passes * float(steps.seconds[0]), float(steps.calls[0, 0])
    if not layer.parts:
        return _Token(seconds, 0.0, 0.0, 0.0, 0.0)
    usd = expert_functions.bill_usd(problem, [layer.memory_mb], _biggest(layer.parts), steps.billed_s / n, steps.calls / n)
    call_s = float(steps.billed_s[0, 0]) / calls if calls else 0.0
    return _Token(seconds, 0.0, passes * calls / n, call_s, passes * float(usd[0, 0]))


def _moments(shares: Floats, seconds: npt.NDArray[np.floating[Any]]) -> tuple[float, float]:
    mean = float(shares @ seconds)
    return mean, max(0.0, float(shares @ seconds**2) - mean**2)


def _biggest(parts: tuple[tuple[int, ...], ...]) -> Ints:
    return np.array([max(map(len, parts), default=0)])


def _prefill_usd(problem: Problem, placement: Placement, index: int, prompts: Floats) -> Floats:
    layer = placement.layers[index]
    if not layer.parts:
        return np.zeros(len(prompts))
    owner, usd = owner_of(problem.spec.experts_per_layer, layer.parts, layer.gpu), []
    for n_in in prompts.tolist():
        tokens = problem.workload.use[index] * n_in
        at = expert_functions.shared_out(problem, owner, tokens, layer.replicas)
        sent = expert_functions.prefill(problem, tokens, [layer.memory_mb], at, max(len(layer.parts), layer.replicas))
        usd.append(float(expert_functions.bill_usd(problem, [layer.memory_mb], _biggest(layer.parts), sent.billed_s, sent.calls)[0, 0]))
    return np.array(usd)


def _functions(problem: Problem, placement: Placement, step: _Step, mean_out: float, most: int) -> Functions:
    workload = replace(problem.workload, cold_share=1.0)
    each_cold = replace(problem, workload=workload)
    start_usd = sum(
        float(expert_functions.cold_usd(each_cold, [layer.memory_mb], _biggest(layer.parts), len(layer.parts) * layer.replicas)[0, 0])
        for layer in placement.layers
        if layer.parts
    )
    # `calls` are a request's part of those of its main function, whose calls overlap with those of other main functions.
    busiest, n = max(step.tokens, key=lambda token: token.calls * token.call_s), problem.concurrency
    duty = min(1.0, n * busiest.calls * busiest.call_s / step.seconds)
    # Requests fill an instance that is paid by use before the next one starts; rented instances share them evenly.
    rented = placement.instances if placement.main.usd_per_hour is not None else None
    mains = needed(duty, n * busiest.calls * mean_out, rented or -(-most // n))
    return Functions(
        waits_s=_waits_s(problem, placement),
        start_usd=start_usd,
        idle_s=problem.catalog.function.idle_ttl_s,
        needed=tuple(mains[-(-c // n) if rented is None else min(c, rented)] for c in range(most + 1)),
    )


def _waits_s(problem: Problem, placement: Placement) -> Floats:
    """Draw what starting the functions of all layers takes, one after the other, of single starts that were measured."""
    mean_s, measured = functions_wait_s(problem, placement), problem.latency.cold_start
    if measured is None or not measured.waits_s:
        return np.array([mean_s])
    layers = sum(bool(layer.parts) for layer in placement.layers)
    beyond_s = np.array(measured.waits_s) - measured.total_s
    waits_s: Floats = mean_s + np.random.default_rng(0).choice(beyond_s, (_DRAWN_STARTS, layers)).sum(axis=1)
    return np.maximum(0.0, waits_s)


def needed(duty: float, calls: float, most: int) -> tuple[int, ...]:
    """Compute how many instances of a function c requests make Lambda start, for c from 0 to `most`.

    A call that finds all instances busy starts another. A running request has a call under way `duty` of the time. So with k instances,
    one of the `calls` of a request meets k busy ones with the probability that k of c - 1 others are in a call. The least k is taken with
    which that is seldom. Requests that run side by side soon have an instance each, as each makes many calls.

    >>> needed(0.0, 100.0, 3), needed(0.5, 100.0, 3), needed(1e-3, 100.0, 3)
    ((0, 1, 1, 1), (0, 1, 2, 3), (0, 1, 1, 1))
    """
    counts, k = [0], 1
    for c in range(1, most + 1):
        while k < c and calls * _at_least(k, c - 1, duty) >= _SELDOM:
            k += 1
        counts.append(k)
    return tuple(counts)


def _at_least(k: int, n: int, p: float) -> float:
    """Compute the probability of at least k of n independent events."""
    if p in (0.0, 1.0):
        return float(p == 1.0 and k <= n)
    logs = (math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p) for i in range(k))
    return max(0.0, 1.0 - sum(math.exp(each) for each in logs))

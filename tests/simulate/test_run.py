"""Simulated runs against what queueing theory says in closed form, and against the planner's own means."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from remoe_cli.plan.arrays import Floats
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.cost.prompts import prefill_s
from remoe_cli.plan.document import LayerPlan, Served
from remoe_cli.plan.mains import PROMPT_PART_TOKENS
from remoe_cli.plan.problem.problem import Placement
from remoe_cli.plan.problem.traffic import one_length
from remoe_cli.profile.latency_record import ColdStart
from remoe_cli.simulate.requests import Arrivals, Source, drawn
from remoe_cli.simulate.run import Run, run
from remoe_cli.simulate.service import Functions, Service, of_placement
from tests.support.synthetic import problem_of, synthetic_profile, tiny_catalog

FLAT = np.array([1.0])


def service(instances: int | None, **changes: float) -> Service:
    """Make a service whose steps take 1 ms, whoever shares them, and nothing else."""
    steps = np.ones(int(changes.get("at_once", 1)) + 1)
    made = Service("it", "it", instances, FLAT, np.zeros(1), np.zeros(1), step_s=1e-3 * steps, token_usd=0.0 * steps)
    return replace(made, **changes)  # type: ignore[arg-type]


def arrivals(count: int, per_s: float, mean_out: float, seed: int = 0) -> Arrivals:
    """Draw requests that come at random and whose answers have exponential lengths."""
    random = np.random.default_rng(seed)
    gaps_s = random.exponential(1 / per_s, count)
    n_out = np.maximum(0, np.round(random.exponential(mean_out, count))).astype(np.int64)
    at_s = np.cumsum(gaps_s)
    return Arrivals(at_s, np.ones(count, dtype=np.int64), n_out, float(at_s[-1]))


def waited_s(served: Run) -> float:
    return float(served.ttft_s.mean())


@pytest.mark.parametrize(("instances", "load"), [(1, 0.5), (1, 0.8), (4, 0.7)])
def test_a_queue_waits_as_erlang_says(instances: int, load: float) -> None:
    mean_s = 2.0
    per_s = load * instances / mean_s
    served = run(service(instances, most=10**9), arrivals(150_000, per_s, mean_s * 1000), 0)
    offered = per_s * mean_s
    unheld = sum(offered**n / math.factorial(n) for n in range(instances))
    held = offered**instances / math.factorial(instances) / (1 - load)
    assert waited_s(served) == pytest.approx(held / (unheld + held) * mean_s / (instances - offered), rel=0.07)
    assert not served.refused.any() and not served.cold.any()


def test_a_full_queue_refuses_as_erlang_says() -> None:
    """With no place to wait, the share that is refused is Erlang's B formula."""
    instances, per_s, mean_s = 3, 1.0, 2.0
    served = run(service(instances, most=instances), arrivals(100_000, per_s, mean_s * 1000), 1)
    terms = [(per_s * mean_s) ** n / math.factorial(n) for n in range(instances + 1)]
    assert served.refused.mean() == pytest.approx(terms[-1] / sum(terms), rel=0.03)
    assert waited_s(replace(served, ttft_s=served.ttft_s[~served.refused])) == 0.0


def test_an_instance_is_cold_after_a_gap_as_long_as_it_is_kept() -> None:
    per_s, kept_s = 1 / 200, 300.0
    served = run(service(None, idle_s=kept_s, start_s=5.0, most=1000), arrivals(100_000, per_s, 1.0), 2)
    cold = math.exp(-per_s * kept_s)
    assert served.cold.mean() == pytest.approx(cold, rel=0.05)
    assert waited_s(served) == pytest.approx(5.0 * cold, rel=0.05)


def test_scaling_to_zero_wakes_and_is_up_as_the_planner_says() -> None:
    per_hour, idle_s, wake_s = 6.0, 600.0, 300.0
    waking = one_length(125, 200, per_hour).waking(idle_s, wake_s)
    assert waking is not None
    made = service(1, idle_s=idle_s, start_s=wake_s, usd_per_hour=2.0)
    served = run(made, arrivals(100_000, per_hour / 3600, 1.0), 3)
    assert served.up_share == pytest.approx(waking.up_share, rel=0.02)
    assert served.usd / served.over_s * 3600 == pytest.approx(2.0 * waking.up_share, rel=0.02)
    assert np.count_nonzero(served.ttft_s > 0.999 * wake_s) / len(served.ttft_s) == pytest.approx(waking.wake_share, rel=0.03)


def test_functions_start_for_each_request_that_needs_more_of_them() -> None:
    functions = Functions(waits_s=np.array([3.0]), start_usd=1.0, idle_s=100.0, needed=(0, 1, 2))
    made = service(2, functions=functions)
    at_s = np.array([0.0, 1.0, 50.0, 50.5, 300.0])
    n_out = np.array([10_000, 10_000, 1000, 1000, 1000])
    served = run(made, Arrivals(at_s, np.ones(5, dtype=np.int64), n_out, 300.0), 0)
    assert served.cold.tolist() == [True, True, False, False, True]
    assert served.usd == 3.0


def test_a_request_that_the_platform_ends_is_paid_and_not_answered() -> None:
    made = service(None, usd_per_s=1.0, limit_s=2.0, most=10)
    served = run(made, Arrivals(np.array([0.0, 10.0]), np.ones(2, dtype=np.int64), np.array([1000, 5000]), 10.0), 0)
    assert served.refused.tolist() == [False, True]
    assert served.usd == pytest.approx(1.0 + 2.0)
    assert served.tokens == 1001


def test_a_request_that_the_deployment_does_not_take_costs_nothing() -> None:
    made = service(None, usd_per_s=1.0, most=10, longest=Served(cover=1.0, share=1.0, tokens=2000, n_in=10, n_out=1000))
    served = run(made, Arrivals(np.array([0.0, 10.0]), np.ones(2, dtype=np.int64), np.array([1000, 1001]), 10.0), 0)
    assert (served.refused.tolist(), served.usd) == ([False, True], pytest.approx(1.0))


def test_beyond_the_limit_of_instances_requests_are_refused() -> None:
    served = run(service(None, most=2), Arrivals(np.zeros(3), np.ones(3, dtype=np.int64), np.full(3, 1000), 1.0), 0)
    assert served.refused.tolist() == [False, False, True]


def test_the_means_are_those_of_the_planner(tmp_path: Path) -> None:
    """Rare requests that come at random cost and take what the plan's closed forms say."""
    problem = problem_of(synthetic_profile(tmp_path), tiny_catalog(), n_in=50, n_out=40, requests_per_hour=6.0)
    layers = tuple(LayerPlan(layer=layer, remote=(0, 1, 2), memory_mb=256, replicas=1) for layer in problem.spec.moe_layers)
    placement = Placement(problem.menu[0], layers)
    outcome, n_in, n_out = evaluate(problem, placement), np.full(1, 50, dtype=np.int64), np.full(1, 40, dtype=np.int64)
    made = of_placement(problem, placement, "plan", n_in.astype(float), 40.0)
    served = run(made, drawn(Source(None, n_in, n_out, 6.0, 1.0), 20_000, 0), 0)
    assert served.usd / len(served.ttft_s) == pytest.approx(outcome.cost_usd_per_request, rel=0.03)
    assert waited_s(served) == pytest.approx(outcome.ttft_s, rel=0.03)
    assert float(served.tpot_s.mean()) == pytest.approx(outcome.tpot_s, rel=0.01)
    assert float(served.tpot_s.std()) > 0


def test_the_instance_that_was_used_last_is_used_next() -> None:
    """Two at once leave two instances; one a minute then keeps the last of them, and the other is gone."""
    made = service(None, idle_s=100.0, start_s=1.0, most=10)
    at_s = np.array([0.0, 0.5, 60.0, 120.0, 180.0, 180.1])
    served = run(made, Arrivals(at_s, np.ones(6, dtype=np.int64), np.full(6, 2000), 180.0), 0)
    assert served.cold.tolist() == [True, True, False, False, False, True]


def test_functions_of_an_answer_that_is_cut_are_paid_up_to_there() -> None:
    made = replace(service(None, limit_s=2.0, most=10), token_usd=np.ones(2))
    served = run(made, Arrivals(np.zeros(1), np.ones(1, dtype=np.int64), np.array([4000]), 10.0), 0)
    assert served.usd == pytest.approx(2000.0)


def test_requests_that_share_an_instance_pay_its_time_once() -> None:
    """Three come together to instances of two places: two share one, the third has one of its own."""
    made = service(None, at_once=2, usd_per_s=1.0, start_s=1.0, idle_s=100.0, most=10)
    at_s, n_out = np.array([0.0, 0.0, 0.0, 50.0, 50.5]), np.array([4000, 2000, 2000, 1000, 1000])
    served = run(made, Arrivals(at_s, np.ones(5, dtype=np.int64), n_out, 60.0), 0)
    assert served.cold.tolist() == [True, False, True, False, False]
    assert served.usd == pytest.approx((1 + 4.0) + (1 + 2.0) + 1.5)


@pytest.mark.parametrize("n_out", [40, 400])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_full_instance_costs_and_takes_what_the_planner_says(concurrency: int, n_out: int, tmp_path: Path) -> None:
    """Many requests wait for one instance, so it always answers as many as it can, whatever answers the plan was made for."""
    profile, catalog = synthetic_profile(tmp_path), tiny_catalog()
    planned, real = (problem_of(profile, catalog, n_in=50, n_out=each, concurrency=concurrency) for each in (40, n_out))
    layers = tuple(LayerPlan(layer=layer, remote=(0, 1, 2), memory_mb=256, replicas=1) for layer in planned.spec.moe_layers)
    placement = Placement(planned.menu[0], layers)
    outcome, made = evaluate(real, placement), of_placement(planned, placement, "plan", np.full(1, 50.0), float(n_out))
    many = np.ones(200, dtype=np.int64)
    always = replace(made, instances=1, idle_s=math.inf, functions=None, usd_per_hour=3600 * made.usd_per_s, usd_per_s=0.0, most=10**9)
    served = run(always, Arrivals(0.0 * many, 50 * many, n_out * many, 1.0), 0)
    assert float(np.median(served.tpot_s)) == pytest.approx(outcome.tpot_s, rel=0.02)
    assert served.usd / len(many) == pytest.approx(outcome.cost_usd_per_request, rel=0.03)


def by_steps(
    step_s: list[float], token_usd: list[float], n_in: list[int], part: int, n_out: list[int], at_s: list[float]
) -> tuple[list[float], list[float], float]:
    """Answer requests as runtime/batch.py does, step after step: when each has its first token and its last, and what that costs.

    Reading takes and costs 0.1 and a hundredth of the tokens.
    """
    places, now_s, usd, unread = len(step_s) - 1, 0.0, 0.0, list(n_in)
    first_s, end_s = [0.0] * len(at_s), [0.0] * len(at_s)
    waiting, reading, left = list(range(len(at_s))), list[int](), dict[int, int]()
    while waiting or reading or left:
        if not reading and not left:
            now_s = max(now_s, at_s[waiting[0]])
        while waiting and at_s[waiting[0]] <= now_s and len(reading) + len(left) < places:
            reading.append(waiting.pop(0))
        if reading:
            number = reading.pop(0)
            read = min(part, unread[number]) if reading or left else unread[number]
            now_s, usd, unread[number] = now_s + 0.1 + read / 100, usd + 0.1 + read / 100, unread[number] - read
            if unread[number]:
                reading.append(number)
            else:
                first_s[number], left[number] = now_s, n_out[number]
        if left:
            now_s, usd = now_s + step_s[len(left)], usd + len(left) * token_usd[len(left)]
            left = {number: tokens - 1 for number, tokens in left.items()}
            end_s = [now_s if left.get(number) == 0 else end_s[number] for number in range(len(at_s))]
            left = {number: tokens for number, tokens in left.items() if tokens}
    return first_s, end_s, usd


@pytest.mark.parametrize("part", [30, 256])
@pytest.mark.parametrize("per_s", [0.05, 0.3, 3.0])
def test_requests_that_share_steps_are_answered_as_step_after_step(per_s: float, part: int) -> None:
    random, count = np.random.default_rng(4), 300
    at_s = np.cumsum(random.exponential(1 / per_s, count))
    n_in, n_out = random.integers(1, 200, count), random.integers(1, 30, count)
    step_s, token_usd = np.array([0.0, 0.1, 0.13, 0.2]), np.array([0.0, 1.0, 0.7, 0.5])
    lengths, reading = np.array([0.0, 200.0]), np.array([0.1, 2.1])
    made = Service("it", "it", 1, lengths, reading, reading, step_s, token_usd, at_once=3, part_tokens=part, most=10**9)
    served = run(made, Arrivals(at_s, n_in, n_out, float(at_s[-1])), 0)
    first_s, end_s, usd = by_steps(step_s.tolist(), token_usd.tolist(), n_in.tolist(), part, n_out.tolist(), at_s.tolist())
    assert served.ttft_s == pytest.approx(np.array(first_s) - at_s)
    assert served.tpot_s == pytest.approx((np.array(end_s) - np.array(first_s)) / n_out)
    assert served.usd == pytest.approx(usd)


def test_answers_that_share_an_instance_are_ended_by_the_platform_one_by_one() -> None:
    made = service(1, at_once=2, limit_s=2.0, most=10, usd_per_hour=3600.0)
    made = replace(made, step_s=np.array([0.0, 0.5e-3, 1e-3]), token_usd=np.ones(3))
    served = run(made, Arrivals(np.zeros(2), np.ones(2, dtype=np.int64), np.array([5000, 1000]), 1.0), 0)
    assert served.refused.tolist() == [True, False]
    assert served.usd == pytest.approx(2.0 + 2 * 1000 + 2000)  # both for a second, then the longer one at twice the speed


def test_functions_that_start_hold_up_all_requests_of_an_instance() -> None:
    functions = Functions(waits_s=np.array([3.0]), start_usd=1.0, idle_s=100.0, needed=(0, 1, 1))
    made = service(1, at_once=2, functions=functions)
    at_s, n_out = np.array([0.0, 1.0, 200.0]), np.array([1000, 1000, 1000])
    served = run(made, Arrivals(at_s, np.ones(3, dtype=np.int64), n_out, 200.0), 0)
    assert served.cold.tolist() == [True, False, True]
    assert served.ttft_s.tolist() == pytest.approx([3.0, 2.001, 3.0])
    assert served.usd == 2.0


def test_starts_that_differ_make_waits_that_differ() -> None:
    functions = Functions(waits_s=np.array([1.0, 5.0]), start_usd=0.0, idle_s=10.0, needed=(0, 1))
    at_s = 100.0 * np.arange(400)
    served = run(service(1, functions=functions), Arrivals(at_s, np.ones(400, dtype=np.int64), np.ones(400, dtype=np.int64), 4e4), 0)
    assert set(served.ttft_s.round(6)) == {1.0, 5.0}
    assert served.ttft_s.mean() == pytest.approx(3.0, abs=0.3)


def test_starts_that_were_measured_make_the_waits_of_all_layers(tmp_path: Path) -> None:
    """One layer's functions start after the other's, each with a wait of its own, of those that were measured."""
    problem = problem_of(synthetic_profile(tmp_path, layers=3), tiny_catalog(), n_in=50, n_out=40, requests_per_hour=6.0)
    parts = {"process_s": 0.1, "imports_s": 0.1, "weights_s": 0.1, "first_result_s": 0.1}
    layers = tuple(LayerPlan(layer=layer, remote=(0,), memory_mb=256, replicas=1) for layer in problem.spec.moe_layers)
    placement = Placement(problem.menu[0], layers)

    def waits_s(*single_s: float) -> Floats:
        start = ColdStart(starts=3, total_s=2.0, waits_s=single_s, **parts)
        measured = replace(problem, latency=problem.latency.model_copy(update={"cold_start": start}))
        made = of_placement(measured, placement, "plan", np.full(1, 50.0), 40.0)
        assert made.functions is not None
        return made.functions.waits_s

    (median_s,) = waits_s()
    differ_s = waits_s(1.0, 2.0, 6.0)
    assert differ_s.mean() == pytest.approx(median_s + 3 * (3.0 - 2.0), rel=0.03)
    assert differ_s.min() == pytest.approx(median_s - 3 * 1.0) and differ_s.max() == pytest.approx(median_s + 3 * 4.0)


def test_a_shared_step_takes_and_costs_what_so_many_requests_make_it(tmp_path: Path) -> None:
    profile, catalog = synthetic_profile(tmp_path), tiny_catalog()
    layers = tuple(LayerPlan(layer=layer, remote=(0, 1, 2), memory_mb=256, replicas=1) for layer in profile.record.spec.moe_layers)

    def made(concurrency: int) -> Service:
        problem = problem_of(profile, catalog, n_in=50, n_out=40, concurrency=concurrency)
        return of_placement(problem, Placement(problem.menu[0], layers), "plan", np.full(1, 50.0), 40.0)

    four = made(4)
    for number in (1, 2, 4):
        assert (four.step_s[number], four.token_usd[number]) == (made(number).step_s[-1], made(number).token_usd[-1])
    assert four.step_s[2] < four.step_s[3] < four.step_s[4] and four.token_usd[2] > four.token_usd[3] > four.token_usd[4]


def test_a_part_of_a_prompt_takes_what_a_prompt_of_its_length_does(tmp_path: Path) -> None:
    """A long prompt is read in parts beside another request, which makes a step before each; where nobody else is, it is read whole."""
    problem = problem_of(synthetic_profile(tmp_path), tiny_catalog(), n_in=50, n_out=40, concurrency=4)
    layers = tuple(LayerPlan(layer=layer, remote=(0, 1, 2), memory_mb=256, replicas=1) for layer in problem.spec.moe_layers)
    placement, lengths = Placement(problem.menu[0], layers), np.array([600.0, 1000.0])
    made, alone = (of_placement(one, placement, "plan", lengths, 40.0) for one in (problem, replace(problem, concurrency=1)))
    assert alone.part_tokens == math.inf and alone.prompts[0] == 600.0
    whole_s, part_s, rest_s = np.interp((600.0, PROMPT_PART_TOKENS, 600.0 % PROMPT_PART_TOKENS), made.prompts, made.prefill_s).tolist()
    assert part_s == pytest.approx(float(prefill_s(problem, placement, np.array([PROMPT_PART_TOKENS]))[0]), rel=1e-12)
    served = run(replace(made, functions=None, start_s=0.0), Arrivals(np.zeros(2), np.array([600, 600]), np.array([40, 40]), 1.0), 0)
    second_s = whole_s + 3 * float(made.step_s[1]) + 2 * part_s + rest_s
    assert served.ttft_s.tolist() == pytest.approx([whole_s, second_s])


def test_rented_instances_need_functions_each_however_few_requests_they_have(tmp_path: Path) -> None:
    """Three requests of three instances have a call under way each, where one instance of four places would make one call for all."""
    problem = problem_of(synthetic_profile(tmp_path), tiny_catalog(), n_in=50, n_out=400, concurrency=4)
    layers = tuple(LayerPlan(layer=layer, remote=(0, 1, 2, 3), memory_mb=256, replicas=1) for layer in problem.spec.moe_layers)
    rented = problem.menu[0].model_copy(update={"usd_per_hour": 1.0})
    by_use, three = (
        of_placement(problem, Placement(main, layers, instances), "plan", np.full(1, 50.0), 400.0).functions
        for main, instances in ((problem.menu[0], 1), (rented, 3))
    )
    assert by_use is not None and three is not None
    assert by_use.needed[:5] == (0, 1, 1, 1, 1)
    assert three.needed[1] == 1 < three.needed[2] <= three.needed[3] == three.needed[12]

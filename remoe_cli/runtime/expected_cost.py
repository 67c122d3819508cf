"""Predict the time and the cost of one request, so that a receipt shows prediction and measurement.

The planner's cost model needs the profile, which holds more than a main function may know. What a request of any length needs of it is
little, as a decode step takes the same whatever the prompt: that goes into server.json (`PlannedCosts`), without a prompt or a token. So
every main function predicts, wherever it runs, with the planner's own functions and without the planner.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from remoe_cli.artifacts import MOST_EXPERTS, MOST_LAYERS, Concurrency, NonNegative, Part, is_none, is_one
from remoe_cli.model.draft import Speculate, is_off
from remoe_cli.model.spec import AssistantSpec, MoeSpec
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.cost import main_function
from remoe_cli.plan.cost.placement import layer_prefill, layer_step
from remoe_cli.plan.cost.prices import MainPrices, main_cost
from remoe_cli.plan.document import LayerPlan, MainSpec, Outcome, Plan
from remoe_cli.plan.problem.drafting import NO_DRAFTS, Assisted, Drafting, length_of
from remoe_cli.plan.problem.problem import Placement, Problem
from remoe_cli.plan.problem.request import problem_of
from remoe_cli.plan.problem.traffic import one_length
from remoe_cli.plan.problem.workload import Workload
from remoe_cli.profile.latency_record import Latency, Timing
from remoe_cli.profile.record import Profile

_Shares = Annotated[tuple[NonNegative, ...], Field(max_length=MOST_EXPERTS)]


class PlannedCosts(Part):
    """What of a plan, its profile and its catalog the cost of a request depends on.

    catalog        with the plan's main function alone in its menu
    latency        the profile's curves
    main_latency   those of the main function, where the plan takes them from a description of its hardware
    use            share of prompt tokens that use each expert, by MoE layer (Workload.use)
    step_s         what the experts of all layers take of a decode step
    step_usd       what all invocations of a decode step cost, by the requests that share it
    concurrency    requests that are served at once
    speculate      how many draft tokens a decode step may have; `drafting` says what these make of decode
    assistant      sizes of the model that makes them where nothing is found; None where there is none
    """

    catalog: Catalog
    latency: Latency
    main_latency: Latency | None = Field(default=None, exclude_if=is_none)
    main: MainSpec
    instances: int
    layers: tuple[LayerPlan, ...] = Field(max_length=MOST_LAYERS)
    use: tuple[_Shares, ...] = Field(max_length=MOST_LAYERS)
    step_s: NonNegative
    step_usd: NonNegative
    invocations: Literal["per-layer", "per-expert"] = Field(default="per-layer", exclude_if=lambda value: value == "per-layer")
    concurrency: Concurrency = Field(default=1, exclude_if=is_one)
    speculate: Speculate = Field(default="off", exclude_if=is_off)
    drafting: Drafting = Field(default=NO_DRAFTS, exclude_if=lambda value: value == NO_DRAFTS)
    assistant: AssistantSpec | None = Field(default=None, exclude_if=is_none)


@dataclass(frozen=True)
class Predictor:
    """Predicts requests of any length.

    problem   of warm requests, without what is known of decode steps
    prices    of the main function
    """

    planned: PlannedCosts
    problem: Problem
    prices: MainPrices

    def __call__(self, n_in: int, *n_out: int) -> Outcome:
        """Predict a request of `n_in` prompt tokens and an answer of `n_out` tokens after the first.

        Several answers are given one after another, each with its own prefill. So their times of the main function and their invocations
        add up, TTFT is that of the first, and TPOT the mean over all tokens after a first one. What a request costs however long it takes
        is in it once, as in its receipt: its fee, and its share of rented hours. Where the plan is for several requests at once, this is
        one among so many of its length.
        """
        planned, main = self.planned, self.planned.main
        placement = Placement(main, planned.layers, planned.instances)
        layers = [layer_prefill(self.problem, placement, index, n_in) for index in range(len(planned.layers))]
        step_s = main_function.decode_rest_s(self.problem, main) + planned.step_s
        warm_s = main_function.prefill_rest_s(self.problem, main, n_in) + sum(layer.seconds for layer in layers)
        ttft_s = main_function.first_token_s(self.problem, warm_s, step_s)
        busy_s, further_s, tpots_s = 0.0, 0.0, []
        for tokens in n_out:
            one = replace(self.problem, workload=self.problem.workload.resized(n_in, tokens))
            tpots_s.append(main_function.next_token_s(one, warm_s, step_s))
            further_s += tokens * tpots_s[-1]
            busy_s += main_function.busy_s(one, ttft_s, tpots_s[-1], 0.0)
        # As in its receipt: accelerator memory is that of the plan's longest request, and rented hours are shared as planned.
        steps = sum(n_out) * self.problem.drafting.passes
        functions_usd = len(n_out) * sum(layer.usd for layer in layers) + steps * planned.step_usd
        return Outcome(
            cost_usd_per_request=main_cost(self.prices, busy_s).usd + functions_usd,
            ttft_s=ttft_s,
            tpot_s=further_s / sum(n_out) if sum(n_out) else tpots_s[0],
        )


def costs_of(problem: Problem, placement: Placement) -> PlannedCosts:
    """Work out what a main function has to know of a placement.

    The problem is that of its main spec (`Problem.at_main`).
    """
    steps = [layer_step(problem, placement, index) for index in range(len(placement.layers))]
    main, side = placement.main, problem.catalog.main
    own = problem.described.get(main.name)
    return PlannedCosts(
        catalog=problem.catalog.model_copy(update={"main": side.model_copy(update={"menu": (main,)})}),
        latency=_curves(problem.latency),
        main_latency=own and _curves(own),
        main=main,
        instances=placement.instances,
        layers=placement.layers,
        use=tuple(tuple(shares) for shares in problem.workload.use.tolist()),
        step_s=sum(step.seconds for step in steps),
        step_usd=sum(step.usd for step in steps),
        invocations=problem.invocations,
        concurrency=problem.concurrency,
        speculate=length_of(problem.speculate),
        drafting=problem.drafting,
        assistant=problem.loaded_assistant,
    )


def predictor(planned: PlannedCosts, spec: MoeSpec, prices: MainPrices) -> Predictor:
    """Return what predicts requests to a main function with these prices."""
    no_tokens = np.zeros((0, len(planned.layers), spec.top_k), dtype=np.int64)
    depth = planned.speculate if planned.assistant is None else Assisted(planned.speculate)
    workload = Workload(one_length(1, 1), 0.0, np.array(planned.use), no_tokens, (), drafts={depth: planned.drafting})
    own = {} if planned.main_latency is None else {planned.main.name: planned.main_latency}
    problem = Problem(spec, planned.latency, planned.catalog, workload, own, planned.invocations, concurrency=planned.concurrency)
    problem = replace(problem, assistant=planned.assistant).with_drafts(depth)
    return Predictor(planned, problem, prices)


def cost_model(plan: Plan, profile: Profile, catalog: Catalog) -> Predictor:
    """Return what predicts requests of a plan, as its main function does."""
    problem, placement = problem_of(plan, profile, catalog).at_main(plan.main), Placement(plan.main, plan.layers, plan.instances)
    return predictor(costs_of(problem, placement), profile.record.spec, main_function.prices_of(problem, placement.bought))


def _curves(latency: Latency) -> Latency:
    """Leave out the measured points, which only say how good the curves are."""

    def timing(of: Timing | None) -> Timing | None:
        return of and of.model_copy(update={"points": (), "residuals": (), "errors": {}})

    names = ("local_expert", "remote_expert", "packed_expert", "unquantised_expert", "gpu_expert")
    invocation = latency.invocation and latency.invocation.model_copy(update={"samples": ()})
    update = {name: timing(getattr(latency, name)) for name in names} | {"nonexpert_layers": None, "invocation": invocation}
    return latency.model_copy(update=update)

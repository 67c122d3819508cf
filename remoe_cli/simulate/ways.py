"""The ways of serving that a simulation compares: a plan, and what else could serve the same requests."""

from __future__ import annotations

from dataclasses import replace

from remoe_cli.plan.assess.baselines import instances_for
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.cost.main_function import always_on
from remoe_cli.plan.cost.placement import busy_s, layer_outcomes, total
from remoe_cli.plan.document import Plan
from remoe_cli.plan.problem.problem import Placement, Problem
from remoe_cli.plan.problem.request import problem_of
from remoe_cli.profile.record import Profile
from remoe_cli.simulate.requests import Source
from remoe_cli.simulate.service import Service, of_placement, others


def ways(inputs: tuple[Plan, Profile, Catalog], source: Source) -> list[Service]:
    """List the plan, as it is, and alternatives that are bought for the source's traffic.

    An alternative has as many rented instances as that needs in the mean.
    """
    plan, problem = inputs[0], problem_of(*inputs)
    return [own_way(problem, plan, placed(plan), source), *other_ways(at_traffic(problem, source.per_hour), plan, source)]


def placed(plan: Plan) -> Placement:
    """Read the placement of a plan."""
    return Placement(plan.main, plan.layers, plan.instances)


def at_traffic(problem: Problem, per_hour: float) -> Problem:
    """Look at the problem with so many requests an hour; the share of cold ones stays."""
    return replace(problem, workload=replace(problem.workload, traffic=replace(problem.workload.traffic, per_hour=per_hour)))


def with_instances(problem: Problem, placement: Placement) -> Placement:
    """Give a placement as many rented instances as the traffic needs in the mean."""
    if not always_on(problem, placement.main):
        return placement
    layers = layer_outcomes(problem, placement)
    own_s = busy_s(problem, placement, total(problem, placement, layers), layers)
    return replace(placement, instances=instances_for(problem, own_s))


def own_way(problem: Problem, plan: Plan, placement: Placement, source: Source) -> Service:
    """Price the plan's placement, with its instances, for the requests of a source."""
    n_in, mean_out = source.n_in.astype(float), float(source.n_out.mean())
    return replace(of_placement(problem, placement, "this plan", n_in, mean_out), longest=plan.workload.served)


def other_ways(problem: Problem, plan: Plan, source: Source) -> list[Service]:
    """Price the alternatives, each with as many rented instances as the traffic needs in the mean."""
    return list(others(problem, plan, source.n_in.astype(float), float(source.n_out.mean())))

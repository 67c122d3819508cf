"""The ways of serving that a simulation compares: a plan, and what else could serve the same requests."""

from __future__ import annotations

from dataclasses import replace

from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import Plan
from remoe_cli.plan.problem.problem import Placement
from remoe_cli.plan.problem.request import problem_of
from remoe_cli.profile.record import Profile
from remoe_cli.simulate.requests import Source
from remoe_cli.simulate.service import Service, of_placement, others


def ways(inputs: tuple[Plan, Profile, Catalog], source: Source) -> list[Service]:
    """List the plan, as it is, and alternatives that are bought for the source's traffic.

    An alternative has as many rented instances as that needs in the mean.
    """
    plan = inputs[0]
    problem = problem_of(*inputs)
    traffic = replace(problem.workload.traffic, per_hour=source.per_hour)
    busy = replace(problem, workload=replace(problem.workload, traffic=traffic))
    n_in, mean_out = source.n_in.astype(float), float(source.n_out.mean())
    placement = Placement(plan.main, plan.layers, plan.instances)
    own = replace(of_placement(problem, placement, "this plan", n_in, mean_out), longest=plan.workload.served)
    return [own, *others(busy, plan, n_in, mean_out)]

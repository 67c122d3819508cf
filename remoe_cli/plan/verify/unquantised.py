"""For the verifier: the plan for a copy that is not quantised, which a plan states beside itself.

It is worked out as a plan of its own, for a profile without the stored form. That no better plan for the copy is known is taken as stated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from remoe_cli.plan.document import Unquantised
from remoe_cli.plan.verify.baselines import missed
from remoe_cli.plan.verify.cost import cold_wait_s, outcome
from remoe_cli.plan.verify.finding import Finding, outcomes, require, same
from remoe_cli.plan.verify.inputs import VerifierInputs
from remoe_cli.plan.verify.limits import in_time, limits, placement
from remoe_cli.plan.verify.requests import times, too_long
from remoe_cli.plan.verify.steps import at_once
from remoe_cli.profile.hardware import dequantised_times


def unquantised(inputs: VerifierInputs) -> Iterator[Finding]:
    """Find what is wrong with the plan for such a copy, where one is stated."""
    stated, record = inputs.plan.unquantised, inputs.profile.record
    if stated is None:
        return
    quantised = record.spec.stored is not None and record.spec.stored.served and inputs.plan.method in ("exact", "scan")
    dtype = record.spec.dtype if quantised else "no such copy"
    yield from require(stated.dtype == dtype, "unquantised.dtype", stated.dtype, dtype)
    main = next((main for main in inputs.catalog.main.menu if main.name == stated.spec), None)
    if main is None:
        yield Finding("unquantised.spec", stated.spec, "not on the catalog's menu")
        return
    placed = {"main": main, "instances": stated.instances, "layers": stated.layers}
    served = at_once(inputs.catalog, inputs.plan.workload, main)
    plan = inputs.plan.model_copy(update=placed | {"concurrency": served})
    spec, latency = record.spec.model_copy(update={"stored": None}), dequantised_times(record.latency, record.spec)
    profile = replace(inputs.profile, record=record.model_copy(update={"spec": spec, "latency": latency}))
    findings = tuple(placement(plan, profile, inputs.catalog))
    for one in findings or _figures(replace(inputs, plan=plan, profile=profile), stated):
        yield replace(one, field=f"unquantised.{one.field}")


def _figures(inputs: VerifierInputs, stated: Unquantised) -> Iterator[Finding]:
    """Check what is not well formed by itself: limits, targets, cost and times of the copy."""
    plan, found = inputs.plan, outcome(inputs, inputs.plan.main, inputs.plan.instances, inputs.plan.layers)
    yield from limits(inputs)
    yield from outcomes("", stated, found)
    yield from same("cold_start_s", stated.cold_start_s, cold_wait_s(inputs, plan.main, plan.layers))
    for name, value in missed(plan, found).items():
        yield Finding(f"targets.{name}", repr(getattr(plan.targets, name)), repr(value))
    whole_s = found.ttft_s + inputs.n_out * found.tpot_s
    yield from require(in_time(inputs, found), "instances", plan.instances, f"a request takes {whole_s} s")
    longest = [(0.0, n_in, n_out) for n_in, n_out in inputs.longest]
    took = times(inputs, sorted({n_in for n_in, _ in inputs.longest}))
    for field, limited, is_found in (*took.broken, *too_long(inputs, took, longest, found.tpot_s)):
        yield Finding(field, str(limited), is_found)

"""Everything that a report shows, worked out once, before it is drawn as a page or as pictures.

What the inputs do not have is None or empty, and has no section. `left_out` says why where somebody might look for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from remoe_cli.errors import RemoeError, UsageError
from remoe_cli.plan.assess.frontier import Point, scanned_frontier, unbeaten
from remoe_cli.plan.catalog.catalog import Catalog, read_catalog
from remoe_cli.plan.document import BaselineName, Plan
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.plan.problem.request import problem_of
from remoe_cli.predict.divergence import noise_floor
from remoe_cli.predict.record import PredictorRecord, read_record
from remoe_cli.profile.record import Profile, read_profile
from remoe_cli.progress import Progress, Report
from remoe_cli.report.cold_start import Start, measured_start, starts_of
from remoe_cli.report.inputs import Inputs, Receipts
from remoe_cli.report.routing import Routing, routing_of
from remoe_cli.report.terms import table_of
from remoe_cli.report.what_if import Table
from remoe_cli.simulate.break_even import BreakEvenBursts, break_even_bursts
from remoe_cli.simulate.requests import Source, served_of, source_of, source_of_traffic


@dataclass(frozen=True)
class Predictors:
    """The predictors of a profile on its held-out prompts, and what a perfect one would score."""

    record: PredictorRecord
    floor_bits: float


@dataclass(frozen=True)
class Content:
    """What a report shows.

    model     name of the model, without the folders of this machine
    sources   (what, name, digest) of what it is made from
    left_out  why sections are missing
    details   more on that, for the terminal alone: it names folders of this machine
    """

    model: str
    sources: tuple[tuple[str, str, str], ...]
    plan: Plan | None = None
    routing: Routing | None = None
    predictors: Predictors | None = None
    table: Table | None = None
    frontier: tuple[Point, ...] = ()
    bursts: tuple[BreakEvenBursts, ...] = ()
    starts: tuple[Start, ...] = ()
    receipts: Receipts | None = None
    left_out: tuple[str, ...] = ()
    details: tuple[str, ...] = ()


def content_of(inputs: Inputs, stage: Progress) -> Content:
    """Work out what a report of these inputs shows; `stage` shows how far the work is.

    A plan names its profile and its catalog: where these are on this machine as they were, their sections are there too.

    Raises: UsageError where plan and profile are of models of different shapes.
    """
    content, profile, catalog = _inputs_of_plan(inputs)
    content = replace(content, model=_model(profile, inputs), sources=_sources(profile, inputs), plan=inputs.plan, receipts=inputs.receipts)
    if inputs.receipts is not None:
        content = replace(content, details=(*content.details, *inputs.receipts.warnings))
    if profile is not None:
        with stage("Reading the routing"):
            content = replace(content, routing=routing_of(profile), predictors=_predictors(profile))
        content = replace(content, starts=measured_start(profile.record.latency.cold_start))
    if inputs.plan is not None and profile is not None and catalog is not None:
        problem = problem_of(inputs.plan, profile, catalog)
        content = replace(content, starts=starts_of(inputs.plan, problem) or content.starts)
        try:
            with stage("Costs for the sliders") as progress:
                content = replace(content, table=table_of(inputs.plan, problem, catalog, progress))
        except RemoeError as error:
            why = "There are no sliders, because the page's formulas do not give the figures of the plan. Make it again with this version."
            content = replace(content, left_out=(why,), details=(*content.details, error.message))
        with stage("Plans of the frontier") as progress:
            content = replace(content, frontier=_frontier(inputs.plan, problem, progress))
        with stage("Break-even traffic") as progress:
            source = _source(inputs, problem)
            content = replace(content, bursts=break_even_bursts((inputs.plan, profile, catalog), source, progress))
    return content


_WITHOUT = "There are no sliders, no frontier and no break-even traffic, because"


def _inputs_of_plan(inputs: Inputs) -> tuple[Content, Profile | None, Catalog | None]:
    """Read the profile and the catalog of the plan; the content says why one of them cannot be used."""
    plan, nothing = inputs.plan, Content(model="", sources=())
    if plan is None:
        return nothing, inputs.profile, None
    if inputs.profile is not None:
        _refuse_other_shape(plan, inputs.profile)
    try:
        profile = inputs.profile or read_profile(Path(plan.profile.path))
        catalog = read_catalog(plan.catalog.path)
    except RemoeError as error:
        why = f"{_WITHOUT} the profile or the catalog that the plan was made from is not here."
        return replace(nothing, left_out=(why,), details=(error.message,)), inputs.profile, None
    for what, planned, found in (("profile", plan.profile, profile.sha256), ("catalog", plan.catalog, catalog.file.sha256)):
        if planned.sha256 != found:
            why = f"{_WITHOUT} the {what} is not the one that the plan was made from."
            return replace(nothing, left_out=(why,)), profile if what == "catalog" else inputs.profile, None
    return nothing, profile, catalog


def _refuse_other_shape(plan: Plan, profile: Profile) -> None:
    spec = profile.record.spec
    if (tuple(layer.layer for layer in plan.layers), plan.model.experts_per_layer) != (spec.moe_layers, spec.experts_per_layer):
        raise UsageError(
            f"The plan is of {len(plan.layers)} MoE layers with {plan.model.experts_per_layer} experts, and the profile {profile.path} of "
            f"{len(spec.moe_layers)} with {spec.experts_per_layer}.",
            "Give the profile that the plan was made from, or one of both.",
        )


def _frontier(plan: Plan, problem: Problem, progress: Report) -> tuple[Point, ...]:
    """Find the frontier by the scan; the plan itself and its all-local baselines are plans too."""
    targets = plan.targets
    ttft_s = targets.ttft_s if targets.ttft_percentile is None else None
    found = scanned_frontier(problem, Aim(ttft_s=ttft_s), progress)
    remote = sum(len(layer.remote) for layer in plan.layers)
    known = [Point(plan.tpot_s, plan.ttft_s, plan.cost_usd_per_request, 0.0, remote, plan.main.name)]
    for name in (BaselineName.ALL_LOCAL, BaselineName.MIX):
        local = plan.baselines.get(name)
        if local is not None and local.cost_usd_per_request is not None:
            known.append(Point(local.tpot_s, local.ttft_s, local.cost_usd_per_request, 0.0, 0, local.spec))
    return tuple(unbeaten([*found, *known]))


def _source(inputs: Inputs, problem: Problem) -> Source:
    """Take the requests of the trace that the plan is for, or else those of the plan."""
    workload = problem.workload
    per_hour = workload.requests_per_hour or 1.0
    if inputs.trace is None:
        return source_of_traffic(workload.traffic, per_hour, 1.0)
    return served_of(source_of(inputs.trace, per_hour, None), inputs.plan.workload.served if inputs.plan else None)


def _predictors(profile: Profile) -> Predictors | None:
    record = read_record(profile.path, profile.sha256)
    if record is None or not record.validation_bits:
        return None
    counts = sum((profile.arrays[f"{phase}_counts"].astype(np.int64) for phase in profile.record.routing.phases), np.zeros((), np.int64))
    totals = counts.sum(axis=2, keepdims=True)
    used = np.flatnonzero((totals > 0).all(axis=(1, 2)))
    selections = totals[used].mean(axis=(1, 2)).astype(np.int64)
    return Predictors(record, float(noise_floor(counts[used] / totals[used], selections).mean()))


def _model(profile: Profile | None, inputs: Inputs) -> str:
    name = inputs.plan.model.name if inputs.plan else profile.record.model.path if profile else ""
    return Path(name).name if name.startswith(("/", "~", ".")) else name


def _sources(profile: Profile | None, inputs: Inputs) -> tuple[tuple[str, str, str], ...]:
    rows: list[tuple[str, str, str]] = []
    if inputs.plan is not None and inputs.plan_path is not None:
        rows.append(("plan", inputs.plan_path.name, ""))
        rows.append(("catalog", Path(inputs.plan.catalog.path).name, inputs.plan.catalog.sha256))
    if profile is not None:
        rows.append(("profile", profile.path.name, profile.sha256))
    rows += [("receipts", path.name, "") for path in (inputs.receipts.paths if inputs.receipts else ())]
    return tuple(rows)

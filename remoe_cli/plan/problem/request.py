"""What somebody asks a plan for, and the problem that this poses for a profile and a catalog."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.model.draft import AUTO_TOKENS, Speculate
from remoe_cli.model.spec import ONE_AT_A_TIME
from remoe_cli.plan.catalog.catalog import Catalog, read_catalog
from remoe_cli.plan.document import Method, Plan, PredictedRouting, Source, TtftAt, Waking, read_plan
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.drafting import depth_of, length_of
from remoe_cli.plan.problem.problem import Invocations, Problem
from remoe_cli.plan.problem.sizes import sizes_of
from remoe_cli.plan.problem.traffic import Traffic
from remoe_cli.plan.problem.workload import Workload, from_profile
from remoe_cli.profile.hardware import latency_from
from remoe_cli.profile.record import Profile, packed_form, read_profile_of


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is asked for. What is None has a default.

    aim                 what shall be least, and under which targets
    n_in, n_out         tokens of the prompt, and tokens generated after the first; by default the profile's medians
    traffic             requests of several lengths, in place of `n_in` and `n_out`
    requests_per_hour   by default what `traffic` says; without both, idle hours and cold starts are not priced
    cold_share          share of requests that find everything cold; by default what the traffic implies
    invocations         one call for all experts that a token hits in a function, or one call for each
    solver              exact, scan or paper; chooses the placement unless one of the next two does
    remote_share        force this share of the experts into functions, the least used first
    placement_file      price the placement in this file
    gpu_experts         whether experts may be on the main function's GPU
    routing             a mixture of the profile's prompts; by default all of them together
    time_limit_s        seconds after which the exact solver stops with the best plan that it has
    examine             also price scenarios and break-evens
    concurrency         requests that each instance of the main function serves at once
    speculate           draft tokens that a decode pass may have; auto lets the planner choose. It also chooses whether the profile's
                        assistant makes them
    """

    aim: Aim = field(default_factory=Aim)
    n_in: int | None = None
    n_out: int | None = None
    traffic: Traffic | None = None
    requests_per_hour: float | None = None
    cold_share: float | None = None
    invocations: Invocations = "per-layer"
    solver: Method = "exact"
    remote_share: float | None = None
    placement_file: Path | None = None
    gpu_experts: bool = True
    routing: PredictedRouting | None = None
    waking: Waking | None = None
    time_limit_s: float = 120.0
    examine: bool = True
    concurrency: int = 1
    speculate: Speculate = "off"


def make_problem(profile: Profile, catalog: Catalog, request: PlanRequest) -> Problem:
    """Pose the problem of a profile on a catalog.

    Raises: what `from_profile` raises, and UsageError where only one request at a time can be planned for, or no drafts can.
    """
    if request.concurrency > 1 and (family := profile.record.spec.family) in ONE_AT_A_TIME:
        raise UsageError(
            f"A model of family '{family}' answers one request at a time: requests cannot share its cache.", "Leave --concurrency out."
        )
    if request.concurrency > 1 and (request.solver == "paper" or request.invocations == "per-expert"):
        option = "--solver paper" if request.solver == "paper" else "--invocation per-expert"
        raise UsageError(f"{option} is the paper's, which serves one request at a time.", f"Leave {option} or --concurrency out.")
    workload = from_profile(profile, request.n_in, request.n_out, request.traffic, request.requests_per_hour, request.routing)
    implied = workload.traffic.cold_share(catalog.function.idle_ttl_s)
    cold = implied if request.cold_share is None else request.cold_share
    latency, spec = profile.record.latency, profile.record.spec
    assistant = profile.record.assistant.spec if profile.record.assistant else None
    measured_on_cpus = latency.source == "measured" and latency.gpu_expert is None and not latency.copy_s.fixed_s
    described = {
        main.name: latency_from(main.hardware, spec, main.vcpus, assistant)
        for main in catalog.main.menu
        if main.hardware and not (measured_on_cpus and main.gpu_memory_mb is None)
    }
    waking = request.waking
    if waking is None and (zero := catalog.zero) is not None:
        waking = workload.traffic.waking(zero.idle_s, zero.wake_s)
    workload = replace(workload, cold_share=cold, waking=waking)
    at = _ttft_at(workload, request.aim.ttft_percentile)
    if at is not None:
        workload = replace(workload, also_priced=(at.n_in,))
    problem = Problem(
        spec,
        latency,
        catalog,
        workload,
        described,
        request.invocations,
        request.gpu_experts,
        at,
        request.concurrency,
        assistant=assistant,
    )
    if request.speculate == "off":
        return problem
    _refuse_drafts(profile, request, workload)
    depths = tuple(depth for depth in ("off", *workload.drafts) if request.speculate in ("auto", length_of(depth)))
    return replace(problem, depths=depths) if len(depths) > 1 else problem.with_drafts(request.speculate)


def _refuse_drafts(profile: Profile, request: PlanRequest, workload: Workload) -> None:
    """Raise UsageError where drafts cannot be priced."""
    if request.solver == "paper" or request.invocations == "per-expert":
        option = "--solver paper" if request.solver == "paper" else "--invocation per-expert"
        raise UsageError(f"{option} is the paper's, which has no drafts.", f"Leave {option} or --speculate out.")
    if not workload.drafts:
        why = (
            "its routing was imported, without tokens"
            if profile.record.routing.source == "imported"
            else "it was recorded by an earlier version of remoe, its answers have one token, or the model takes no drafts"
        )
        raise UsageError(
            f"The profile {profile.path} does not know how many draft tokens answers accept: {why}.",
            "Make a profile with 'remoe profile', or leave --speculate out.",
        )
    if request.speculate not in ("auto", *workload.drafts):
        raise UsageError(
            f"--speculate is {request.speculate}, and a profile knows drafts of at most {AUTO_TOKENS} tokens.",
            f"Plan with --speculate auto, or with 1 to {AUTO_TOKENS}; 'remoe serve --speculate' takes more.",
        )


def forms_of(problem: Problem) -> tuple[Problem, ...]:
    """List the problem for each form in which functions may compute experts, ready first."""
    spec, latency = packed_form(problem.spec, problem.latency)
    return (problem,) if spec is problem.spec else (problem, replace(problem, spec=spec, latency=latency))


def _ttft_at(workload: Workload, percentile: float | None) -> TtftAt | None:
    """Find the request that has to be in time so that a percentage of the requests is.

    Where warm requests are that many, the longest prompts among them and all cold requests may be late; else cold ones count too.
    """
    if percentile is None:
        return None
    share, warm = percentile / 100, 1 - workload.cold_share
    cold = share > warm
    return TtftAt(n_in=workload.traffic.sizes.prompt_at(share if cold else share / warm), cold=cold)


def inputs_of(plan_path: Path) -> tuple[Plan, Profile, Catalog]:
    """Read a plan with the profile and the catalog that it names.

    Raises: what `read_plan` and `catalog_of` raise, and ArtifactError for a profile that is missing or has changed since.
    """
    plan = read_plan(plan_path)
    profile, catalog = read_profile_of(plan_path, Path(plan.profile.path)), catalog_of(plan, plan_path)
    _refuse_changed(plan_path, "profile", plan.profile, profile.sha256)
    return plan, profile, catalog


def catalog_of(plan: Plan, plan_path: Path) -> Catalog:
    """Read the catalog that a plan names.

    Raises: ArtifactError for one that has changed since, and what `read_catalog` raises.
    """
    catalog = read_catalog(plan.catalog.path)
    _refuse_changed(plan_path, "catalog", plan.catalog, catalog.file.sha256)
    return catalog


def _refuse_changed(plan_path: Path, what: str, planned: Source, sha256: str) -> None:
    if planned.sha256 != sha256:
        message = f"The {what} {planned.path} has changed since the plan {plan_path} was made."
        raise ArtifactError(message, "Make the plan again with 'remoe plan', and deploy it.")


def problem_of(plan: Plan, profile: Profile, catalog: Catalog) -> Problem:
    """Pose the problem that a plan solves, of its profile and catalog, in the plan's form of experts."""
    profile = profile.in_form(plan.model.packed)
    problem = make_problem(profile, catalog, replace(request_of(plan), aim=Aim(), speculate="off"))
    if (depth := depth_of(plan)) != "off" and depth not in problem.workload.drafts:
        raise ArtifactError(f"The profile {profile.path} does not know the drafts that the plan was made with.", "Plan again.")
    return problem.with_drafts(depth)


def request_of(plan: Plan) -> PlanRequest:
    """Say what a plan was asked for: ask for the same again with other times or another routing.

    A share of experts that was forced out (--remote-share) is asked for again, and a placement that was given in a file is not.
    """
    workload, targets = plan.workload, plan.targets
    longest = sizes_of(tuple((1 / len(workload.longest), *size) for size in workload.longest)) if workload.longest else None
    return PlanRequest(
        aim=Aim(plan.objective, targets.ttft_s, targets.tpot_s, targets.budget_usd, targets.ttft_percentile),
        traffic=Traffic(workload.lengths, workload.requests_per_hour, requests=longest),
        cold_share=workload.cold_share,
        invocations=plan.invocations,
        solver=plan.method if plan.method in ("scan", "paper") else "exact",
        remote_share=plan.remote_share if plan.method == "forced" else None,
        routing=workload.routing,
        waking=workload.waking,
        concurrency=workload.concurrency,
        speculate=workload.speculate,
    )

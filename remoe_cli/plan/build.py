"""The way of `remoe plan` through the code, stage by stage. `make_plan` is the pipeline.

1. **Ask.** `PlanRequest` (problem/request.py) holds what the command line asks for. `make_problem` turns it, a profile and a catalog into
   a `Problem`: the model's sizes, its measured or described times, prices, and the `Workload` (`from_profile`), which says how often
   requests come, how long they are, and how often experts are used. `Aim` says what shall be least, and under which targets.
2. **Choose.** `best_form` (choose.py) takes the placement from a file (`read_placement`), from the paper's heuristic (`paper_plan`), or
   from the planner: `candidate_sets` lists the remote sets of each layer that are weighed, or `forced_sets` fixes them for --remote-share;
   `build_columns` prices every set at every memory size, number of functions and number of replicas;
   `scan` finds a good plan quickly, `solve` searches all main functions for the best one and proves a lower bound,
   and `improve` exchanges single experts: for both forms, where functions may compute experts in either. Where no plan meets the targets,
   `diagnose` says which limit fails and what would do. All experts stay local where that is no worse. Where the planner also chooses how
   many draft tokens a pass may have, each number is a part of the problem (`Problem.parts`), with a bound of its own.
3. **Compare.** `baselines` (assess/baselines.py) prices the other ways to run the model, with drafts of the same length.
4. **Judge.** `break_even_traffic` (assess/robustness.py) finds the traffic above which an always-on instance is cheaper, and `judge`
   (assess/verdict.py) says whether the plan is worth it, and why; `notes` says what was assumed, and `form_notes`
   (assess/form.py) what is quantised, in which form functions compute it, and why.
5. **Doubt.** `by_kind` (assess/kinds.py) finds the best plan with each kind of main function.
   `unquantised` (assess/unquantised.py) does so for a copy that is not quantised, where the checkpoint is.
   `scenarios`, `held_out`, `unpredicted` and `break_evens` (assess/robustness.py) price the plan where calls, prices or routing
   differ.
6. **Write down.** `Plan` (document.py) takes it all. The command line then has `verify` (verify/check.py) work out every figure again
   with code of its own, writes the file, and shows the rows of explain/rows.py.

Stages 2 to 5 share one cost model: `evaluate` (cost/placement.py) over cost/main_function.py and cost/expert_functions.py.
"""

from __future__ import annotations

from remoe_cli.blas import one_thread
from remoe_cli.errors import UsageError
from remoe_cli.plan.assess.form import form_notes
from remoe_cli.plan.assess.kinds import by_kind
from remoe_cli.plan.assess.robustness import break_even_traffic, break_evens, held_out, scenarios, unpredicted
from remoe_cli.plan.assess.unquantised import unquantised
from remoe_cli.plan.assess.verdict import judge, notes
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.choose import Chosen, best_form
from remoe_cli.plan.cost.placement import evaluate, layer_outcomes
from remoe_cli.plan.cost.prompts import cold_wait_s
from remoe_cli.plan.cost.requests import spread, with_timeouts
from remoe_cli.plan.document import Costs, Outcome, Plan, PlannedAssistant, PlannedModel, Source, Status, Targets, WorkloadRef
from remoe_cli.plan.problem.aim import SLACK
from remoe_cli.plan.problem.drafting import length_of
from remoe_cli.plan.problem.problem import Placement, Problem
from remoe_cli.plan.problem.request import PlanRequest, make_problem
from remoe_cli.plan.problem.workload import Workload
from remoe_cli.profile.loss_record import loss_warning
from remoe_cli.profile.record import Profile


@one_thread()
def make_plan(profile: Profile, catalog: Catalog, request: PlanRequest | None = None) -> Plan:
    """Make the plan that is asked for.

    The same input gives the same bytes, unless the time limit ends the search.

    Raises: InfeasibleError when no plan meets the limits, and what `from_profile`, `forced_sets` and `read_placement` raise.
    """
    request = request or PlanRequest()
    whole, aim = make_problem(profile, catalog, request), request.aim
    _refuse_hours_without_traffic(whole)
    problem, chosen, others = best_form(whole, request)
    outcome = evaluate(problem, chosen.placement)
    value = aim.value(outcome)
    bound = None if chosen.bound is None else min(chosen.bound, value)
    gap = None if bound is None else (value - bound) / value if value > 0 else 0.0
    examined = request.examine and len(problem.workload.trace) > 0
    traffic = None
    if examined or problem.workload.requests_per_hour is None:
        traffic = break_even_traffic(problem, aim, chosen.placement, others.priced)
    asked = request.remote_share is not None or request.placement_file is not None
    forms = form_notes(whole, problem, chosen.placement, aim, searched=examined and chosen.method in ("exact", "scan"))
    judgement = judge(problem, aim, chosen.placement, outcome, others, traffic, asked=asked)
    plan = Plan(
        profile=Source(path=str(profile.path), sha256=profile.sha256),
        catalog=catalog.file,
        prices_of=catalog.oldest_price.isoformat(),
        model=PlannedModel(
            name=profile.record.model.path,
            revision=profile.record.model.revision,
            experts_per_layer=problem.spec.experts_per_layer,
            expert_bytes=problem.spec.expert_bytes,
            nonexpert_bytes=problem.spec.nonexpert_bytes,
            read_expert_bytes=problem.spec.read_expert_bytes if problem.spec.is_served_quantised else None,
            read_nonexpert_bytes=problem.spec.read_nonexpert_bytes if problem.spec.is_served_quantised else None,
            packed=problem.spec.is_packed,
            experts=None if (remote := problem.spec.remote) is None else remote.form,
            fetched_bytes=None if remote is None else remote.expert_bytes,
        ),
        workload=_workload_ref(problem.workload, request),
        invocations=problem.invocations,
        targets=Targets(
            ttft_s=aim.ttft_s,
            tpot_s=aim.tpot_s,
            budget_usd=aim.budget_usd,
            ttft_percentile=aim.ttft_percentile,
            ttft_at=problem.ttft_at,
        ),
        objective=aim.objective,
        method=chosen.method,
        **outcome.model_dump(),
        spread=spread(problem, chosen.placement, outcome.tpot_s),
        cold_start_s=cold_wait_s(problem, chosen.placement),
        lower_bound_usd=bound if aim.objective == "cost" else None,
        lower_bound_s=bound if aim.objective != "cost" else None,
        gap=gap,
        status=_status(chosen, gap),
        verdict=judgement.verdict,
        basis=judgement.basis,
        reason=judgement.reason,
        notes=tuple(
            [*notes(problem, chosen.placement, chosen.method, chosen.gain), *forms, *_bound_note(profile, chosen), *_loss_note(profile)]
        ),
        main=chosen.placement.main,
        instances=chosen.placement.instances,
        concurrency=problem.at_main(chosen.placement.main).concurrency,
        speculate=length_of(problem.speculate),
        assistant=_planned_assistant(profile, problem),
        layers=with_timeouts(problem, chosen.placement.layers, chosen.placement.main),
        costs=_costs(problem, chosen.placement, outcome),
        baselines=others.priced,
        missing=others.missing,
        break_even_traffic=traffic,
    )
    if not examined:
        return plan
    searched = unpredicted(problem, profile, aim, chosen.placement) if request.routing else held_out(problem, profile, aim)
    doubts: dict[str, object] = {
        "unquantised": unquantised(problem, aim) if chosen.method in ("exact", "scan") else None,
        "scenarios": tuple([*scenarios(problem, aim, chosen.placement), *([searched] if searched else [])]),
        "kinds": by_kind(problem, aim, chosen.placement),
        "break_evens": tuple(break_evens(problem, aim, chosen.placement, others.all_local)),
    }
    return plan.model_copy(update=doubts)


def _refuse_hours_without_traffic(problem: Problem) -> None:
    """Raise UsageError where every main function is rented by the hour and the traffic is unknown: then no request has a price."""
    if problem.workload.requests_per_hour is None and problem.menu[0].usd_per_hour is not None:
        raise UsageError(
            f"Every main function of the catalog {problem.catalog.name} is rented by the hour, so a request has no price without traffic.",
            "Give --requests-per-hour N.",
        )


def _planned_assistant(profile: Profile, problem: Problem) -> PlannedAssistant | None:
    drafting = profile.record.assistant
    if problem.loaded_assistant is None or drafting is None:
        return None
    return PlannedAssistant(name=drafting.path, revision=drafting.revision, bytes=drafting.spec.bytes)


def _workload_ref(workload: Workload, request: PlanRequest) -> WorkloadRef:
    return WorkloadRef(
        n_in=workload.n_in,
        n_out=workload.n_out,
        kinds=workload.lengths if len(workload.lengths) > 1 else (),
        longest=workload.front if workload.traffic.requests is not None or len(workload.lengths) > 1 else (),
        served=workload.traffic.served,
        requests_per_hour=workload.requests_per_hour,
        cold_share=workload.cold_share,
        routing=request.routing,
        waking=workload.waking,
        concurrency=request.concurrency,
        speculate=request.speculate,
    )


def _loss_note(profile: Profile) -> list[str]:
    """Say which loss of experts that are quantised on request a deployment refuses."""
    warning = None if profile.record.spec.remote is None else loss_warning(profile.record.loss)
    return [] if warning is None else [warning]


def _bound_note(profile: Profile, chosen: Chosen) -> list[str]:
    """Say how often the bound that the paper's heuristic rests on holds."""
    if chosen.method != "paper":
        return []
    from remoe_cli.plan.paper.bound import measured_note

    remote = max(len(layer.remote) for layer in chosen.placement.layers)
    note = measured_note(profile.counts("prefill"), profile.arrays["prompt_tokens"], profile.record.spec.top_k, remote)
    return [note] if note else []


def _costs(problem: Problem, placement: Placement, outcome: Outcome) -> Costs:
    layers_usd = tuple(layer.usd for layer in layer_outcomes(problem, placement))
    return Costs(main_usd=outcome.cost_usd_per_request - sum(layers_usd), layers_usd=layers_usd)


def _status(chosen: Chosen, gap: float | None) -> Status:
    if chosen.method == "forced" or chosen.method == "given":
        return chosen.method
    if gap is None:
        return "heuristic"
    return "time-limit" if chosen.timed_out else "optimal" if gap <= SLACK else "within-gap"

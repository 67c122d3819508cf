"""`remoe calibrate`: the times of calls from served requests, and whether to plan again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.kept import SinceOption, command_again, reading, show_again, since_of, verdict
from remoe_cli.cli.replacing import ReplaceOption, agree_to_replace
from remoe_cli.cli.target import NameArgument, ProfileOption, RegionOption, TargetName, TargetOption, pick
from remoe_cli.errors import InfeasibleError, OverBudgetError

if TYPE_CHECKING:
    from remoe_cli.plan.document import Plan
    from remoe_cli.plan.problem.problem import Problem
    from remoe_cli.profile.latency_record import Latency

EXAMPLES = examples(
    "remoe calibrate olmoe -o profiles/olmoe-served",
    "remoe calibrate olmoe --target aws --since 2026-11-01 -o profiles/olmoe-served",
)


def command(
    name: NameArgument,
    out: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Directory to write the new profile to.")],
    since: SinceOption = None,
    target: TargetOption = TargetName.local,
    region: RegionOption = None,
    profile: ProfileOption = None,
    yes: ReplaceOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Fit the times of calls to what served requests took, and say whether to plan again.

    The profile of the deployed plan stays; the new one differs in these times only.
    """
    from remoe_cli.profile.record import refuse_foreign

    refuse_foreign(out)
    place, asked = pick(target, region, profile), since_of(since)
    deployed = place.deployed_plan(name)
    from remoe_cli.plan.problem.request import inputs_of, make_problem, problem_of, request_of
    from remoe_cli.usage.again import again
    from remoe_cli.usage.refit import refit, refuse_all_local, refuse_old

    with output.progress("Reading the profile"):
        plan, old, catalog = inputs_of(deployed)
    refuse_old(out, old.path)
    refuse_all_local(name, plan)
    agree_to_replace(yes, out / "profile.json")
    with reading() as unreadable:
        receipts, begin = place.receipts(name), asked or place.deployed_at(name)
        lines = receipts.observations(begin, unreadable)
        while_loading = sum(line.receipt.cold_starts for line in receipts.receipts(begin) if line.kind == "loading")
        observed = [line.observed.model_copy(update={"prefill": (), "decode": ()}) for line in lines]
    with output.progress("Fitting the times"):
        made = refit(name, old, plan, catalog, observed, out)
    remarks = [*made.remarks, *_loading_remark(while_loading)]
    with output.progress("Planning again"):
        compared, why_none = None, ""
        try:
            whole = make_problem(made.profile, catalog, request_of(plan))
            compared = again(plan, problem_of(plan, made.profile, catalog), whole)
        except (InfeasibleError, OverBudgetError) as error:
            why_none = error.message
        times = _times(old.record.latency, made.profile.record.latency, problem_of(plan, old, catalog), plan)
    sentence = verdict(compared, why_none)
    document: dict[str, Any] = {
        "path": str(out),
        "requests": len(observed),
        "calls": made.calls,
        "cold_starts": made.cold_starts,
        "computing": made.computing,
        "times": {what: {"old_s": before, "new_s": now} for what, before, now in times},
        "remarks": remarks,
        "again": compared and compared.model_dump(mode="json"),
        "verdict": sentence,
    }

    def show() -> None:
        output.paragraph(f"{len(observed)} requests told of {made.calls} warm calls and {made.cold_starts} cold starts.")
        output.table("Times of calls", ("", "planned with", "served"), [(what, _ms(before), _ms(now)) for what, before, now in times])
        output.paragraph(f"Computing in a function takes {made.computing:.2f} times as long as in the profile.")
        for remark in remarks:
            output.paragraph(remark)
        if compared is not None:
            output.line()
            show_again(compared, "these times")
        output.paragraph(sentence)
        output.line(f"{'profile':<{output.LABEL}}{out}")
        if compared is None or compared.worth:
            output.line(f"{'next':<{output.LABEL}}{command_again(plan, catalog, str(out))}")

    output.result(document, show)


def _loading_remark(starts: int) -> list[str]:
    """Say which starts are not in the fitted time: they were many at once, and those of a request are few."""
    if not starts:
        return []
    return [
        f"{starts} more functions started while the main function was loaded, and are not counted: so many at once "
        "share what they start on, such as the cores of one machine, and a request starts only those that it will probably need."
    ]


def _times(old: Latency, new: Latency, problem: Problem, plan: Plan) -> list[tuple[str, float, float]]:
    """List the fitted times, each beside the one that the plan was made with.

    That is the profile's, or the catalog's where the profile has none.
    """
    from remoe_cli.plan.cost.expert_functions import cold_s

    before, now, side = old.invocation, new.invocation, problem.catalog.function
    assert now is not None, "it has been fitted"
    parts = [len(part) for layer in plan.layers for part in layer.parts]
    start_s = old.cold_start.total_s if old.cold_start else float(cold_s(problem, sum(parts) / len(parts)))
    return [
        ("a warm call, outside the function", before.unbilled_s.mean if before else side.warm_unbilled_s, now.unbilled_s.mean),
        ("a warm call, inside, besides computing", before.billed_s.mean if before else side.warm_billed_s, now.billed_s.mean),
        ("a megabyte of payload", 1e6 / (before.bytes_per_s if before else side.network_bytes_per_s), 1e6 / now.bytes_per_s),
        ("a cold start", start_s, new.cold_start.total_s if new.cold_start else start_s),
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"

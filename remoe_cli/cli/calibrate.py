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
    from remoe_cli.usage.refit import refit, refuse_old

    with output.progress("Reading the profile"):
        plan, old, catalog = inputs_of(deployed)
    refuse_old(out, old.path)
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
    sentence, times = verdict(compared, why_none), _times(old.record.latency, made.profile.record.latency)
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
        output.table("Times of calls", ("", "profile", "served"), [(what, _ms(before), _ms(now)) for what, before, now in times])
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


def _times(old: Latency, new: Latency) -> list[tuple[str, float | None, float | None]]:
    """List the fitted times, each beside the profile's."""
    before, now = old.invocation, new.invocation
    cold_s = [None if each is None else each.total_s for each in (old.cold_start, new.cold_start)]
    assert now is not None, "it has been fitted"
    return [
        ("a warm call, outside the function", None if before is None else before.unbilled_s.mean, now.unbilled_s.mean),
        ("a warm call, inside, besides computing", None if before is None else before.billed_s.mean, now.billed_s.mean),
        ("a megabyte of payload", None if before is None else 1e6 / before.bytes_per_s, 1e6 / now.bytes_per_s),
        ("a cold start", cold_s[0], cold_s[1]),
    ]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"

"""`remoe drift`: how far served routing is from the profile's, and whether that matters."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.kept import SinceOption, command_again, reading, show_again, since_of, verdict
from remoe_cli.cli.target import NameArgument, ProfileOption, RegionOption, TargetName, TargetOption, pick
from remoe_cli.errors import InfeasibleError, OverBudgetError

if TYPE_CHECKING:
    from remoe_cli.usage.drift import Drift

EXAMPLES = examples("remoe drift olmoe", "remoe drift olmoe --target aws --since 2026-11-01")


def command(
    name: NameArgument,
    since: SinceOption = None,
    target: TargetOption = TargetName.local,
    region: RegionOption = None,
    profile: ProfileOption = None,
    verbose: output.VerboseOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Compare which experts served requests use with the profile, and say whether to plan again.

    Two samples of the same workload differ too: only what is beyond that noise floor counts as drift.
    """
    place, asked = pick(target, region, profile), since_of(since)
    deployed = place.deployed_plan(name)
    from remoe_cli.plan.problem.request import inputs_of, make_problem, problem_of, request_of
    from remoe_cli.usage.again import again
    from remoe_cli.usage.drift import drift, served_routing
    from remoe_cli.usage.served import with_routing

    with output.progress("Reading the profile"):
        plan, recorded, catalog = inputs_of(deployed)
    with reading() as unreadable:
        lines = place.receipts(name).observations(asked or place.deployed_at(name), unreadable)
        served = served_routing(name, recorded, (line.observed for line in lines))
    with output.progress("Comparing the routing") as progress:
        made = drift(recorded, served, progress=progress)
    with output.progress("Planning for the served routing"):
        compared, why_none = None, ""
        try:
            phases = [phase.sum(axis=0) for phase in served.phases]
            own, whole = problem_of(plan, recorded, catalog), make_problem(recorded, catalog, request_of(plan))
            compared = again(plan, with_routing(own, *phases), with_routing(whole, *phases))
        except (InfeasibleError, OverBudgetError) as error:
            why_none = error.message
    found = made.whole.is_drift
    sentence = "Chance explains the difference: the profile still stands for what is served."
    if found:
        sentence = f"The routing is not the profile's any more. {verdict(compared, why_none)}"
    document: dict[str, Any] = {"name": name, "target": target.value, "drift": found} | made.model_dump(mode="json")
    document |= {"again": compared and compared.model_dump(mode="json"), "verdict": sentence}

    def show() -> None:
        lengths = f"{made.prefill_tokens:.0f} prompt tokens and {made.decode_tokens:.0f} further tokens"
        output.paragraph(f"{made.requests} served requests, of {lengths} in the mean")
        output.paragraph(
            f"Their routing is {made.whole.bits:.4f} bits from the profile's (95% interval {made.whole.low:.4f} to {made.whole.high:.4f}). "
            f"Two samples of the profile of this size are {made.whole.floor:.4f} bits apart, and 99% of them less than "
            f"{made.whole.floor_p99:.4f}."
        )
        output.paragraph(f"{len(made.drifted)} of {len(made.layers)} layers are beyond the noise floor.")
        if output.is_verbose():
            _table(made)
        if compared is not None:
            output.line()
            show_again(compared, "served routing")
        output.paragraph(sentence)
        if found and (compared is None or compared.worth):
            output.line(f"{'next':<{output.LABEL}}remoe profile {shlex.quote(plan.model.name)} --data PROMPTS-LIKE-THOSE-SERVED -o DIR")
            output.line(f"{'':<{output.LABEL}}{command_again(plan, catalog, 'DIR')}")

    output.result(document, show)


def _table(made: Drift) -> None:
    rows = [
        (str(each.layer), f"{each.bits:.4f}", f"{each.low:.4f} to {each.high:.4f}", f"{each.floor_p99:.4f}", "yes" if each.is_drift else "")
        for each in made.layers
    ]
    output.table("Layers, in bits", ("layer", "divergence", "95% interval", "noise floor (99%)", "drift"), rows)

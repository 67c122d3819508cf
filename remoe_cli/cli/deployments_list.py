"""`remoe list`: what runs on this machine or in a region of AWS, and what it costs an hour."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.status import described
from remoe_cli.cli.target import ProfileOption, RegionOption, TargetName, TargetOption, pick
from remoe_cli.errors import RemoeError

if TYPE_CHECKING:
    from remoe_cli.deploy.target import Target

EXAMPLES = examples("remoe list", "remoe list --target aws --region eu-west-1")


def command(
    target: TargetOption = TargetName.local,
    region: RegionOption = None,
    profile: ProfileOption = None,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """List the deployments of this machine, or of a region of AWS, with what each costs an hour.

    An hour at rest is what an always-on main function costs, whether it is used or not. With traffic, it is what the plan says, at list
    prices; it is unknown where the plan knows no traffic.
    Storage comes on top; 'remoe deploy --dry-run' prices it.
    """
    place = pick(target, region, profile)
    found = [_row(place, target.value, name) for name in place.names()]
    rows = [each for each in found if each]
    output.result({"deployments": rows}, lambda: _show(rows, target.value))


def _row(place: Target, target: str, name: str) -> dict[str, Any] | None:
    """Describe one deployment; None when it is gone by now."""
    status = described(place, target, name)
    if status is None:
        return None
    row = {"name": name, "target": target, "state": status["state"], "since": _since(place, name, status), "hint": status.get("hint", "")}
    costs = _costs(place, name, status)
    return row | (costs if target != TargetName.local.value else costs | {"usd_per_hour_at_rest": 0.0})  # nobody rents this machine


def _since(place: Target, name: str, status: dict[str, Any]) -> str | None:
    """Return when it was deployed; None where that cannot be read."""
    if "since" in status:
        return str(status["since"])
    try:
        begun = place.deployed_at(name)
    except (RemoeError, OSError):
        return None
    return None if begun is None else begun.isoformat(timespec="seconds")


def _costs(place: Target, name: str, status: dict[str, Any]) -> dict[str, Any]:
    """Say what an hour costs by the plan that was deployed; None where that cannot be read."""
    from remoe_cli.plan.document import read_plan
    from remoe_cli.plan.wording import bought

    unknown = {"main": None, "usd_per_hour_at_rest": None, "usd_per_hour_of_traffic": None}
    if status["state"] == "unreadable":
        return unknown
    try:
        plan = read_plan(place.deployed_plan(name))
    except RemoeError:
        return unknown
    if status["main"] is None:  # it runs on a machine of the user's, which AWS does not bill
        functions_usd, per_hour = sum(plan.costs.layers_usd), plan.workload.requests_per_hour
        return {
            "main": None,
            "usd_per_hour_at_rest": 0.0,
            "usd_per_hour_of_traffic": None if per_hour is None else functions_usd * per_hour,
        }
    always_on = plan.main.usd_per_hour is not None and not plan.main.scales_to_zero
    return {
        "main": bought(plan.main.name, plan.instances),
        "usd_per_hour_at_rest": plan.instances * (plan.main.usd_per_hour or 0.0) if always_on else 0.0,
        "usd_per_hour_of_traffic": None
        if plan.workload.requests_per_hour is None
        else plan.cost_usd_per_request * plan.workload.requests_per_hour,
    }


def _show(rows: list[dict[str, Any]], target: str) -> None:
    from remoe_cli.plan.wording import dollars

    if not rows:
        output.paragraph("No deployments here." if target == TargetName.local.value else "No deployments in this account and region.")
        return

    def money(usd: float | None) -> str:
        return "unknown" if usd is None else dollars(usd)

    cells = [
        (row["name"], row["state"], row["main"] or "", money(row["usd_per_hour_at_rest"]), money(row["usd_per_hour_of_traffic"]))
        for row in rows
    ]
    output.table("Deployments", ("name", "state", "main function", "an hour at rest", "an hour of its traffic"), cells)
    known = [row["usd_per_hour_at_rest"] for row in rows if row["usd_per_hour_at_rest"] is not None]
    of_known = "" if len(known) == len(rows) else f", without {len(rows) - len(known)} that cannot be read"
    output.paragraph(f"At rest, all of them cost {dollars(sum(known))} an hour{of_known}.")

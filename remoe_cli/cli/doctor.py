"""`remoe doctor`: what works here, what does not, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.pipeline_files import meant, refuse_other_file
from remoe_cli.cli.target import ProfileOption, RegionOption, TargetName, TargetOption, only_on_aws, pick
from remoe_cli.errors import NoDeploymentError, RemoeError, UsageError

if TYPE_CHECKING:
    from remoe_cli.deploy.target import Target
    from remoe_cli.doctor.finding import Finding

EXAMPLES = examples(
    "remoe doctor --target aws   # this machine and the AWS account",
    "remoe doctor allenai/OLMoE-1B-7B-0924",
    "remoe doctor plans/olmoe.json --target aws   # would this plan be deployed now?",
)


def command(
    context: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL|PLAN|NAME]", callback=refuse_other_file, help="A model, a plan file or a deployment; by default this machine."
        ),
    ] = None,
    target: TargetOption = TargetName.local,
    region: RegionOption = None,
    profile: ProfileOption = None,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Look whether this machine, an account, a model, a plan or a deployment is in order.

    Nothing is changed. It exits with 1 if something is not. A model on the hub is judged by its settings: no weights are downloaded.
    """
    only_on_aws(target, region=region, profile=profile)
    found = list(_look(context, what, target, region, profile))
    ok = all(each.ok for each in found)
    output.result({"ok": ok, "findings": [each.model_dump() for each in found]}, lambda: _show(found))
    if not ok:
        raise typer.Exit(1)


def _look(context: typer.Context, what: str | None, target: TargetName, region: str | None, profile: str | None) -> Iterator[Finding]:
    if what is None:
        from remoe_cli.doctor import account, machine

        with output.progress("Looking at this machine"):
            found = list(machine.findings())
        yield from found
        if target is TargetName.aws:
            yield from account.findings(region, profile)
        return
    if what.endswith(".json"):
        yield from _plan(Path(what), target, region, profile)
        return
    place = pick(target, region, profile)
    if target is TargetName.aws or what in place.names():
        from remoe_cli.doctor import deployment

        yield from deployment.findings(place.status(what))
        return
    if (refusal := meant(context)) is not None:
        raise refusal
    from remoe_cli.doctor import model

    try:
        with output.progress("Looking at the model"):
            found = list(model.findings(what))
    except UsageError as error:
        raise _nothing_named(place, what, error) from None
    yield from found


def _nothing_named(place: Target, what: str, error: UsageError) -> UsageError:
    """Add which deployments there are to what a model's name has wrong, where it may be one of a deployment."""
    try:
        place.status(what)
    except NoDeploymentError as unknown:
        return UsageError(
            f"{unknown.message} {error.message}",
            "Give the NAME of a deployment, a plan's .json file, a model's folder or a hub id OWNER/NAME.",
        )
    except RemoeError:
        pass
    return error


def _plan(path: Path, target: TargetName, region: str | None, profile: str | None) -> Iterator[Finding]:
    from remoe_cli.deploy.target import DeployOptions
    from remoe_cli.doctor import account, plan

    found = list(plan.findings(path, output.progress, here=target is TargetName.local))
    yield from found
    if target is TargetName.aws and found[0].ok:
        yield from plan.on_aws(lambda: pick(target, region, profile).preview(path, "doctor", DeployOptions())[0])
        yield from account.findings(region, profile)


def _show(found: list[Finding]) -> None:
    for each in found:
        output.paragraph(f"{each.name}: {each.value}", "ok  " if each.ok else "NO  ", " " * 8)
        if each.hint:
            output.paragraph(each.hint, " " * 8, " " * 8)

"""What the commands that know deployments have in common: where one stands, whose account that is, and asking before acting."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.errors import UsageError

if TYPE_CHECKING:
    from remoe_cli.deploy.aws.session import Account


class Target(StrEnum):
    local = "local"
    aws = "aws"


ON_AWS = "On AWS"  # the panel of options that go with --target aws only

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A deployment.")]
TargetOption = Annotated[
    Target, typer.Option(help="Where it runs: 'local' imitates AWS Lambda on this machine (the local twin), 'aws' is AWS.")
]
RegionOption = Annotated[
    str | None,
    typer.Option(metavar="REGION", help="AWS region; by default the AWS profile's.", rich_help_panel=ON_AWS),
]
ProfileOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="AWS profile, of ~/.aws; by default AWS_PROFILE.", rich_help_panel=ON_AWS)
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before acting.", rich_help_panel=ON_AWS)]


def only_on_aws(target: Target, **given: object) -> None:
    """Raises UsageError for an option that means nothing on the local target."""
    wrong = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None and value is not False]
    if target is Target.local and wrong:
        raise UsageError(f"{wrong[0]} goes with --target aws.", f"Add --target aws, or leave {wrong[0]} out.")


def account(region: str | None, profile: str | None) -> Account:
    """The AWS account that the credentials belong to; raises what `session.connect` raises."""
    from remoe_cli.deploy.aws.session import connect

    return connect(region, profile)


def can_ask(yes: bool) -> None:
    """Raises UsageError where a question could not be answered. For use before anything is begun."""
    if not yes and (output.is_json() or not sys.stdin.isatty()):
        raise UsageError("This asks before it acts, and nobody can answer here.", "Give --yes.")


def agreed(question: str, yes: bool) -> bool:
    return yes or output.ask(question)

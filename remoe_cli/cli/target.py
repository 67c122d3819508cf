"""What the commands for deployments share: their options, and picking the target that they name."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.cli.pipeline_files import refuse_other_file
from remoe_cli.errors import UsageError

if TYPE_CHECKING:
    from remoe_cli.deploy.target import Target


class TargetName(StrEnum):
    local = "local"
    aws = "aws"


ON_AWS = "On AWS"  # the panel of options that go with --target aws only

NameArgument = Annotated[str, typer.Argument(metavar="NAME", callback=refuse_other_file, help="A deployment.")]
TargetOption = Annotated[
    TargetName, typer.Option(help="Where it runs: 'local' imitates AWS Lambda on this machine (the local twin), 'aws' is AWS.")
]
RegionOption = Annotated[
    str | None,
    typer.Option(metavar="REGION", help="AWS region; by default the AWS profile's.", rich_help_panel=ON_AWS),
]
ProfileOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="AWS profile, of ~/.aws; by default AWS_PROFILE.", rich_help_panel=ON_AWS)
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before acting.", rich_help_panel=ON_AWS)]


def only_on_aws(target: TargetName, **given: object) -> None:
    """Refuse an option that means nothing on the local target.

    Raises: UsageError for the first one.
    """
    wrong = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None and value is not False]
    if target is TargetName.local and wrong:
        raise UsageError(f"{wrong[0]} goes with --target aws.", f"Add --target aws, or leave {wrong[0]} out.")


def pick(target: TargetName, region: str | None, profile: str | None, *, asks: str | None = None, yes: bool = False) -> Target:
    """Return the target that the options name.

    On AWS, the command that `asks` names needs a terminal where somebody can answer, or `yes`.

    Raises: UsageError for options that do not go together and where nobody can answer, and what `session.connect` raises.
    """
    only_on_aws(target, region=region, profile=profile)
    if target is TargetName.local:
        from remoe_cli.deploy.local.target import LocalTarget

        return LocalTarget(output.console(yes=True))
    if asks and not yes and (output.is_json() or not sys.stdin.isatty()):
        raise UsageError(f"'remoe {asks}' asks before it changes anything, but there is no terminal to answer.", "Give --yes.")
    from remoe_cli.deploy.aws import session
    from remoe_cli.deploy.aws.target import AwsTarget

    named = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return AwsTarget(lambda: session.connect(region, profile), output.console(yes=yes), named)

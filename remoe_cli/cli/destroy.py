"""`remoe destroy`: end a deployment, without remains."""

from __future__ import annotations

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.target import (
    NameArgument,
    ProfileOption,
    RegionOption,
    Target,
    TargetOption,
    YesOption,
    account,
    agreed,
    can_ask,
    only_on_aws,
)

EXAMPLES = examples("remoe destroy demo", "remoe destroy olmoe --target aws --yes")


def command(
    name: NameArgument,
    target: TargetOption = Target.local,
    region: RegionOption = None,
    profile: ProfileOption = None,
    yes: YesOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """End a deployment: its processes and files on this machine, or its stack and bucket on AWS."""
    only_on_aws(target, region=region, profile=profile)
    if target is Target.aws:
        _destroy_on_aws(name, region, profile, yes)
        return
    from remoe_cli.deploy.local.lifecycle import destroy

    destroy(name)
    output.result({"name": name, "state": "destroyed"}, lambda: output.line(f"{name} is gone: no process and no file is left."))


def _destroy_on_aws(name: str, region: str | None, profile: str | None, yes: bool) -> None:
    from remoe_cli.deploy.aws.deployment import destroy

    can_ask(yes)
    document = destroy(
        account(region, profile), name, say=output.say, progress=output.progress, agree=lambda question: agreed(question, yes)
    )

    def show() -> None:
        output.line(f"{name} is gone: no stack and no bucket is left.")
        for arn in document["left"]:
            output.line(f"  still has its tag (AWS may take minutes to forget what is deleted): {arn}")

    output.result(document, show)

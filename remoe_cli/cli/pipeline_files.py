"""Arguments that name the file of another stage, such as a plan where a deployment is asked for."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import typer

from remoe_cli.errors import UsageError

_REFUSAL = "remoe.refusal"
_NEXT = {  # by what an argument is and what the command takes: what to do instead
    ("plan", "NAME"): "Deploy it with 'remoe deploy {path}', then give its NAME: {stem}.",
    ("plan", "PROFILE"): "'remoe plan show {path}' shows it, 'remoe deploy {path}' deploys it; a plan is made of a profile's folder.",
    ("profile", "NAME"): "Plan it with 'remoe plan {path} -o plans/{stem}.json', and deploy that.",
    ("table", "NAME"): "Give the NAME of a deployment. 'remoe cost NAME --by day --csv > {path}' writes such a file.",
    ("profile", "PLAN"): "Make a plan of it: 'remoe plan {path} -o plans/{stem}.json'.",
}


def refuse_other_file(context: typer.Context, parameter: Any, value: Any) -> Any:
    """Refuse a plan or a profile where an argument takes something else; a callback of typer.

    Where it may also be the name of a deployment, `meant` tells the refusal once there is no such deployment.

    Raises: UsageError that names the command which takes it.
    """
    if context.resilient_parsing or value is None:
        return value
    path, takes = Path(value), str(parameter.metavar)
    found = _stage_of(path)
    if (hint := _NEXT.get((found, takes))) is not None:
        names = {"path": shlex.quote(str(path)), "stem": path.resolve().stem}
        refusal = UsageError(f"{path} is a {found}, and '{context.command_path}' takes a {takes}.", hint.format(**names))
        if takes != "NAME" or not _may_be_name(str(value)):
            raise refusal
        context.meta[_REFUSAL] = refusal
    return value


def meant(context: typer.Context) -> UsageError | None:
    """Return the refusal of a command's NAME that is no deployment's but the path of another stage's file."""
    found: UsageError | None = context.meta.get(_REFUSAL)
    return found


def _may_be_name(text: str) -> bool:
    from remoe_cli.deploy.local.config import NAME_FORM  # AWS takes fewer names

    return re.fullmatch(NAME_FORM, text) is not None


def _stage_of(path: Path) -> str:
    from remoe_cli import owned, recognise

    if path.suffix == ".csv":
        return "table"
    if path.suffix == ".json" and owned.is_made(path, recognise.document("remoe.plan")):
        return "plan"
    return "profile" if owned.is_made(path / "profile.json", recognise.document("remoe.profile")) else ""

"""Arguments that name the file of another stage, such as a plan where a deployment is asked for."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import typer

from remoe_cli.errors import UsageError

_NEXT = {  # by what an argument is and what the command takes: what to do instead
    ("plan", "NAME"): "Deploy it with 'remoe deploy {path}', then give its NAME: {stem}.",
    ("plan", "PROFILE"): "'remoe plan show {path}' shows it, 'remoe deploy {path}' deploys it; a plan is made of a profile's folder.",
    ("profile", "NAME"): "Plan it with 'remoe plan {path} -o plans/{stem}.json', and deploy that.",
    ("table", "NAME"): "Give the NAME of a deployment. 'remoe cost NAME --by day --csv > {path}' writes such a file.",
    ("profile", "PLAN"): "Make a plan of it: 'remoe plan {path} -o plans/{stem}.json'.",
}


def refuse_other_file(context: typer.Context, parameter: Any, value: Any) -> Any:
    """Refuse a plan or a profile where an argument takes something else; a callback of typer.

    Raises: UsageError that names the command which takes it.
    """
    if context.resilient_parsing or value is None:
        return value
    path, takes = Path(value), str(parameter.metavar)
    found = _stage_of(path)
    if (hint := _NEXT.get((found, takes))) is not None:
        names = {"path": shlex.quote(str(path)), "stem": path.resolve().stem}
        raise UsageError(f"{path} is a {found}, and '{context.command_path}' takes a {takes}.", hint.format(**names))
    return value


def _stage_of(path: Path) -> str:
    from remoe_cli import owned, recognise

    if path.suffix == ".csv":
        return "table"
    if path.suffix == ".json" and owned.is_made(path, recognise.document("remoe.plan")):
        return "plan"
    return "profile" if owned.is_made(path / "profile.json", recognise.document("remoe.profile")) else ""

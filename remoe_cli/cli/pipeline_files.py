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
    ("profile", "MODEL, PLAN or NAME"): "Make a plan of it, and give that: 'remoe plan {path} -o plans/{stem}.json'.",
    **dict.fromkeys(
        (("model", "NAME"), ("model", "PLAN"), ("model", "PROFILE")),
        "Profile it first: 'remoe profile {path} --data PROMPTS -o profiles/{stem}'.",
    ),
    ("deployment", "PLAN"): "Give the plan that it was made of; the deployment keeps a copy, {plan}.",
    ("deployment", "PROFILE"): "Give the profile of its plan: 'remoe plan show {plan}' names it.",
}
_DESTROY = {  # the same for the command that deletes
    "plan": "A plan is a file, and yours to delete. If it is deployed, give the NAME: 'remoe list' shows all.",
    "profile": "A profile is a folder, and yours to delete. 'remoe list' shows the names of deployments.",
    "model": "A model is yours to delete. 'remoe list' shows the names of deployments.",
}


def refuse_other_file(context: typer.Context, parameter: Any, value: Any) -> Any:
    """Refuse what is of another stage, such as a plan, where an argument takes something else.

    This is a callback of typer. Where it may also be the name of a deployment, `meant` tells the refusal once there is no such deployment.

    Raises: UsageError that names the command which takes it.
    """
    if context.resilient_parsing or value is None:
        return value
    path, takes = Path(value), _words(str(parameter.metavar))
    found, path = _stage_of(path)
    if (hint := _NEXT.get((found, takes))) is not None:
        hint = _DESTROY.get(found, hint) if context.command.name == "destroy" else hint
        plan = _deployment_of(path) / "plan.json" if found == "deployment" else path
        names = {"path": shlex.quote(str(path)), "stem": path.resolve().stem, "plan": shlex.quote(str(plan))}
        refusal = UsageError(f"{value} is a {found}, and '{context.command_path}' takes a {takes}.", hint.format(**names))
        if "NAME" not in takes or not _may_be_name(str(value)):
            raise refusal
        context.meta[_REFUSAL] = refusal
    return value


def _words(metavar: str) -> str:
    """Write what an argument takes as words.

    >>> _words("PLAN"), _words("[MODEL|PLAN|NAME]")
    ('PLAN', 'MODEL, PLAN or NAME')
    """
    *first, last = metavar.strip("[]").split("|")
    return f"{', '.join(first)} or {last}" if first else last


def meant(context: typer.Context) -> UsageError | None:
    """Return the refusal of a command's NAME that is no deployment's but the path of another stage's file."""
    found: UsageError | None = context.meta.get(_REFUSAL)
    return found


def _may_be_name(text: str) -> bool:
    from remoe_cli.deploy.local.config import NAME_FORM  # AWS takes fewer names

    return re.fullmatch(NAME_FORM, text) is not None


def _deployment_of(path: Path) -> Path:
    from remoe_cli.deploy.local.lifecycle import state_root

    return state_root() / path.name


def _stage_of(path: Path) -> tuple[str, Path]:
    """Say what stage a path is of, with the path that commands take of it."""
    from remoe_cli import owned, recognise

    if path.suffix == ".csv":
        return "table", path
    if path.suffix == ".json" and owned.is_made(path, recognise.document("remoe.plan")):
        return "plan", path
    if path.name == "profile.json" and path.is_file():
        path = path.parent
    if owned.is_made(path / "profile.json", recognise.document("remoe.profile")):
        return "profile", path
    if (path / "config.json").is_file():
        return "model", path
    is_name = not path.exists() and _may_be_name(str(path))
    return ("deployment" if is_name and _deployment_of(path).is_dir() else ""), path

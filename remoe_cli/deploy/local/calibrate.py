"""Calibrating a profile on a deployment of the local twin: `remoe profile --target NAME`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from remoe_cli.artifacts import read_json
from remoe_cli.deploy.local import lifecycle, processes, target
from remoe_cli.errors import DeployError
from remoe_cli.model.chat import Prompt
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.document import Plan
from remoe_cli.profile.record import Profile, read_profile
from remoe_cli.runtime.calibrate import measure_target, with_answers, with_target
from remoe_cli.runtime.client import answer
from remoe_cli.runtime.invoke import make_client

_TIMEOUT_S = 60.0


def calibrate(
    name: str, out: Path, prompts: Sequence[Prompt] = (), max_new_tokens: int = 32, say: Callable[[str], None] = lambda _: None
) -> Profile:
    """Write to `out` a copy of the deployment's profile whose latency carries the invocations and cold starts measured on it, and
    what answering the prompts took, if there are any.

    Raises DeployError for a deployment that is not running or has no functions, and what `measure_target` and `read_profile` raise.
    """
    status = lifecycle.status(name)
    if status["endpoint"] is None:
        raise DeployError(f"The deployment '{name}' cannot be measured: it is {status['state']}.", status["hint"])
    plan = read_json(lifecycle.state_dir(name) / "plan.json", Plan)
    profile = read_profile(Path(plan.profile.path))
    client = make_client(status["endpoint"], 1, _TIMEOUT_S)
    functions = [function["name"] for function in status["functions"]]
    say(f"Measuring warm invocations and cold starts of '{name}'")
    profile = with_target(profile, out, *measure_target(name, client, functions, lambda function: restart(name, function)))
    if prompts:
        say(f"Asking '{name}' {len(prompts)} prompts")
        endpoint = target.reach(name)
        answers = [answer(endpoint, prompt, max_new_tokens, lambda text: None, calls=True) for prompt in (prompts[0], *prompts)]
        profile = with_answers(profile, out, plan, read_catalog(plan.catalog.path), answers[1:])  # the first of all finds all cold
    return profile


def restart(name: str, function: str) -> None:
    """End the function's idle instances, so that its next call starts a new one."""
    entry = next(f for f in lifecycle.status(name)["functions"] if f["name"] == function)
    idle = [processes.reference(instance["pid"]) for instance in entry["instances"] if instance["state"] == "IDLE"]
    processes.end([process for process in idle if process])

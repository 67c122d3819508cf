"""Calibrate a profile on a deployment of the local twin: `remoe profile measure NAME`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from remoe_cli.artifacts import read_json
from remoe_cli.deploy.console import Console
from remoe_cli.deploy.local import lifecycle, processes
from remoe_cli.deploy.local.target import LocalTarget
from remoe_cli.errors import DeployError
from remoe_cli.lambda_limits import read_timeout_s
from remoe_cli.model.chat import Prompt
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.document import Plan
from remoe_cli.profile.record import Profile, read_profile_of, refuse_foreign
from remoe_cli.runtime.calibrate import measure_target, with_answers, with_target
from remoe_cli.runtime.client import answer
from remoe_cli.runtime.invoke import make_client


def calibrate(name: str, out: Path, prompts: Sequence[Prompt], max_new_tokens: int, console: Console) -> Profile:
    """Copy a deployment's profile to `out`, with invocations and cold starts measured on the deployment.

    With prompts it answers them too, and takes the overhead of an invocation from these answers.

    Raises: UsageError for a directory that `write_profile` refuses, DeployError for a deployment that does not run or has no functions,
    and what `measure_target` and `read_profile_of` raise.
    """
    refuse_foreign(out)
    status = lifecycle.status(name)
    if status["endpoint"] is None:
        raise DeployError(f"The deployment '{name}' cannot be measured: it is {status['state']}.", status["hint"])
    target = LocalTarget(console)
    deployed = target.deployed_plan(name)
    plan = read_json(deployed, Plan)
    with console.progress("Reading the profile"):
        profile = read_profile_of(deployed, Path(plan.profile.path))
    client = make_client(status["endpoint"], 1, read_timeout_s(max((layer.timeout_s for layer in plan.layers), default=0)))
    functions = [function["name"] for function in status["functions"]]
    with console.progress(f"Measuring warm invocations and cold starts of '{name}'"):
        times = measure_target(name, client, functions, lambda function: restart(name, function))
        profile = with_target(profile, out, *times)
    if prompts:
        address, answers = target.main_address(name), []
        asked = (prompts[0], *prompts)  # the first one finds all functions cold, so it is asked twice and counted once
        with console.progress(f"Asking '{name}' {len(prompts)} prompts") as report:
            for number, prompt in enumerate(asked, start=1):
                answers.append(answer(address, prompt, max_new_tokens, lambda text: None, calls=True))
                report(number, len(asked))
        profile = with_answers(profile, out, plan, read_catalog(plan.catalog.path), answers[1:])
    return profile


def restart(name: str, function: str) -> None:
    """End the function's idle instances, so that its next call starts a new one."""
    entry = next(f for f in lifecycle.status(name)["functions"] if f["name"] == function)
    idle = [processes.reference(instance["pid"]) for instance in entry["instances"] if instance["state"] == "IDLE"]
    processes.end([process for process in idle if process])

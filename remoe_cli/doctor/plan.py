"""A plan: whether it would be deployed now, on this machine or on AWS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from remoe_cli.deploy.inputs import Inputs, check_model, read_inputs
from remoe_cli.doctor.finding import Finding, price_age, tried
from remoe_cli.errors import RemoeError
from remoe_cli.plan.wording import VERDICT_WORDS
from remoe_cli.progress import Progress


def findings(path: Path, progress: Progress, *, here: bool) -> Iterator[Finding]:
    """Look at a plan, at what it was made from, and at the model.

    `here` tells whether it is to be deployed on this machine.

    Raises: UsageError for a path that is not a plan's.
    """
    try:
        with progress("Checking the plan"):
            inputs = read_inputs(path)
    except RemoeError as error:
        if error.exit_code == 2:
            raise
        yield Finding(name="plan", ok=False, value=error.message, hint=error.hint)
        return
    plan, profile, _ = inputs
    made_of = f"profile {plan.profile.path}, catalog {plan.catalog.path}, both unchanged"
    yield Finding(name="plan", ok=True, value=f"its figures are confirmed; {made_of}")
    yield Finding(name="verdict", ok=True, value=f"{VERDICT_WORDS[plan.verdict]}: {plan.reason}")
    yield price_age("prices", date.fromisoformat(plan.prices_of))

    def unchanged() -> Finding:
        check_model(plan, profile, progress)
        return Finding(name="model", ok=True, value=f"{profile.record.model.path}, as it was profiled")

    yield tried("model", unchanged)
    if here:
        yield tried("main function", lambda: _main(inputs))
    yield _functions(inputs)


def _main(inputs: Inputs) -> Finding:
    from remoe_cli.plan.cost import main_function
    from remoe_cli.plan.problem.request import problem_of
    from remoe_cli.runtime.device import choose

    plan, profile, catalog = inputs
    on_gpu = main_function.on_gpu(problem_of(plan, profile, catalog), plan.main)
    choose(on_gpu)
    return Finding(name="main function", ok=True, value=f"{plan.main.name}; here it is served on {'the GPU' if on_gpu else 'the CPU'}")


def _functions(inputs: Inputs) -> Finding:
    plan, _, _ = inputs
    layers = [layer for layer in plan.layers if layer.remote]
    experts, most = sum(len(layer.remote) for layer in layers), max((layer.memory_mb for layer in layers), default=0)
    count = sum(len(layer.parts) for layer in layers)
    return Finding(name="expert functions", ok=True, value=f"{count} with {experts} experts, up to {most:,} MB each" if count else "none")


def on_aws(dry_run: Callable[[], dict[str, Any]]) -> Iterator[Finding]:
    """Look at the notes and the quotas of a deployment's dry run.

    That AWS can run nothing of the plan is a finding too.
    """
    try:
        document = dry_run()
    except RemoeError as error:
        yield Finding(name="on AWS", ok=False, value=error.message, hint=error.hint)
        return
    for note in document["cost"]["notes"]:
        yield Finding(name="on AWS", ok=True, value=note)
    for quota in document["quotas"]:
        of = "" if quota["limit"] is None else f" of {quota['limit']:,.0f}"
        yield Finding(name=quota["name"], ok=quota["ok"], value=f"{quota['used']:,.0f}{of} {quota['unit']}", hint=quota["hint"])

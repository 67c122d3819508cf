"""A plan and the files that it names, read and verified before anything is deployed."""

from __future__ import annotations

from pathlib import Path

from remoe_cli.errors import ArtifactError
from remoe_cli.model.checkpoint import find_profiled
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import Plan, read_plan
from remoe_cli.plan.problem.request import catalog_of, inputs_of
from remoe_cli.plan.verify.check import verify
from remoe_cli.profile.record import Profile
from remoe_cli.progress import Progress

Inputs = tuple[Plan, Profile, Catalog]


def read_inputs(plan_path: Path) -> Inputs:
    """Read a plan with the profile and the catalog that it names, and verify it.

    Raises: UsageError for a path that is not a plan's; ArtifactError for a plan that is damaged or that the verifier does not confirm, and
    for a profile or catalog that is missing or has changed.
    """
    plan, profile, catalog = inputs_of(plan_path)
    findings = verify(plan, profile, catalog)
    if findings:
        raise ArtifactError(f"{plan_path} does not pass verification: {findings[0]}.", "Make the plan again with 'remoe plan'.")
    return plan, profile, catalog


def read_without_profile(plan_path: Path) -> tuple[Plan, Catalog, str]:
    """Read a plan and its catalog for a dry run, and verify it where its profile is on this machine.

    Returns also a sentence for people, which is empty where the plan was verified.

    Raises: what `read_inputs` raises, but not for a profile that is on another machine.
    """
    plan = read_plan(plan_path)
    if (Path(plan.profile.path) / "profile.json").exists():
        plan, _, catalog = read_inputs(plan_path)
        return plan, catalog, ""
    catalog = catalog_of(plan, plan_path)
    return plan, catalog, f"The plan was not verified, as its profile {plan.profile.path} is not on this machine; 'remoe deploy' needs it."


def check_model(plan: Plan, profile: Profile, progress: Progress) -> None:
    """Check that the model and the plan's assistant have not changed since they were profiled.

    Raises: what `find_profiled` raises.
    """
    model, assistant = profile.record.model, plan.assistant
    with progress("Checking the model's files", of_bytes=True) as report:
        find_profiled(model.path, model.revision, report)
    if assistant is not None:
        with progress("Checking the assistant's files", of_bytes=True) as report:
            find_profiled(assistant.name, assistant.revision, report)

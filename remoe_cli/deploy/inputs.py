"""A plan and the files that it names, read and verified before anything is deployed."""

from __future__ import annotations

from pathlib import Path

from remoe_cli.errors import ArtifactError
from remoe_cli.model.checkpoint import find_profiled
from remoe_cli.plan.catalog.catalog import Catalog, read_catalog
from remoe_cli.plan.document import Plan, read_plan
from remoe_cli.plan.verify.check import verify
from remoe_cli.profile.record import Profile, read_profile_of
from remoe_cli.progress import Progress

Inputs = tuple[Plan, Profile, Catalog]


def read_inputs(plan_path: Path) -> Inputs:
    """Read a plan with the profile and the catalog that it names, and verify it.

    Raises: UsageError for a path that is not a plan's; ArtifactError for a plan that is damaged or that the verifier does not confirm, and
    for a profile or catalog that is missing or has changed.
    """
    plan = read_plan(plan_path)
    profile = read_profile_of(plan_path, Path(plan.profile.path))
    catalog = read_catalog(plan.catalog.path)
    _refuse_stale(plan, plan_path, profile.sha256, catalog)
    findings = verify(plan, profile, catalog)
    if findings:
        raise ArtifactError(f"{plan_path} does not pass verification: {findings[0]}.", "Make the plan again with 'remoe plan'.")
    return plan, profile, catalog


def read_to_preview(plan_path: Path) -> tuple[Plan, Catalog]:
    """Read a plan and its catalog for a dry run.

    The profile may be on another machine: it is compared where it is here.

    Raises: UsageError for a path that is not a plan's; ArtifactError for a plan that is damaged, and for a profile or catalog that has
    changed.
    """
    plan = read_plan(plan_path)
    here, catalog = Path(plan.profile.path), read_catalog(plan.catalog.path)
    _refuse_stale(plan, plan_path, read_profile_of(plan_path, here).sha256 if here.exists() else plan.profile.sha256, catalog)
    return plan, catalog


def _refuse_stale(plan: Plan, plan_path: Path, profile_sha256: str, catalog: Catalog) -> None:
    for what, expected, found in (("profile", plan.profile.sha256, profile_sha256), ("catalog", plan.catalog.sha256, catalog.file.sha256)):
        if expected != found:
            raise ArtifactError(f"The {what} has changed since {plan_path} was made.", "Make the plan again with 'remoe plan'.")


def check_model(profile: Profile, progress: Progress) -> None:
    """Check that the model has not changed since it was profiled, before anything is packaged.

    Raises: what `find_profiled` raises.
    """
    model = profile.record.model
    with progress("Checking the model's files", of_bytes=True) as report:
        find_profiled(model.path, model.revision, report)

"""What is read before a deployment or a dry run: a plan that is out of date is refused by both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from remoe_cli.artifacts import write_json
from remoe_cli.deploy.inputs import read_inputs, read_without_profile
from remoe_cli.errors import ArtifactError
from remoe_cli.plan.catalog.catalog import read_catalog
from tests.support.synthetic import plan_of, synthetic_profile


@pytest.fixture
def plan_path(tmp_path: Path) -> Path:
    profile = synthetic_profile(tmp_path / "profile", layers=2, experts=4)
    write_json(tmp_path / "plan.json", plan_of(profile, read_catalog("aws-us-east-1"), requests_per_hour=20.0))
    return tmp_path / "plan.json"


def test_a_plan_that_is_up_to_date_is_read(plan_path: Path) -> None:
    plan, _, catalog = read_inputs(plan_path)
    assert read_without_profile(plan_path) == (plan, catalog, "")


def test_a_dry_run_without_the_profile_says_that_nothing_was_verified(plan_path: Path) -> None:
    shutil.rmtree(plan_path.parent / "profile")
    assert "was not verified" in read_without_profile(plan_path)[2]
    with pytest.raises(ArtifactError, match="is not on this machine"):
        read_inputs(plan_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"catalog": {"path": "aws-us-east-1", "sha256": "0" * 64}},
            r"The catalog aws-us-east-1 has changed since the plan \S+plan.json was made",
        ),
        ({"tpot_s": 1.0}, "does not pass verification"),
        (None, r"The profile \S+ has changed since the plan \S+plan.json was made"),
    ],
)
def test_what_deploy_refuses_a_dry_run_refuses(plan_path: Path, changes: dict[str, object] | None, message: str) -> None:
    if changes is None:
        synthetic_profile(plan_path.parent / "profile", layers=2, experts=4, seed=1)
    else:
        plan_path.write_text(json.dumps(json.loads(plan_path.read_text()) | changes))
    for read in (read_inputs, read_without_profile):
        with pytest.raises(ArtifactError, match=message):
            read(plan_path)

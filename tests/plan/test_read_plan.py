"""Reading the plan of a path that the user named: what is no plan, and what is a damaged one."""

from __future__ import annotations

from pathlib import Path

import pytest

from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.plan.document import read_plan

TEXTS = {
    "README.md": ("# A page", "README.md is not a plan (it is not JSON)."),
    "empty.json": ("", "empty.json is not a plan (it is not JSON)."),
    "package.json": ('{"name": "x"}', "package.json is not a plan."),
    "profile.json": ('{"schema_version": "remoe.profile/3"}', "profile.json is not a plan."),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_that_is_no_plan(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, message = TEXTS[name]
    (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as raised:
        read_plan(Path(name))
    assert (raised.value.message, raised.value.hint) == (message, "Give the .json file that 'remoe plan' wrote.")


def test_a_folder_and_nothing_are_no_plans(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder, not a plan") as raised:
        read_plan(tmp_path)
    assert raised.value.hint == "Give the .json file that 'remoe plan' wrote."
    with pytest.raises(UsageError, match="There is no file"):
        read_plan(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema_version": "remoe.plan/5", "profile": ', "cannot be read as JSON"),
        ('{"schema_version": "remoe.plan/5"}', "is damaged at 'profile'"),
        ('{"schema_version": "remoe.plan/1"}', r"has the schema 'remoe\.plan/1'"),
    ],
)
def test_a_damaged_or_old_plan_is_a_plan(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        read_plan(tmp_path / "plan.json")

"""Profiling into a directory with files that remoe did not make, and of a model that changes meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from remoe_cli.errors import ModelError, UsageError
from tests.profile.test_run import NEW, Interrupt, Made, model, run, same_bytes, whole
from tests.support.trees import tree

__all__ = ["model", "whole"]  # fixtures


def test_foreign_files_are_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds files that remoe did not make, such as partial/thesis\.tex"):
        run(model, tmp_path)
    assert (tmp_path / "partial" / "thesis.tex").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["partial"]


def test_other_files_in_the_directory_of_a_profile_stay(whole: Made, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "p"
    run(model, out)
    kept = ("notes.txt", ".arrays.safetensors.bak", ".profile.json.orig", "partial/batch-notes.safetensors", "partial/thesis.tex")
    (out / "partial").mkdir()
    for name in kept:
        (out / name).write_text("years of work")
    run(model, out, max_new_tokens=NEW - 1)
    run(model, out)
    assert all((out / name).read_text() == "years of work" for name in kept)
    assert same_bytes(out, whole[0].path)
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == {"arrays.safetensors", "profile.json", *kept}


@pytest.mark.parametrize("name", ["profile.json", "arrays.safetensors", "predictor.json", "predictor.safetensors", "partial/inputs.json"])
def test_what_has_the_name_of_a_profiles_file_is_refused_before_any_work(model: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "p"
    run(model, out)
    for put in (lambda path: path.write_text("mine"), lambda path: path.symlink_to(tmp_path / "elsewhere")):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).unlink(missing_ok=True)
        put(out / name)
        before = tree(out)
        with pytest.raises(UsageError):
            run(model, out, lambda done, total: pytest.fail("it is profiled first"))
        assert tree(out) == before


def test_a_partial_run_behind_a_link_is_left_alone(model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "p", Interrupt(3))
    (tmp_path / "p" / "partial").rename(tmp_path / "elsewhere")
    (tmp_path / "p" / "partial").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="partial is a link"):
        run(model, tmp_path / "p")
    assert tree(tmp_path) == before


def test_a_model_that_changes_while_it_is_profiled_is_refused(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "model")

    def change(done: int, total: int) -> None:
        (other / "generation_config.json").write_text('{"pad_token_id": 3}')

    with pytest.raises(ModelError, match="has changed while it was profiled"):
        run(other, tmp_path / "p", change)
    assert not (tmp_path / "p" / "profile.json").exists()


def test_an_output_that_is_a_file_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="out is a file"):
        run(model, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"

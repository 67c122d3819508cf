"""Shards joined into exactly the profile of the whole, and what cannot be joined."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.profile.merge import merge
from remoe_cli.profile.prompts import PromptSet
from remoe_cli.profile.record import Profile, read_profile, write_profile
from tests.profile.test_run import MANY, run, same_bytes, save_checkpoint

# 30 batches in windows of 16 cut into shards of 10: the second begins in the middle of one window and ends in the next.
SHARDS = 3
OPTIONS: dict[str, Any] = {"prompts": MANY, "batch_size": 2}
TRACED = 3  # of a prompt's 5 decode tokens


@pytest.fixture(scope="module", autouse=True)
def few_traced() -> Iterator[None]:
    """So little is traced that a shard which shared it among its own prompts only would keep more of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("remoe_cli.profile.run.TRACE_TOKENS", TRACED * len(MANY.texts))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return run(model, tmp_path_factory.mktemp("whole") / "profile", **OPTIONS)


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    return [run(model, folder / str(i), **OPTIONS, shard=(i, SHARDS)).path for i in range(1, SHARDS + 1)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_merged_shards_are_the_profile_of_the_whole(shards: list[Path], whole: Profile, order: tuple[int, ...], tmp_path: Path) -> None:
    merge([shards[i] for i in order], tmp_path / "merged")
    assert same_bytes(tmp_path / "merged", whole.path)
    assert len(whole.arrays["trace_ids"]) == TRACED * len(MANY.texts)


def test_a_shard_holds_its_slice_and_says_so(shards: list[Path]) -> None:
    read = [read_profile(path) for path in shards]
    assert [len(shard.arrays["prompt_tokens"]) for shard in read] == [20, 20, 20]
    assert [(s.record.dataset.shard.number, s.record.dataset.shard.of) for s in read if s.record.dataset.shard] == [(1, 3), (2, 3), (3, 3)]
    assert sorted(p for shard in read for p in shard.arrays["prompt_index"].tolist()) == list(range(60))


def test_one_shard_of_one_is_the_whole(model: Path, whole: Profile, tmp_path: Path) -> None:
    run(model, tmp_path / "only", **OPTIONS, shard=(1, 1))
    merge([tmp_path / "only"], tmp_path / "merged")
    assert same_bytes(tmp_path / "merged", whole.path)


def test_the_first_shards_latencies_are_kept_and_the_worst_loss(shards: list[Path], tmp_path: Path) -> None:
    for number in (2, 3):
        shutil.copytree(shards[number - 1], tmp_path / str(number))
        record = json.loads((tmp_path / str(number) / "profile.json").read_text())
        record["latency"]["load_s"] = 99.0
        figures = {"text_tokens": 9, "answer_tokens": 9, "unquantised_perplexity": 9.0, "perplexity": 9.0, "rise_error": 0.0}
        record["loss"] = {"prompts": 1, **figures, "divergence_bits": number / 10, "agreement": 1.0}
        (tmp_path / str(number) / "profile.json").write_text(json.dumps(record))
    shutil.copytree(shards[0], tmp_path / "1")
    record = json.loads((tmp_path / "1" / "profile.json").read_text()) | {"loss": record["loss"] | {"divergence_bits": 0.1}}
    (tmp_path / "1" / "profile.json").write_text(json.dumps(record))
    made = merge([tmp_path / "2", tmp_path / "3", tmp_path / "1"], tmp_path / "merged")
    assert made.record.loss is not None and made.record.loss.divergence_bits == 0.3
    assert made.record.latency == read_profile(shards[0]).record.latency


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda s, w: [s[0], s[2]], "Shard 2 of 3 is missing"),
        (lambda s, w: [s[0], s[1]], "Shard 3 of 3 is missing"),
        (lambda s, w: [s[0], s[1], s[1], s[2]], "are both shard 2"),
        (lambda s, w: [s[0], s[1], w], r"is not a slice: it was made without --shard I/N\."),
    ],
)
def test_what_is_not_all_shards_once_is_refused(
    shards: list[Path], whole: Profile, choose: Callable[[list[Path], Path], list[Path]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        merge(choose(shards, whole.path), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"prompts": PromptSet("memory", "prompt", (*MANY.texts[:-1], "w1 w2"))}, "dataset"),
        ({"max_new_tokens": 3}, "settings"),
        ({"shard": (2, 4)}, "number of shards"),
    ],
)
def test_shards_of_another_run_are_refused(
    model: Path, shards: list[Path], changes: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    run(model, tmp_path / "other", **(OPTIONS | {"shard": (2, SHARDS)} | changes))
    with pytest.raises(UsageError, match=rf"different runs\. They differ in: {difference}"):
        merge([shards[0], tmp_path / "other", shards[2]], tmp_path / "merged")


def test_a_shard_of_another_model_is_refused(model: Path, shards: list[Path], tmp_path: Path) -> None:
    """Of the same sizes, so that only its files tell."""
    other = tmp_path / "model"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text()) | {"rms_norm_eps": 1e-5}
    (other / "config.json").write_text(json.dumps(config))
    run(other, tmp_path / "other", **OPTIONS, shard=(2, SHARDS))
    with pytest.raises(UsageError, match=r"different runs\. They differ in: model"):
        merge([shards[0], tmp_path / "other", shards[2]], tmp_path / "merged")


def test_the_model_may_lie_in_another_folder_on_each_machine(model: Path, shards: list[Path], whole: Profile, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    run(tmp_path / "model", tmp_path / "other", **OPTIONS, shard=(2, SHARDS))
    merge([shards[0], tmp_path / "other", shards[2]], tmp_path / "merged")
    assert same_bytes(tmp_path / "merged", whole.path)


def test_shards_that_cut_the_prompts_in_another_way_are_refused(shards: list[Path], tmp_path: Path) -> None:
    """As two versions of remoe could: a shard's number says nothing then about the prompts that it holds."""
    second = read_profile(shards[1])
    moved = {name: array.copy() for name, array in second.arrays.items()}
    moved["prompt_index"] += 1
    write_profile(tmp_path / "moved", second.record, moved)
    with pytest.raises(ArtifactError, match="do not hold each prompt once"):
        merge([shards[0], tmp_path / "moved", shards[2]], tmp_path / "merged")


def test_foreign_files_are_not_written_over(shards: list[Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds files that remoe did not make, such as thesis\.tex"):
        merge(shards, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_shard_is_not_written_over(shards: list[Path]) -> None:
    before = (shards[0] / "profile.json").read_bytes()
    with pytest.raises(UsageError, match="is one of the shards"):
        merge(shards, shards[0])
    assert (shards[0] / "profile.json").read_bytes() == before


@pytest.mark.parametrize(
    ("shard", "message"), [((0, 2), "no shard 0 of 2"), ((3, 2), "no shard 3 of 2"), ((1, 31), "cannot be cut into 31 shards")]
)
def test_shards_that_there_cannot_be(model: Path, shard: tuple[int, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        run(model, tmp_path / "out", **OPTIONS, shard=shard)
    assert not (tmp_path / "out").exists()

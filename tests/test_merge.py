"""Shards joined into exactly the profile of the whole, and what cannot be joined."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from remoe_cli.errors import UsageError
from remoe_cli.profile.merge import merge
from remoe_cli.profile.prompts import PromptSet
from remoe_cli.profile.record import Profile, read_profile
from tests.test_profile_run import TEXTS, run, same_bytes, save_checkpoint

SHARDS = 3  # of batches of 2: three prompts' batches differ in length


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return run(model, tmp_path_factory.mktemp("whole") / "profile", batch_size=2)


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    return [run(model, folder / str(i), batch_size=2, shard=(i, SHARDS)).path for i in range(1, SHARDS + 1)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_merged_shards_are_the_profile_of_the_whole(shards: list[Path], whole: Profile, order: tuple[int, ...], tmp_path: Path) -> None:
    merge([shards[i] for i in order], tmp_path / "merged")
    assert same_bytes(tmp_path / "merged", whole.path)


def test_a_shard_holds_its_slice_and_says_so(shards: list[Path]) -> None:
    read = [read_profile(path) for path in shards]
    assert sum(len(shard.arrays["prompt_tokens"]) for shard in read) == len(TEXTS)
    assert [(s.record.dataset.shard.number, s.record.dataset.shard.of) for s in read if s.record.dataset.shard] == [(1, 3), (2, 3), (3, 3)]
    assert np.concatenate([np.sort(s.arrays["prompt_index"]) for s in read]).size == len(TEXTS)


def test_one_shard_of_one_is_the_whole(model: Path, whole: Profile, tmp_path: Path) -> None:
    run(model, tmp_path / "only", batch_size=2, shard=(1, 1))
    merge([tmp_path / "only"], tmp_path / "merged")
    assert same_bytes(tmp_path / "merged", whole.path)


def test_the_first_shards_latencies_are_kept(shards: list[Path], tmp_path: Path) -> None:
    record = json.loads((shards[1] / "profile.json").read_text())
    record["latency"]["load_s"] = 99.0
    other = tmp_path / "other"
    other.mkdir()
    (other / "profile.json").write_text(json.dumps(record))
    (other / "arrays.safetensors").write_bytes((shards[1] / "arrays.safetensors").read_bytes())
    made = merge([other, shards[2], shards[0]], tmp_path / "merged")
    assert made.record.latency == read_profile(shards[0]).record.latency


@pytest.mark.parametrize(
    ("choose", "said"),
    [
        (lambda s, w: [s[0], s[2]], "Shard 2 of 3 is missing"),
        (lambda s, w: [s[0], s[1]], "Shard 3 of 3 is missing"),
        (lambda s, w: [s[0], s[1], s[1], s[2]], "are both shard 2"),
        (lambda s, w: [s[0], s[1], w], "is not a shard"),
    ],
)
def test_what_is_not_all_shards_once_is_refused(
    shards: list[Path], whole: Profile, choose: Callable[[list[Path], Path], list[Path]], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        merge(choose(shards, whole.path), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": PromptSet("memory", "prompt", (*TEXTS[:6], "w1 w2"))}, "dataset"),
        ({"max_new_tokens": 3}, "settings"),
        ({"shard": (2, 4)}, "number of shards"),
    ],
)
def test_shards_of_another_run_are_refused(model: Path, shards: list[Path], changes: dict[str, object], said: str, tmp_path: Path) -> None:
    run(model, tmp_path / "other", **({"batch_size": 2, "shard": (2, SHARDS)} | changes))
    with pytest.raises(UsageError, match=f"different runs: they differ in their {said}"):
        merge([shards[0], tmp_path / "other", shards[2]], tmp_path / "merged")


def test_a_shard_is_not_written_over(shards: list[Path]) -> None:
    before = (shards[0] / "profile.json").read_bytes()
    with pytest.raises(UsageError, match="is one of the shards"):
        merge(shards, shards[0])
    assert (shards[0] / "profile.json").read_bytes() == before


@pytest.mark.parametrize(
    ("shard", "said"), [((0, 2), "no shard 0 of 2"), ((3, 2), "no shard 3 of 2"), ((1, 9), "cannot be cut into 9 shards")]
)
def test_shards_that_there_cannot_be(model: Path, shard: tuple[int, int], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        run(model, tmp_path / "out", batch_size=2, shard=shard)
    assert not (tmp_path / "out").exists()

"""Computing a function's experts in the main function: the same bits, from disk and from S3, in little memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remoe_cli.function import s3
from remoe_cli.function.codec import Batch
from remoe_cli.function.errors import FunctionProcessorError
from remoe_cli.function.expert_ffn import Expert, FfnSpec, narrow
from remoe_cli.function.ready import ReadyExperts
from remoe_cli.function.weights import ShardFile
from remoe_cli.model.checkpoint import find
from remoe_cli.model.shards import write_shards
from remoe_cli.runtime.last_resort import LastResort, LastResortError, ShardPlace
from tests.support.families import save
from tests.support.quantised import save_quantised
from tests.support.s3_front import Front
from tests.support.shards import shard_environment

EXPERTS = (1, 2, 5)


def shard_of(folder: Path, quantised: str = "") -> tuple[Path, ShardPlace, Batch]:
    """A shard, its place, and rows for its experts."""
    if quantised:
        save_quantised("gpt_oss" if quantised == "mxfp4" else "qwen3_moe", quantised, folder / "model")
    else:
        save("mixtral", torch.bfloat16, folder / "model", fused=False)
    (shard,) = write_shards(find(str(folder / "model")), {0: [EXPERTS]}, 1, folder / "bundle")
    head_bytes, _, digest = shard_environment(shard.path)["REMOE_SHARD_HEADER"].partition(":")
    head = ShardFile(shard.path).head
    width, dtype = head.parameters(1)["down_proj"][-1 if head.ffn["transposed"] else -2], head.ffn["dtype"]
    rows = np.random.default_rng(0).standard_normal((6, width), dtype=np.float32)
    place = ShardPlace(shard.path.name, int(head_bytes), digest, "packed" if quantised == "mxfp4" else "ready")
    return shard.path, place, Batch(dtype, EXPERTS, (1, 2, 3), narrow(rows, dtype))


def as_the_function(path: Path, batch: Batch, form: str = "ready") -> Any:
    ready = ReadyExperts(ShardFile(path), float("inf"), form)
    parts = np.split(batch.data, np.cumsum(batch.rows)[:-1])
    return np.concatenate([ready.get(e).run(x) for e, x in zip(batch.experts, parts, strict=True)])


@pytest.mark.parametrize("quantised", ["", "fp8"])
def test_rows_are_those_of_the_function_whatever_is_kept(quantised: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, place, batch = shard_of(tmp_path, quantised)
    expected = as_the_function(path, batch)
    one_bytes = ShardFile(path).head.expert_bytes(1)
    made: list[FfnSpec] = []
    original = Expert.of
    monkeypatch.setattr(Expert, "of", lambda tensors, spec: made.append(spec) or original(tensors, spec))
    for room_bytes, again in ((0, 3), (2 * one_bytes + one_bytes // 2, 3), (2**30, 0)):
        here = LastResort(str(path.parent), room_bytes=room_bytes)
        assert here.compute(place, batch).data.tobytes() == expected.tobytes()
        assert sum(ready.weights_bytes for ready in here._ready.values()) <= room_bytes
        made.clear()
        assert here.compute(place, batch).data.tobytes() == expected.tobytes()
        assert len(made) == again  # three in turn do not fit where two do


def test_packed_experts_are_computed_as_the_function_does_and_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, place, batch = shard_of(tmp_path, "mxfp4")
    expected = as_the_function(path, batch, "packed")
    monkeypatch.setattr("remoe_cli.function.weights.dequantise", lambda *_: pytest.fail("a matrix was dequantised"))
    here = LastResort(str(path.parent), room_bytes=0)
    assert here.compute(place, batch).data.tobytes() == expected.tobytes()
    assert len(here._ready) == len(EXPERTS) and all(expert.weights_bytes == 0 for expert in here._ready.values())


def test_where_packed_experts_cannot_be_computed_they_are_dequantised_and_the_log_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise FunctionProcessorError("packed experts need a processor with AVX2 and FMA, and this one lacks them")

    monkeypatch.setattr("remoe_cli.runtime.last_resort.library", missing)
    path, place, batch = shard_of(tmp_path, "mxfp4")
    here = LastResort(str(path.parent), room_bytes=0)
    for _ in range(2):
        assert here.compute(place, batch).data.tobytes() == as_the_function(path, batch).tobytes()
    (record,) = caplog.records
    assert record.getMessage() == (
        "Experts of functions that do not answer are dequantised here, which is slower: packed experts need a processor with AVX2 and FMA, "
        "and this one lacks them."
    )


def test_shards_in_s3_are_read_and_counted_and_credentials_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_FIRST_PAUSE_S", 0.001)
    path, place, batch = shard_of(tmp_path)
    asked: list[None] = []
    with Front(path.read_bytes()).running() as front:

        def environment() -> dict[str, str]:
            asked.append(None)
            return front.environment

        here = LastResort("s3://bucket", environment)
        front.script = [(403, "ExpiredToken")]
        with pytest.raises(LastResortError, match=r"ShardDeniedError: s3://bucket/layer-000.safetensors: S3 answers 403 ExpiredToken"):
            here.compute(place, batch)
        assert here.compute(place, batch).data.tobytes() == as_the_function(path, batch).tobytes()
        assert len(asked) == 2
        reads = here.reads
        assert reads >= 2
        here.compute(place, batch)
        assert here.reads == reads  # they are on disk now
        for shard in here._opened.values():
            shard.close()


@pytest.mark.parametrize("damaged", ["head", "expert", "missing", "place", "expert that it has not"])
def test_what_cannot_be_computed_is_said(damaged: str, tmp_path: Path) -> None:
    path, place, batch = shard_of(tmp_path)
    content, wanted = bytearray(path.read_bytes()), "ShardDigestError: .* is not the one that was deployed"
    match damaged:
        case "head":
            content[place.head_bytes - 1] ^= 1
        case "expert":
            content[-1] ^= 1
        case "missing":
            place, wanted = replace(place, where="other.safetensors"), "FileNotFoundError: .*other.safetensors"
        case "place":
            with pytest.raises(LastResortError, match="nobody knows where its shard is"):
                LastResort(str(path.parent)).compute(None, batch)
            return
        case _:
            batch, wanted = replace(batch, experts=(1, 2, 6)), "WeightsError: expert 6 is not in this function"
    path.write_bytes(content)
    with pytest.raises(LastResortError, match=wanted):
        LastResort(str(path.parent)).compute(place, batch)

"""Layers, passes and tokens without routing: what was not recorded is left out and said, what is damaged is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.profile.imports.importer import ImportedRouting, import_profile, import_routing
from tests.support import routing_files as made
from tests.support.families import FAMILIES
from tests.support.routing_files import LENGTHS, PROMPT, SPEC, Array
from tests.support.synthetic import plan_of, tiny_catalog

IDS = made.make_ids()
COUNTS = made.count(IDS)
REMARK = "layer 1 holds no routing in the whole file, so the profile has 1 of the model's 2 MoE layers. It predicts for these"


def without(array: Array, value: int = 0) -> Array:
    """The array with a first layer that was not recorded."""
    out = array.copy()
    out[:, 0] = value
    return out


def unmapped(dump: dict[str, Any], name: str, value: int) -> dict[str, Any]:
    """A dump of the recorder whose first MoE layer was not recorded."""
    for record in dump["records"]:
        record[name] = record[name].clone()
        record[name][1] = value
    return dump


def npz(folder: Path, **arrays: Array) -> Path:
    np.savez(folder / "x.npz", **arrays)
    return folder / "x.npz"


def table(folder: Path) -> Path:
    (folder / "x.csv").write_text(made.table(without(COUNTS)), encoding="utf-8")
    return folder / "x.csv"


UNRECORDED: dict[str, Callable[[Path], Path]] = {
    "counts": lambda folder: npz(folder, counts=without(COUNTS)),
    "counts of both phases": lambda folder: npz(folder, prefill_counts=without(COUNTS), decode_counts=without(COUNTS)),
    "ids": lambda folder: npz(folder, ids=without(IDS), seq_offsets=made.offsets()),
    "ids of -1": lambda folder: npz(folder, ids=without(IDS, -1), seq_offsets=made.offsets()),
    "ids of -1 as uint8": lambda folder: npz(folder, ids=without(IDS, -1).astype(np.uint8), seq_offsets=made.offsets()),
    "the same id for all": lambda folder: npz(folder, ids=without(IDS, 5), seq_offsets=made.offsets()),
    "table": table,
    "stat": lambda folder: made.save_torch(folder / "x.pt", made.sglang_stat(without(COUNTS))),
    "per_pass": lambda folder: made.save_torch(folder / "x.pt", unmapped(made.sglang_per_pass(COUNTS), "global_physical_count", 0)),
    "per_token": lambda folder: made.save_torch(folder / "x.pt", unmapped(made.sglang_per_token(IDS), "topk_ids_of_layer", -1)),
    "vLLM": lambda folder: made.write_lines(folder / "x.jsonl", made.vllm_lines(without(IDS))),
    "vLLM, prompts apart": lambda folder: made.write_lines(folder / "x.jsonl", made.vllm_split_lines(without(IDS))),
    "SGLang": lambda folder: made.write_lines(folder / "x.jsonl", made.sglang_lines(without(IDS))),
}


@pytest.mark.parametrize("name", UNRECORDED)
def test_a_layer_without_routing_is_left_out(name: str, tmp_path: Path) -> None:
    file = UNRECORDED[name](tmp_path)
    found = import_routing(file, SPEC)
    counts = found.arrays["prefill_counts"] + found.arrays["decode_counts"]
    assert found.routing.layers == (2,)
    assert (counts[:, 1] == COUNTS[:, 1] * (2 if "both" in name else 1)).all() and not counts[:, 0].any()
    assert (found.arrays["trace_ids"][:, 0] == -1).all() and (found.arrays["trace_ids"][:, 1] >= 0).all()
    assert len(found.remarks) == 1 and found.remarks[0].startswith(f"{file}: {REMARK}")


def test_a_profile_without_a_layer_cannot_be_planned(tmp_path: Path) -> None:
    FAMILIES["deepseek_v2"]().save_pretrained(tmp_path / "model")
    remarks: list[str] = []
    file = UNRECORDED["stat"](tmp_path)
    profile = import_profile(str(tmp_path / "model"), file, tmp_path / "p", latency=made.latency(tmp_path), say=remarks.append)
    assert len(remarks) == 1
    with pytest.raises(ArtifactError, match="routing of 1 of the model's 2 MoE layers"):
        plan_of(profile, tiny_catalog())


def partly(array: Array, value: int = 0) -> Array:
    """The array with a layer that only one row or token has."""
    out = without(array, value)
    out[-1] = array[-1]
    return out


def test_a_layer_that_some_rows_lack_is_damage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"counts\[0\]: layer 2 sums to 10, which does not fit a sum of 0 in layer 1"):
        import_routing(npz(tmp_path, counts=partly(COUNTS)), SPEC)
    with pytest.raises(UsageError, match=r"prefill_counts\[0\]: layer 2 sums to 10, which does not fit a sum of 0 in layer 1"):
        import_routing(npz(tmp_path, prefill_counts=without(COUNTS), decode_counts=COUNTS), SPEC)
    with pytest.raises(UsageError, match=r"ids\[0\]: layer 1 has expert 0 twice"):
        import_routing(npz(tmp_path, ids=partly(IDS)), SPEC)
    with pytest.raises(UsageError, match=r"ids\[0\]: layer 1 has expert -1"):
        import_routing(npz(tmp_path, ids=partly(IDS, -1)), SPEC)


def test_of_named_layers_those_without_routing_are_left_out(tmp_path: Path) -> None:
    found = import_routing(npz(tmp_path, counts=without(COUNTS[:, ::-1]), layers=np.array([2, 1])), SPEC)
    assert found.routing.layers == (1,) and "layer 2 holds no routing" in found.remarks[0]


def test_with_one_expert_a_token_the_same_expert_may_be_routing(tmp_path: Path) -> None:
    """Expert 0 for every token still counts as not recorded."""
    spec = SPEC.model_copy(update={"top_k": 1})
    found = import_routing(npz(tmp_path, ids=without(IDS[:, :, :1], 5)), spec)
    assert found.routing.layers is None and found.arrays["prefill_counts"][0, 0, 5] == sum(LENGTHS)
    assert import_routing(npz(tmp_path, ids=without(IDS[:, :, :1])), spec).routing.layers == (2,)


def test_tokens_of_zeros_count_for_lengths_alone(tmp_path: Path) -> None:
    """As servers fill the rows of tokens whose routing they lost; in a layer that was not recorded they are zero like all others."""
    ids = without(IDS)
    ids[:2] = 0
    found = import_routing(made.write_lines(tmp_path / "x.jsonl", made.vllm_lines(ids)), SPEC)
    assert found.arrays["prompt_tokens"].tolist() == list(PROMPT)
    assert found.arrays["prefill_counts"][0].sum(axis=1).tolist() == [0, 2]
    assert REMARK in found.remarks[0] and "2 of 18 tokens have no routing" in found.remarks[1]


def test_a_layer_without_routing_may_miss_tokens_like_all_others(tmp_path: Path) -> None:
    ids = without(IDS)
    ids[:2] = -1
    found = import_routing(npz(tmp_path, ids=ids, seq_offsets=made.offsets()), SPEC)
    assert found.routing.layers == (2,) and "2 of 18 tokens have no routing" in found.remarks[1]


def same(found: ImportedRouting, other: ImportedRouting) -> bool:
    return all((found.arrays[name] == other.arrays[name]).all() for name in other.arrays)


IDLE: dict[str, Any] = {
    "no tokens": {"forward_mode": 4, "topk_ids_of_layer": torch.empty((3, 0, 8), dtype=torch.int32)},
    "padding": {"forward_mode": 4, "topk_ids_of_layer": torch.zeros((3, 2, 8), dtype=torch.int32)},
    "no ids": {"forward_mode": 2, "input_ids": [], "topk_ids_of_layer": torch.empty(0)},
    "nothing": {},
    "none": None,
}


@pytest.mark.parametrize("kind", IDLE)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_idle_passes_of_single_tokens_are_left_out(kind: str, place: int, tmp_path: Path) -> None:
    dump = made.sglang_per_token(IDS)
    records = list(dump["records"])
    records.insert(place, {**records[0], **IDLE[kind]} if IDLE[kind] else IDLE[kind])
    found = import_routing(made.save_torch(tmp_path / "x.pt", dump | {"records": records}), SPEC)
    assert same(found, import_routing(made.save_torch(tmp_path / "y.pt", dump), SPEC))


def test_a_mode_that_is_no_number(tmp_path: Path) -> None:
    dump = made.sglang_per_token(IDS)
    dump["records"][1]["forward_mode"] = torch.empty(0)
    with pytest.raises(UsageError, match=r"record 1: .* \(forward_mode is None, and 1 or 2 is needed\)"):
        import_routing(made.save_torch(tmp_path / "x.pt", dump), SPEC)


@pytest.mark.parametrize("idle", [torch.zeros((3, 9), dtype=torch.int32), torch.empty((0, 9)), {}, None])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_idle_passes_of_counts_are_left_out(idle: Any, place: int, tmp_path: Path) -> None:
    dump = made.sglang_per_pass(COUNTS)
    records = list(dump["records"])
    records.insert(place, {**records[0], "global_physical_count": idle} if isinstance(idle, torch.Tensor) else idle)
    found = import_routing(made.save_torch(tmp_path / "x.pt", dump | {"records": records}), SPEC)
    assert same(found, import_routing(made.save_torch(tmp_path / "y.pt", dump), SPEC))


def test_entries_of_other_programs_are_no_routing(tmp_path: Path) -> None:
    """As KTransformers adds them to SGLang's dump, whatever they hold."""
    more = {
        "prefill_count": {"layer_0": torch.ones((3, 8)), 1: [2, 3]},
        "decode_count": 7,
        "gpu_expert_masks": torch.ones((3, 3, 8)).bool(),
    }
    found = import_routing(made.save_torch(tmp_path / "x.pt", more | made.sglang_stat(COUNTS)), SPEC)
    assert (found.arrays["prefill_counts"] == COUNTS).all() and found.remarks == ()
    with pytest.raises(UsageError, match=r"it holds prefill_count, decode_count, gpu_expert_masks\)"):
        import_routing(made.save_torch(tmp_path / "x.pt", more), SPEC)


def test_a_stat_dump_may_be_a_sum_of_all_steps(tmp_path: Path) -> None:
    whole = made.sglang_stat(COUNTS)["logical_count"].sum(dim=0)
    found = import_routing(made.save_torch(tmp_path / "x.pt", {"logical_count": whole}), SPEC)
    assert (found.arrays["prefill_counts"] == COUNTS.sum(axis=0)[None]).all() and found.routing.row == "whole recording"

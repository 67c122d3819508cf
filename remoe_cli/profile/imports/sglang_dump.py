"""Dumps of SGLang's expert distribution recorder: a .pt file in one of three modes.

`/dump_expert_distribution_record` writes it.

    stat       logical_count [steps, layers, experts]: one forward pass a step; unused steps of its ring are zero. Programs that read such
               dumps also take [layers, experts], the sum of all steps
    per_pass   records of global_physical_count [layers, physical experts], one forward pass each
    per_token  records of topk_ids_of_layer [layers, tokens, slots], with the mode of the pass; -1 beyond the model's top-k

A row is a forward pass over all requests that were batched in it: the recorder does not separate requests. Left out are passes without a
token, such as those of a rank that waits for other ranks, and entries of other names.

last_physical_to_logical_map maps physical experts to the model's. It is the map at the end of the recording: routing from before a
rebalancing of the experts is mapped wrongly, and nothing in the dump shows that.

Source: sgl-project/sglang, python/sglang/srt/eplb/expert_distribution.py and expert_location.py (init_by_eplb), pull request 9501 (idle
passes); kvcache-ai/ktransformers, doc/en/kt-kernel/experts-sched-Tutorial.md (dumps with further entries).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.imports.checks import Array, CountedRouting, Routing, TracedRouting, listed, refuse, whole
from remoe_cli.profile.imports.torch_file import as_array, is_torch_file, read_torch_file

_ROW = "forward pass"
_EXTEND, _DECODE, _IDLE = 1, 2, 4  # ForwardMode: a pass over prompts, a pass of one token each, and a pass without requests


def is_sglang_dump(start: bytes, file: Path) -> bool:
    """Tell whether torch.save wrote the file, as the recorder has it do."""
    return start[:2] == b"PK" and is_torch_file(file)


def read_sglang_dump(file: Path, spec: MoeSpec, model: str) -> Routing:
    """Read a dump in any of the three modes.

    Raises: UsageError when it is no such dump, is damaged, or does not fit the model's experts and top-k.
    """
    dump = read_torch_file(file)
    entries = dump if isinstance(dump, dict) else {}
    for axes in (3, 2):
        if (counts := as_array(entries.get("logical_count"), axes, f"{file}: logical_count")) is not None:
            steps = counts if axes == 3 else counts[None]
            return CountedRouting("sglang stat", {None: steps[steps.any(axis=(1, 2))]}, {}, row=_ROW if axes == 3 else "whole recording")
    placed = as_array(entries.get("last_physical_to_logical_map"), 2, f"{file}: last_physical_to_logical_map")
    if placed is None or not isinstance(records := entries.get("records"), list):
        raise refuse(
            file,
            f"it is no dump of SGLang's expert distribution recorder (it holds {listed(entries) if entries else type(dump).__name__})",
            "Give a file with a logical_count of 3 axes, or with records and a last_physical_to_logical_map.",
        )
    table = whole(placed, f"{file}: last_physical_to_logical_map")
    if not table.size or (table >= spec.experts_per_layer).any():
        raise refuse(file, f"its last_physical_to_logical_map does not fit {spec.experts_per_layer} experts")
    is_per_token = any(isinstance(record, dict) and "topk_ids_of_layer" in record for record in records)
    return _per_token(file, records, table, spec) if is_per_token else _per_pass(file, records, table, spec)


def _per_pass(file: Path, records: list[Any], table: Array, spec: MoeSpec) -> CountedRouting:
    rows = []
    for number, _, physical in _arrays(file, records, "global_physical_count", 2):
        if physical.shape != table.shape:
            raise refuse(f"{file}, record {number}", f"its counts have shape {physical.shape}, and its map {table.shape}")
        logical = np.zeros((len(table), spec.experts_per_layer), dtype=np.int64)
        np.add.at(logical, (np.arange(len(table))[:, None], table), whole(physical, f"{file}, record {number}: counts"))
        if logical.any():
            rows.append(logical)
    if not rows:
        raise refuse(file, f"its {len(records)} records hold no routing")
    return CountedRouting("sglang per_pass", {None: np.stack(rows)}, {}, row=_ROW)


def _per_token(file: Path, records: list[Any], table: Array, spec: MoeSpec) -> TracedRouting:
    passes, prompt_tokens = [], []
    for number, record, ids in _arrays(file, records, "topk_ids_of_layer", 3):
        where = f"{file}, record {number}"
        if len(ids) != len(table) or ids.shape[2] < spec.top_k:
            raise refuse(where, f"its ids have shape {ids.shape}, and its map {len(table)} layers")
        ids = whole(ids, f"{where}: ids", -1)
        if (ids[:, :, spec.top_k :] != -1).any() or (ids >= table.shape[1]).any():
            raise refuse(where, f"its ids fit neither {table.shape[1]} experts nor top-{spec.top_k}")
        if (mode := _mode(record)) not in (_EXTEND, _DECODE):
            what = f"its forward mode is neither prefill nor decode (forward_mode is {mode}, and 1 or 2 is needed)"
            raise refuse(where, what, "Record without speculation or mixed batches.")
        ids = ids[:, :, : spec.top_k]
        logical = np.where(ids >= 0, table[np.arange(len(table))[:, None, None], ids], -1)
        passes.append(logical.transpose(1, 0, 2).astype(np.int32))
        prompt_tokens.append(ids.shape[1] if mode == _EXTEND else 0)
    if not passes:
        raise refuse(file, f"its {len(records)} records hold no routing")
    offsets = np.cumsum([0, *(len(ids) for ids in passes)])
    return TracedRouting("sglang per_token", np.concatenate(passes), offsets, np.array(prompt_tokens), row=_ROW)


def _arrays(file: Path, records: list[Any], name: str, axes: int) -> list[tuple[int, dict[str, Any], Array]]:
    """Get the number, the entries and the entry `name` of every record of a pass with tokens."""
    arrays = []
    for number, record in enumerate(records):
        where = f"{file}, record {number}"
        entries = record if isinstance(record, dict) else {}
        if _is_idle(record):
            continue
        array = as_array(entries.get(name), axes, f"{where}: {name}")
        if array is None:
            raise refuse(where, f"it has no {name} with {axes} axes (it has {listed(entries)})")
        if array.size:
            arrays.append((number, entries, array))
    if sum(array.nbytes for _, _, array in arrays) > file.stat().st_size:  # records that share their values
        raise refuse(file, f"its records have more values in {name} than the file stores")
    return arrays


def _is_idle(record: Any) -> bool:
    """Tell whether a record is empty, or of a pass without tokens or without requests."""
    if not isinstance(record, dict):
        return record is None
    tokens = record.get("input_ids")
    return not record or _mode(record) == _IDLE or (isinstance(tokens, list) and not tokens)


def _mode(record: dict[str, Any]) -> int | None:
    mode = record.get("forward_mode")
    return mode if isinstance(mode, int) else None

"""What SGLang's expert distribution recorder dumps (`/dump_expert_distribution_record`): a .pt file in one of three modes.

    stat       logical_count [steps, layers, experts]: one forward pass a step; unused steps of its ring are zero
    per_pass   records of global_physical_count [layers, physical experts], one forward pass each
    per_token  records of topk_ids_of_layer [layers, tokens, slots], with the mode of the pass; -1 beyond the model's top-k

A row is a forward pass, of whatever requests were batched in it: the recorder does not tell requests apart. Physical experts are
mapped back by last_physical_to_logical_map, so a dump over which experts were moved again is wrong, which nothing in it shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from remoe_cli.model.checkpoint import reason
from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.imports.rows import Array, Counted, Traced, refuse, whole
from remoe_cli.profile.imports.torch_zip import read_torch_zip

_ROW = "forward pass"
_EXTEND, _DECODE = 1, 2  # ForwardMode: a pass over prompts, and a pass of one token each


def read_sglang_dump(file: Path, spec: MoeSpec) -> Counted | Traced:
    try:
        dump = read_torch_zip(file)
    except Exception as error:  # zipfile fails in ways of its own on damaged files
        raise refuse(file, f"it cannot be read without unpickling it ({reason(error)})") from None
    match dump:
        case {"logical_count": np.ndarray(ndim=3) as counts}:
            used = counts[counts.any(axis=(1, 2))]
            return Counted("sglang stat", {None: used}, {}, row=_ROW)
        case {"records": [dict() as first, *_] as records, "last_physical_to_logical_map": np.ndarray(ndim=2) as table}:
            table = whole(table, f"{file}: last_physical_to_logical_map")
            if not table.size or (table >= spec.experts_per_layer).any():
                raise refuse(file, f"its last_physical_to_logical_map does not fit {spec.experts_per_layer} experts")
            return _per_token(file, records, table, spec) if "topk_ids_of_layer" in first else _per_pass(file, records, table, spec)
    raise refuse(file, "it is no dump of SGLang's expert distribution recorder", "Give a file with logical_count or records.")


def _per_pass(file: Path, records: list[Any], table: Array, spec: MoeSpec) -> Counted:
    rows = []
    for number, record in enumerate(records):
        physical = _array(file, number, record, "global_physical_count", 2)
        if physical.shape != table.shape:
            raise refuse(f"{file}, record {number}", f"its counts have shape {physical.shape}, and its map {table.shape}")
        logical = np.zeros((len(table), spec.experts_per_layer), dtype=np.int64)
        np.add.at(logical, (np.arange(len(table))[:, None], table), whole(physical, f"{file}, record {number}: counts"))
        if logical.any():
            rows.append(logical)
    if not rows:
        raise refuse(file, "its records hold no routing")
    return Counted("sglang per_pass", {None: np.stack(rows)}, {}, row=_ROW)


def _per_token(file: Path, records: list[Any], table: Array, spec: MoeSpec) -> Traced:
    passes, prompt_tokens = [], []
    for number, record in enumerate(records):
        ids = _array(file, number, record, "topk_ids_of_layer", 3)
        where = f"{file}, record {number}"
        if len(ids) != len(table) or ids.shape[2] < spec.top_k:
            raise refuse(where, f"its ids have shape {ids.shape}, and its map {len(table)} layers")
        ids = whole(ids, f"{where}: ids", -1)
        if (ids[:, :, spec.top_k :] != -1).any() or (ids >= table.shape[1]).any():
            raise refuse(where, f"its ids fit neither {table.shape[1]} experts nor top-{spec.top_k}")
        if (mode := record.get("forward_mode")) not in (_EXTEND, _DECODE):
            raise refuse(where, "its forward mode is neither prefill nor decode", "Record without speculation or mixed batches.")
        ids = ids[:, :, : spec.top_k]
        logical = np.where(ids >= 0, table[np.arange(len(table))[:, None, None], ids], -1)
        if ids.shape[1]:
            passes.append(logical.transpose(1, 0, 2).astype(np.int32))
            prompt_tokens.append(ids.shape[1] if mode == _EXTEND else 0)
    if not passes:
        raise refuse(file, "its records hold no routing")
    offsets = np.cumsum([0, *(len(p) for p in passes)])
    return Traced("sglang per_token", np.concatenate(passes), offsets, np.array(prompt_tokens), row=_ROW)


def _array(file: Path, number: int, record: Any, name: str, axes: int) -> Array:
    array = record.get(name) if isinstance(record, dict) else None
    if not isinstance(array, np.ndarray) or array.ndim != axes:
        raise refuse(f"{file}, record {number}", f"it has no {name} with {axes} axes")
    return array

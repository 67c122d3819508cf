"""Dumps of SGLang's expert distribution recorder: a .pt file in one of three modes.

`/dump_expert_distribution_record` writes it.

    stat       logical_count [steps, layers, experts]: one forward pass a step; unused steps of its ring are zero
    per_pass   records of global_physical_count [layers, physical experts], one forward pass each
    per_token  records of topk_ids_of_layer [layers, tokens, slots], with the mode of the pass; -1 beyond the model's top-k

A row is a forward pass over all requests that were batched in it: the recorder does not separate requests. Passes without a token are
left out, and so are entries with other names. last_physical_to_logical_map maps physical experts to the model's. It is the map at the
end of the recording: routing from before a rebalancing of the experts is mapped wrongly, and nothing in the dump shows that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.imports.checks import Array, CountedRouting, Routing, TracedRouting, refuse, whole
from remoe_cli.profile.imports.torch_file import as_array, is_torch_file, read_torch_file

_ROW = "forward pass"
_EXTEND, _DECODE = 1, 2  # ForwardMode: a pass over prompts, and a pass of one token each


def is_sglang_dump(start: bytes, file: Path) -> bool:
    """Tell whether torch.save wrote the file, as the recorder has it do."""
    return start[:2] == b"PK" and is_torch_file(file)


def read_sglang_dump(file: Path, spec: MoeSpec, model: str) -> Routing:
    """Read a dump in any of the three modes.

    Raises: UsageError when it is no such dump, is damaged, or does not fit the model's experts and top-k.
    """
    match dump := read_torch_file(file):
        case {"logical_count": value} if (counts := as_array(value, 3, f"{file}: logical_count")) is not None:
            used = counts[counts.any(axis=(1, 2))]
            return CountedRouting("sglang stat", {None: used}, {}, row=_ROW)
        case {"records": [dict() as first, *_] as records, "last_physical_to_logical_map": value} if (
            placed := as_array(value, 2, f"{file}: last_physical_to_logical_map")
        ) is not None:
            table = whole(placed, f"{file}: last_physical_to_logical_map")
            if not table.size or (table >= spec.experts_per_layer).any():
                raise refuse(file, f"its last_physical_to_logical_map does not fit {spec.experts_per_layer} experts")
            return _per_token(file, records, table, spec) if "topk_ids_of_layer" in first else _per_pass(file, records, table, spec)
    entries = ", ".join(map(str, dump))[:200] if isinstance(dump, dict) else type(dump).__name__
    raise refuse(
        file,
        f"it is no dump of SGLang's expert distribution recorder (it holds {entries or 'nothing'})",
        "Give a file with a logical_count of 3 axes, or with records and a last_physical_to_logical_map.",
    )


def _per_pass(file: Path, records: list[Any], table: Array, spec: MoeSpec) -> CountedRouting:
    rows = []
    for number, physical in enumerate(_arrays(file, records, "global_physical_count", 2)):
        if physical.shape != table.shape:
            raise refuse(f"{file}, record {number}", f"its counts have shape {physical.shape}, and its map {table.shape}")
        logical = np.zeros((len(table), spec.experts_per_layer), dtype=np.int64)
        np.add.at(logical, (np.arange(len(table))[:, None], table), whole(physical, f"{file}, record {number}: counts"))
        if logical.any():
            rows.append(logical)
    if not rows:
        raise refuse(file, "its records hold no routing")
    return CountedRouting("sglang per_pass", {None: np.stack(rows)}, {}, row=_ROW)


def _per_token(file: Path, records: list[Any], table: Array, spec: MoeSpec) -> TracedRouting:
    passes, prompt_tokens = [], []
    for number, (record, ids) in enumerate(zip(records, _arrays(file, records, "topk_ids_of_layer", 3), strict=True)):
        where = f"{file}, record {number}"
        if len(ids) != len(table) or ids.shape[2] < spec.top_k:
            raise refuse(where, f"its ids have shape {ids.shape}, and its map {len(table)} layers")
        ids = whole(ids, f"{where}: ids", -1)
        if (ids[:, :, spec.top_k :] != -1).any() or (ids >= table.shape[1]).any():
            raise refuse(where, f"its ids fit neither {table.shape[1]} experts nor top-{spec.top_k}")
        if not ids.shape[1]:  # an idle pass of a rank without requests
            continue
        if (mode := record.get("forward_mode")) not in (_EXTEND, _DECODE):
            raise refuse(where, "its forward mode is neither prefill nor decode", "Record without speculation or mixed batches.")
        ids = ids[:, :, : spec.top_k]
        logical = np.where(ids >= 0, table[np.arange(len(table))[:, None, None], ids], -1)
        passes.append(logical.transpose(1, 0, 2).astype(np.int32))
        prompt_tokens.append(ids.shape[1] if mode == _EXTEND else 0)
    if not passes:
        raise refuse(file, "its records hold no routing")
    offsets = np.cumsum([0, *(len(ids) for ids in passes)])
    return TracedRouting("sglang per_token", np.concatenate(passes), offsets, np.array(prompt_tokens), row=_ROW)


def _arrays(file: Path, records: list[Any], name: str, axes: int) -> list[Array]:
    """Get the entry `name` of every record."""
    arrays = []
    for number, record in enumerate(records):
        where = f"{file}, record {number}"
        entries = record if isinstance(record, dict) else {}
        array = as_array(entries.get(name), axes, f"{where}: {name}")
        if array is None:
            names = ", ".join(map(str, entries))[:200] or "no entries"
            raise refuse(where, f"it has no {name} with {axes} axes (it has {names})")
        arrays.append(array)
    if sum(array.nbytes for array in arrays) > file.stat().st_size:  # records that share their values
        raise refuse(file, f"its records have more values in {name} than the file stores")
    return arrays

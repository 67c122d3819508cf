"""Routing as a long table: a CSV with a row for each layer and expert.

Needed columns: layer, expert, and selections (or count). Optional: tokens (of how many tokens a row's counts are), k, model, mode. Every
other column of text or whole numbers separates the rows of the profile (a task, a domain, a prompt's id); columns with fractions are
measurements and are ignored. Of several models the one with the checkpoint's name is taken, else the only one with the model's experts
and k; of several modes `topk`. An expert without a row was not used.

The file is read twice, row by row: first to choose the model, the mode and the columns, then for the counts.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from remoe_cli.model.checkpoint import reason
from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.imports.checks import MAX, CountedRouting, Counts, check_size, listed, refuse
from remoe_cli.profile.imports.text_file import lines_of, open_text

COUNT_COLUMNS = ("selections", "count", "counts")
_KNOWN = {"layer", "expert", "tokens", "k", "model", "mode", *COUNT_COLUMNS}
_MOST_GROUPS = 2**20  # rows of a profile
_MOST_CHARACTERS = 2**20  # of a line
_MOST_VALUES = 10_000  # layers of a model, or models and modes of a file
_Row = tuple[int, dict[str, str]]
_Group = tuple[str, ...]


def is_table(start: bytes, file: Path) -> bool:
    """Tell whether the first line is a CSV header with the columns layer and expert."""
    names = {name.strip().strip('"') for name in start.split(b"\n")[0].decode("utf-8-sig", "replace").split(",")}
    return {"layer", "expert"} <= names


@dataclass
class _Seen:
    """What the rows of one model and mode hold.

    layers       the layers that they name
    has_last     whether they have the model's last expert, and none after it
    has_k        whether any of them chooses as many experts as the model
    numeric      the columns that hold numbers only
    fractional   those of them that hold a fraction
    """

    numeric: set[str]
    layers: set[str] = field(default_factory=set)
    has_last: bool = False
    has_more: bool = False
    has_k: bool = False
    fractional: set[str] = field(default_factory=set)

    def add(self, row: dict[str, str], spec: MoeSpec) -> None:
        self.layers.add(row["layer"])
        self.has_last |= row["expert"] == str(spec.experts_per_layer - 1)
        self.has_more |= row["expert"] == str(spec.experts_per_layer)
        self.has_k |= row.get("k", str(spec.top_k)) == str(spec.top_k)
        for name in tuple(self.numeric):
            try:
                if not float(row[name]).is_integer():
                    self.fractional.add(name)
            except ValueError:
                self.numeric.discard(name)


def read_table(file: Path, spec: MoeSpec, model: str) -> CountedRouting:
    """Read the rows of the model named `model`.

    Raises: UsageError for a row that is broken, comes twice or does not fit the model, with its number.
    """
    names, seen = _look_through(file, spec)
    column = next((name for name in COUNT_COLUMNS if name in names), None)
    if column is None:
        raise refuse(file, f"it has the columns {listed(names)} and none of {', '.join(COUNT_COLUMNS)}", "Name the column of the counts.")
    chosen = _chosen(file, seen, model)
    measured = {
        name for name in names if all(name in seen[key].numeric for key in chosen) and any(name in seen[key].fractional for key in chosen)
    }
    grouping = [name for name in names if name not in _KNOWN and name not in measured]
    layers = sorted({int(layer) for key in chosen for layer in seen[key].layers if _is_number(layer)})
    groups, tokens = _groups(file, spec, column, grouping, layers, chosen)
    named = np.array([tokens[group] for group in groups]) if tokens else None
    row_is = "prompt" if grouping == ["prompt"] else f"group of {', '.join(grouping)}" if grouping else "whole table"
    counts = np.maximum(np.stack(list(groups.values())), 0)
    return CountedRouting("table", {None: counts}, {} if named is None else {None: named}, tuple(layers), row_is)


def _look_through(file: Path, spec: MoeSpec) -> tuple[list[str], dict[tuple[str, str], _Seen]]:
    """Read the header's names, and what the rows of each model and mode hold."""
    names: list[str] = []
    seen: dict[tuple[str, str], _Seen] = {}
    for number, row in _rows(file):
        names = names or list(row)
        key = row.get("model", ""), row.get("mode", "")
        of_key = seen.setdefault(key, _Seen(numeric=set(names) - _KNOWN))
        of_key.add(row, spec)
        for what, values in (("models and modes", len(seen)), ("layers", len(of_key.layers))):
            if values > _MOST_VALUES:
                raise refuse(f"{file}, row {number}", f"the file has more than {_MOST_VALUES:,} {what}, which is the most")
    if not seen:
        raise refuse(file, "it has a header and no rows")
    return names, seen


def _chosen(file: Path, seen: dict[tuple[str, str], _Seen], model: str) -> list[tuple[str, str]]:
    """Choose the model and the mode of the rows to read."""
    models = dict.fromkeys(name for name, _ in seen)
    fitting = [name for name in models if name.rsplit("/", 1)[-1].casefold() == model.casefold()]
    if models == {"": None}:
        fitting = [""]
    elif not fitting:
        fitting = [name for name in models if _fits([each for (of, _), each in seen.items() if of == name])]
    if len(fitting) != 1:
        what = f"it has routing of {listed(models)}, and which is that of {model!r} is not clear"
        raise refuse(file, what, "Give the model's folder the name of one of them.")
    keys = [key for key in seen if key[0] == fitting[0]]
    return [key for key in keys if key[1] == "topk"] or keys


def _fits(parts: list[_Seen]) -> bool:
    return any(part.has_last for part in parts) and not any(part.has_more for part in parts) and any(part.has_k for part in parts)


def _groups(
    file: Path, spec: MoeSpec, column: str, grouping: list[str], layers: list[int], chosen: list[tuple[str, str]]
) -> tuple[dict[_Group, Counts], dict[_Group, int]]:
    """Read the counts [L, E] of each group of rows, and the tokens it states; -1 where there is no row."""
    at = {layer: place for place, layer in enumerate(layers)}
    groups: dict[_Group, Counts] = {}
    tokens: dict[_Group, int] = {}
    for number, row in _rows(file):
        if (row.get("model", ""), row.get("mode", "")) not in chosen:
            continue
        where = f"{file}, row {number}"
        layer, expert, count = (_number(where, name, row[name]) for name in ("layer", "expert", column))
        if expert >= spec.experts_per_layer:
            raise refuse(where, f"expert {expert} is not one of the model's {spec.experts_per_layer} a layer")
        if "k" in row and _number(where, "k", row["k"]) != spec.top_k:
            raise refuse(where, f"its k is {row['k']}, and the model chooses {spec.top_k} experts a token")
        group = tuple(row[name] for name in grouping)
        if group not in groups:
            _check_groups(where, len(groups) + 1, len(layers), grouping, spec)
            groups[group] = np.full((len(layers), spec.experts_per_layer), -1, dtype=np.int32)
        counts = groups[group]
        if counts[at[layer], expert] >= 0:
            raise refuse(where, f"expert {expert} of layer {layer} comes a second time for {listed(group) if group else 'all'}")
        counts[at[layer], expert] = count
        if "tokens" in row and tokens.setdefault(group, stated := _number(where, "tokens", row["tokens"])) != stated:
            raise refuse(where, f"its tokens are {stated}, and {tokens[group]} in the rows before")
    return groups, tokens


def _check_groups(where: str, groups: int, layers: int, grouping: list[str], spec: MoeSpec) -> None:
    check_size(groups, spec, where)
    if groups > _MOST_GROUPS or groups * layers * spec.experts_per_layer > MAX // 4:
        what = f"its columns {listed(grouping)} make more than {groups - 1:,} groups of rows, which is the most"
        raise refuse(where, what, "Leave out columns that do not tell prompts apart, or import fewer rows.")


def _rows(file: Path) -> Iterator[_Row]:
    hint = "Correct the row, or its quotes."
    number = 1
    try:
        with open_text(file) as stream:
            records = csv.reader((line for _, line in lines_of(file, stream, _MOST_CHARACTERS)), strict=True)
            header = [name.strip() for name in next(records, [])]
            if len(set(header)) != len(header):
                raise refuse(file, "its header names a column twice", hint)
            for record in records:
                number = records.line_num
                if record and len(record) != len(header):
                    raise refuse(f"{file}, row {number}", f"{len(record)} values for the {len(header)} columns of the header", hint)
                if record:
                    yield number, dict(zip(header, record, strict=True))
    except csv.Error as error:
        raise refuse(f"{file}, after row {number}", f"not CSV ({reason(error)})", hint) from None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= MAX


def _number(where: str, name: str, text: str) -> int:
    if not _is_number(text):
        raise refuse(where, f"its {name} is {text[:40]!a}, not a whole number from 0 to {MAX}")
    return int(text)

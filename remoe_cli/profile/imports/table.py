"""Routing as a long table: a CSV with a row for each layer and expert.

Needed columns: layer, expert, and selections (or count). Optional: tokens (of how many tokens a row's counts are), k, model, mode. Every
other column of text or whole numbers separates the rows of the profile (a task, a domain, a prompt's id); columns with fractions are
measurements and are ignored. Of several models the one with the checkpoint's name is taken, else the only one with the model's experts
and k; of several modes `topk`. An expert without a row was not used.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from remoe_cli.model.checkpoint import reason
from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.imports.checks import CountedRouting, refuse

_COUNTS = ("selections", "count", "counts")
_KNOWN = {"layer", "expert", "tokens", "k", "model", "mode", *_COUNTS}
_MOST_COUNTS = 2**28
_Row = tuple[int, dict[str, str]]


def is_table(start: bytes, file: Path) -> bool:
    """Tell whether the first line is a CSV header with the columns layer and expert."""
    names = {name.strip().strip('"') for name in start.split(b"\n")[0].decode("utf-8-sig", "replace").split(",")}
    return {"layer", "expert"} <= names


def read_table(file: Path, spec: MoeSpec, model: str) -> CountedRouting:
    """Read the rows of the model named `model`.

    Raises: UsageError for a row that is broken, comes twice or does not fit the model, with its number.
    """
    rows = list(_rows(file))
    if not rows:
        raise refuse(file, "it has a header and no rows")
    names = list(rows[0][1])
    column = next((name for name in _COUNTS if name in names), None)
    if column is None:
        raise refuse(file, f"it has the columns {', '.join(names)[:200]} and none of {', '.join(_COUNTS)}")
    rows = _of_model(file, rows, spec, model)
    if "mode" in names:
        rows = [row for row in rows if row[1]["mode"] == "topk"] or rows
    grouping = [name for name in names if name not in _KNOWN and not _measured([row[1][name] for row in rows])]
    groups: dict[tuple[str, ...], int] = {}
    cells: dict[tuple[int, int, int], int] = {}
    tokens: dict[int, int] = {}
    for number, row in rows:
        where = f"{file}, row {number}"
        group = groups.setdefault(tuple(row[name] for name in grouping), len(groups))
        layer, expert, count = (_number(where, name, row[name]) for name in ("layer", "expert", column))
        if expert >= spec.experts_per_layer:
            raise refuse(where, f"expert {expert} is not one of the model's {spec.experts_per_layer} a layer")
        if "k" in row and _number(where, "k", row["k"]) != spec.top_k:
            raise refuse(where, f"its k is {row['k']}, and the model chooses {spec.top_k} experts a token")
        if (group, layer, expert) in cells:
            raise refuse(where, f"expert {expert} of layer {layer} comes a second time for {', '.join(row[n] for n in grouping) or 'all'}")
        cells[group, layer, expert] = count
        if "tokens" in row and tokens.setdefault(group, stated := _number(where, "tokens", row["tokens"])) != stated:
            raise refuse(where, f"its tokens are {stated}, and {tokens[group]} in the rows before")
    layers = sorted({layer for _, layer, _ in cells})
    if len(groups) * len(layers) * spec.experts_per_layer > _MOST_COUNTS:
        raise refuse(file, f"it has {len(groups)} groups of rows, which is too many")
    counts = np.zeros((len(groups), len(layers), spec.experts_per_layer), dtype=np.int64)
    at = {layer: place for place, layer in enumerate(layers)}
    for (group, layer, expert), count in cells.items():
        counts[group, at[layer], expert] = count
    named = np.array([tokens[group] for group in range(len(groups))]) if tokens else None
    row_is = "prompt" if grouping == ["prompt"] else f"group of {', '.join(grouping)}" if grouping else "whole table"
    return CountedRouting("table", {None: counts}, {} if named is None else {None: named}, tuple(layers), row_is)


def _rows(file: Path) -> Iterator[_Row]:
    hint = "Correct the row, or its quotes."
    number = 1
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            records = csv.reader(text, strict=True)
            header = [name.strip() for name in next(records, [])]
            if len(set(header)) != len(header):
                raise refuse(file, "its header names a column twice", hint)
            for record in records:
                number = records.line_num
                if record and len(record) != len(header):
                    raise refuse(f"{file}, row {number}", f"{len(record)} values for the {len(header)} columns of the header", hint)
                if record:
                    yield number, dict(zip(header, record, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise refuse(f"{file}, after row {number}", f"not CSV ({reason(error)})", hint) from None


def _of_model(file: Path, rows: list[_Row], spec: MoeSpec, model: str) -> list[_Row]:
    names = {row["model"]: None for _, row in rows if "model" in row}
    fitting = [name for name in names if name.rsplit("/", 1)[-1].casefold() == model.casefold()]
    if not fitting:
        fitting = [name for name in names if _fits([row for _, row in rows if row["model"] == name], spec)]
    if not names:
        return rows
    if len(fitting) != 1:
        raise refuse(
            file,
            f"it has routing of {', '.join(names)[:200]}, and which is that of {model!r} is not clear",
            "Give the model's folder the name of one of them.",
        )
    return [row for row in rows if row[1]["model"] == fitting[0]]


def _fits(rows: list[dict[str, str]], spec: MoeSpec) -> bool:
    experts = {row["expert"] for row in rows}
    return str(spec.experts_per_layer - 1) in experts and str(spec.experts_per_layer) not in experts and _has_k(rows, spec)


def _has_k(rows: list[dict[str, str]], spec: MoeSpec) -> bool:
    return "k" not in rows[0] or any(row["k"] == str(spec.top_k) for row in rows)


def _measured(values: list[str]) -> bool:
    """Tell whether the values are numbers of which some are not whole."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return False
    return any(not number.is_integer() for number in numbers)


def _number(where: str, name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise refuse(where, f"its {name} is {text[:40]!r}, not a whole number of 0 or more")
    return int(text)

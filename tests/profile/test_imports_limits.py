"""Limits of what is read: each is said in its error, and no more memory is taken than it allows."""

from __future__ import annotations

import base64
import gzip
import json
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli.errors import UsageError
from remoe_cli.profile.imports import arrays, checks, json_rows, responses, table
from remoe_cli.profile.imports.importer import import_routing
from tests.support import routing_files as made
from tests.support.routing_files import SPEC, Array

IDS = made.make_ids()
COUNTS = made.count(IDS)
ROWS = made.vllm_lines(IDS)


def peak_bytes(file: Path) -> int:
    """Import a file that is refused; the most memory that was taken."""
    tracemalloc.start()
    try:
        with pytest.raises(UsageError):
            import_routing(file, SPEC)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def packed(file: Path, shape: tuple[int, ...], name: str = "counts.npy") -> Path:
    """An .npz of zeros that takes a thousandth of their size."""
    header = f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w", force_zip64=True) as member:
        member.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
        left = 4 * int(np.prod(shape))
        while left:
            left -= member.write(bytes(min(left, 2**22)))
    return file


def test_compressed_arrays_are_refused_before_they_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = packed(tmp_path / "x.npz", (2**20, 2, 8))
    assert file.stat().st_size < 2**17
    monkeypatch.setattr(arrays, "_MOST_UNPACKED_BYTES", 2**25)
    with pytest.raises(UsageError, match=r"its arrays take 67,108,992 bytes when they are unpacked; the most is 33,554,432 for compressed"):
        import_routing(file, SPEC)
    assert peak_bytes(file) < 2**20
    packed(tmp_path / "y.npz", (2**18, 2, 8))  # each is less than the limit
    packed(tmp_path / "y.npz", (2**18, 2, 8), "n_tokens.npy")
    packed(tmp_path / "y.npz", (2**18, 2, 8), "decode_tokens.npy")
    assert peak_bytes(tmp_path / "y.npz") < 2**20
    np.savez(tmp_path / "z.npz", counts=np.broadcast_to(COUNTS[:1], (2**18, 2, 8)))  # not compressed, so as large as the file
    assert import_routing(tmp_path / "z.npz", SPEC).rows == 2**18


def test_compressed_arrays_may_be_so_many_times_their_file(tmp_path: Path) -> None:
    """A quarter of a gibibyte at most, and for a small file 64 MiB."""
    assert (arrays._MOST_UNPACKED_BYTES, arrays._UNPACKED_BYTES, arrays._UNPACKED_TIMES) == (2**28, 2**26, 20)
    file = packed(tmp_path / "x.npz", (2**21, 2, 8))
    with pytest.raises(UsageError, match="the most is 67,108,864 for compressed arrays together"):
        import_routing(file, SPEC)


def test_tuples_that_hold_each_other_are_refused_before_they_are_hashed(tmp_path: Path) -> None:
    """As the key of a dictionary, 60 tuples of which each holds the one before twice take longer than the universe has."""
    ops = b"\x80\x02}K\x01\x85q\x00" + b"".join(b"h%c\x86q%c" % (n, n + 1) for n in range(60)) + b"K\x01s."
    valid = made.every_format(tmp_path, IDS)["stat.pt"]
    with zipfile.ZipFile(valid) as old, zipfile.ZipFile(tmp_path / "x.pt", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, ops if entry.filename.endswith("data.pkl") else old.read(entry))
    with pytest.raises(UsageError, match="tuples inside each other that stand for more than 10,000 tuples"):
        import_routing(tmp_path / "x.pt", SPEC)


def text(file: Path, rows: list[Any] | str) -> Path:
    file.write_text(rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows)))
    return file


LIMITS: dict[str, tuple[Any, str, int, Callable[[Path], Path], str]] = {
    "line": (
        json_rows,
        "_MOST_CHARACTERS",
        2**20,
        lambda file: text(file, [*ROWS, {"a": "x" * 2**20}]),
        "row 4: it has more than 1,048,576 characters",
    ),
    "first line": (
        json_rows,
        "_MOST_CHARACTERS",
        2**20,
        lambda file: text(file, [{"a": "x" * 2**20}]),
        "row 1: it has more than 1,048,576 characters",
    ),
    "element": (
        json_rows,
        "_MOST_CHARACTERS",
        2**20,
        lambda file: text(file, [[*ROWS, {"a": "x" * 2**22}]]),
        "row 4: it has a value of more than 1 MiB",
    ),
    "long line": (json_rows, "_MOST_CHARACTERS", 2**12, lambda file: text(file, [{"a": "x" * 2**17}]), "row 1: it has more than 4,096 c"),
    "object over lines": (
        json_rows,
        "_MOST_CHARACTERS",
        2**20,
        lambda file: text(file, json.dumps({"a": ["x" * 99] * 2**15}, indent=1)),
        "row 1: it has a value of more than 1 MiB, which is the most",
    ),
    "parts": (
        json_rows,
        "_MOST_PARTS",
        999,
        lambda file: text(file, [*ROWS, {"a": [[]] * 999}]),
        "row 4: it has a value of more than 999 numbers",
    ),
    "parts of the first": (
        json_rows,
        "_MOST_PARTS",
        999,
        lambda file: text(file, [{"a": [[]] * 999}]),
        "row 1: it has a value of more than",
    ),
    "parts of an element": (
        json_rows,
        "_MOST_PARTS",
        999,
        lambda file: text(file, json.dumps([*ROWS, {"a": [[]] * 2**20}])),
        "row 4: it has a value of more than 999 numbers",
    ),
    "ids": (responses, "_MOST_IDS", 40, lambda file: text(file, ROWS), "row 2: with it the file has more than 40 ids"),
    "tokens that are not there": (
        responses,
        "_MOST_IDS",
        2**20,
        lambda file: text(
            file,
            [{"choices": [{"routed_experts": IDS[:5].tolist()}], "routed_experts_start_len": 2**30, "usage": {"prompt_tokens": 2**30}}],
        ),
        "row 1: with it the file has more than 1,048,576 ids",
    ),
    "lost answer": (
        responses,
        "_MOST_IDS",
        2**20,
        lambda file: text(file, [{"choices": [], "prompt_routed_experts": IDS[:5].tolist(), "usage": {"completion_tokens": 2**31 - 1}}]),
        "row 1: with it the file has more than 1,048,576 ids",
    ),
    "line of a table": (table, "_MOST_CHARACTERS", 200, lambda file: text(file, "layer,expert,count\n" + "1" * 201), "row 2: .* 200 char"),
    "layers of a table": (
        table,
        "_MOST_VALUES",
        3,
        lambda file: text(file, "layer,expert,count\n" + "".join(f"{n},0,1\n" for n in range(9))),
        "row 5: the file has more than 3 layers",
    ),
    "models of a table": (
        table,
        "_MOST_VALUES",
        3,
        lambda file: text(file, "layer,expert,count,model\n" + "".join(f"1,0,1,m{n}\n" for n in range(9))),
        "row 5: the file has more than 3 models and modes",
    ),
    "groups of a table": (
        table,
        "_MOST_GROUPS",
        2,
        lambda file: text(file, made.table(COUNTS)),
        "row 34: its columns task make more than 2 groups of rows",
    ),
    "counts of a profile": (
        checks,
        "_MOST_COUNTS",
        40,
        lambda file: text(file, ROWS),
        "its 3 rows make 48 counts, and a profile may have 40",
    ),
}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("compressed", [False, True])
def test_limits_are_said(name: str, compressed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, limit, value, write, message = LIMITS[name]
    monkeypatch.setattr(module, limit, value)
    file = write(tmp_path / "x")
    if compressed:
        file.write_bytes(gzip.compress(file.read_bytes()))
    with pytest.raises(UsageError, match=message) as raised:
        import_routing(file, SPEC)
    assert raised.value.hint
    assert peak_bytes(file) < 2**25


@pytest.mark.parametrize("start", [b"{", b'[{"a": "', b"layer,expert,count\n"])
def test_a_file_that_unpacks_to_a_thousand_times_its_size(start: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of it is kept but what the limit of a line allows."""
    monkeypatch.setattr(json_rows, "_MOST_CHARACTERS", 2**20)
    file = tmp_path / "x.gz"
    with gzip.open(file, "wb", compresslevel=1) as stream:
        stream.write(start)
        for _ in range(32):
            stream.write(b" " * 2**20)
    assert file.stat().st_size < 2**18
    assert peak_bytes(file) < 2**24


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data)


# What does not fit into what is read at once, nor is compressed much.
LONG = b"\n".join(json.dumps(row | {"text": base64.b64encode(np.random.default_rng(0).bytes(2**17)).decode()}).encode() for row in ROWS)
DAMAGED: dict[str, tuple[bytes, str]] = {
    "cut off": (gzipped("\n".join(map(json.dumps, ROWS)).encode())[:-20], "it is damaged or cut off"),
    "checksum": (gzipped("\n".join(map(json.dumps, ROWS)).encode())[:-8] + bytes(8), "it is damaged or cut off"),
    "long, cut off": (gzipped(LONG)[:-20], "it is damaged or cut off"),
    "long, checksum": (gzipped(LONG)[:-8] + bytes(8), "it is damaged or cut off"),
    "long, changed": (gzip.compress(LONG, 0)[:-300_000] + bytes(300_000), "it is damaged or cut off .*invalid stored block"),
    "UTF-16, cut off": (LONG.decode().encode("utf-16")[:-1], "it is damaged or cut off"),
    "header alone": (b"\x1f\x8b\x08\x00", "it is damaged or cut off"),
    "method": (b"\x1f\x8b\x07" + bytes(20), "it is damaged or cut off"),
    "arrays": (gzipped(b"PK\x03\x04" + bytes(99)), r"not known \(it is compressed with gzip, which only text may be: unpack it first\)"),
    "other columns": (
        b"Layer;Expert;Count\n1;2;3\n",
        r"its format is not known \(it begins like a table with the columns Layer, Expert, Count\)",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_compressed_files_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    data, message = DAMAGED[name]
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(UsageError, match=message) as raised:
        import_routing(tmp_path / "x", SPEC)
    assert raised.value.hint


@pytest.mark.parametrize("encode", [gzipped, lambda data: b"\xef\xbb\xbf" + data, lambda data: data.decode().encode("utf-16")])
def test_a_table_may_be_compressed_or_have_a_byte_order_mark(encode: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(encode(made.table(COUNTS).encode()))
    assert (import_routing(tmp_path / "x", SPEC).arrays["prefill_counts"] == COUNTS).all()


def tiled(array: Array, times: int) -> Array:
    return np.tile(array, (times, *[1] * (array.ndim - 1)))


@pytest.mark.parametrize("kind", ["counts", "ids"])
def test_checks_go_part_by_part(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same result in any parts, the number of the wrong row in the whole file, and little memory beside the arrays."""
    times = 4_000
    whole: dict[str, Array] = {"counts": tiled(COUNTS.astype(np.int32), times)}
    if kind == "ids":
        whole = {
            "ids": tiled(IDS.astype(np.int16), times),
            "seq_offsets": np.arange(times * 3 + 1) * 6,
            "prompt_tokens": np.full(times * 3, 2),
        }
    np.savez(tmp_path / "x.npz", **whole)
    one = import_routing(tmp_path / "x.npz", SPEC)
    monkeypatch.setattr(checks, "_CHUNK", 1000)
    parts = import_routing(tmp_path / "x.npz", SPEC)
    assert all((one.arrays[name] == parts.arrays[name]).all() for name in one.arrays)
    whole[kind] = whole[kind].copy()
    whole[kind][-3] = 0 if kind == "counts" else 99
    np.savez(tmp_path / "y.npz", **whole)
    message = "row 11997 holds no routing" if kind == "counts" else r"ids\[71997\]: layer 1 has expert 99"
    with pytest.raises(UsageError, match=message):
        import_routing(tmp_path / "y.npz", SPEC)
    of_profile = 2 * times * 3 * 2 * 8 * np.dtype(np.int32).itemsize
    of_tokens = 50 * len(whole["ids"]) if kind == "ids" else 0
    assert peak_bytes(tmp_path / "y.npz") < 2 * sum(array.nbytes for array in whole.values()) + of_profile + of_tokens

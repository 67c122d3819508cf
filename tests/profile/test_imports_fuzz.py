"""Importers on anything at all: a file ends in a whole profile or in a RemoeError, and a refused one leaves nothing behind."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from remoe_cli.errors import RemoeError
from remoe_cli.profile.imports.importer import import_profile, import_routing
from remoe_cli.profile.latency_record import Latency
from remoe_cli.profile.record import read_profile
from tests.support import routing_files as made
from tests.support.families import FAMILIES
from tests.support.routing_files import SPEC, Array

IDS = made.make_ids()
FORMATS = (
    *("counts.npz", "phases.npz", "small.npz", "ids.npz", "counts.npy", "ids.npy", "c.safetensors"),
    *("vllm.jsonl", "vllm_split.jsonl", "sglang.jsonl", "batch.jsonl", "sglang.json"),
    *("stat.pt", "per_pass.pt", "per_token.pt", "table.csv"),
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    files = made.every_format(tmp_path_factory.mktemp("files"), IDS)
    assert tuple(files) == FORMATS
    return {name: file.read_bytes() for name, file in files.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    FAMILIES["deepseek_v2"]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def latency(tmp_path_factory: pytest.TempPathFactory) -> Latency:
    return made.latency(tmp_path_factory.mktemp("latency"))


def attempt(data: bytes) -> bool:
    """Whether the bytes are routing; what is taken must add up."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            found = import_routing(Path(file.name), SPEC)
        except RemoeError:
            return False
    for phase, tokens in (("prefill", "prompt_tokens"), ("decode", "decode_tokens")):
        sums = found.arrays[f"{phase}_counts"].sum(axis=2)
        assert (found.arrays[f"{phase}_counts"] >= 0).all()
        assert (sums <= SPEC.top_k * found.arrays[tokens][:, None]).all()
    assert len(found.arrays["trace_ids"]) and found.arrays["trace_ids"].max() < SPEC.experts_per_layer
    return True


def mutate(data: bytes, cuts: list[tuple[float, bytes, int]]) -> bytes:
    """Overwrite and remove bytes at some places; a place is a share of the length."""
    out = bytearray(data)
    for place, new, removed in cuts:
        at = int(place * len(out))
        out[at : at + removed] = new
    return bytes(out)


CUTS = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 12)), min_size=1, max_size=4)
STARTS = (
    b"",
    b"PK\x03\x04",
    b"\x93NUMPY\x01\x00v\x00",
    b"\x10\x00\x00\x00\x00\x00\x00\x00{",
    b"{",
    b'{"choices": [',
    b"[",
    b'[\n {"choices": [',
    b"\x1f\x8b\x08\x00",
    b"layer,expert,count\n",
)


@FUZZ
@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=300))
def test_any_bytes(start: bytes, rest: bytes) -> None:
    attempt(start + rest)


@FUZZ
@given(name=st.sampled_from(FORMATS), cuts=CUTS)
def test_valid_files_with_some_bytes_changed(name: str, cuts: list[tuple[float, bytes, int]], valid: dict[str, bytes]) -> None:
    assert attempt(valid[name])
    attempt(mutate(valid[name], cuts))


@pytest.mark.parametrize("name", FORMATS)
def test_valid_files_cut_short(name: str, valid: dict[str, bytes]) -> None:
    """At every length, or at 150 of them. A text may still be whole rows of routing; the rest never is."""
    lengths = sorted({int(x) for x in np.linspace(0, len(valid[name]) - 1, 150)})
    taken = [length for length in lengths if attempt(valid[name][:length])]
    assert name.endswith((".jsonl", ".csv")) or not taken


def rezip(data: bytes, member: str, cuts: list[tuple[float, bytes, int]]) -> bytes:
    """The zip with one member changed and all checksums right: what lies behind the zip's own checks."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, mutate(content, cuts) if entry.filename.endswith(member) else content)
    return out.getvalue()


@FUZZ
@given(
    target=st.sampled_from(
        [("counts.npz", "counts.npy"), ("ids.npz", "ids.npy"), *((f"{mode}.pt", "data.pkl") for mode in ("stat", "per_pass", "per_token"))]
    ),
    cuts=CUTS,
)
def test_members_of_valid_zips_changed(target: tuple[str, str], cuts: list[tuple[float, bytes, int]], valid: dict[str, bytes]) -> None:
    attempt(rezip(valid[target[0]], target[1], cuts))


DTYPES = st.one_of(
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.boolean_dtypes(),
    hnp.complex_number_dtypes(),
    hnp.unicode_string_dtypes(max_len=3),
    st.just(np.dtype([("a", "<i4"), ("b", "<f8")])),
)
SIZES = st.tuples(st.integers(0, 4), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 7, 8]))
ARRAYS = DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, st.one_of(SIZES, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))))
NAMES = ("counts", "prefill_counts", "decode_counts", "ids", "n_tokens", "prompt_tokens", "decode_tokens", "seq_offsets", "layers")
PLAUSIBLE = {"counts": made.count(IDS), "ids": IDS, "seq_offsets": made.offsets(), "n_tokens": np.array(made.LENGTHS)}


@FUZZ
@given(arrays=st.dictionaries(st.sampled_from(NAMES), ARRAYS, max_size=4), base=st.sampled_from(["counts", "ids", None]))
def test_any_arrays(arrays: dict[str, Array], base: str | None) -> None:
    """Arrays of any kind, alone and beside those of a valid file."""
    valid = {base: PLAUSIBLE[base], "seq_offsets": PLAUSIBLE["seq_offsets"]} if base else {}
    buffer = io.BytesIO()
    np.savez(buffer, **(valid | arrays))
    attempt(buffer.getvalue())
    if arrays:
        buffer = io.BytesIO()
        np.save(buffer, next(iter(arrays.values())))
        attempt(buffer.getvalue())


@FUZZ
@given(counts=hnp.arrays(np.int64, (3, 2, 8), elements=st.integers(-1, 4)), top=st.booleans(), at=st.tuples(*[st.integers(0, 1)] * 3))
def test_counts_are_taken_exactly_when_they_add_up(counts: Array, top: bool, at: tuple[int, int, int]) -> None:
    """Against the rule written out: no negative, equal even sums over recorded layers, none above the tokens, no empty row."""
    if top:  # few random arrays add up, so start from one that does and move one token
        moved = made.count(IDS)
        moved[at] += counts[at]
        counts = moved
    recorded = counts.any(axis=(0, 2))
    counts, whole = counts[:, recorded], counts
    sums = counts.sum(axis=2)
    right = recorded.any() and (counts >= 0).all() and (sums == sums[:, :1]).all() and (sums % 2 == 0).all() and (sums > 0).all()
    right = right and (counts <= sums[:, :, None] // 2).all()
    buffer = io.BytesIO()
    np.savez(buffer, counts=whole)
    assert attempt(buffer.getvalue()) == right


FIELDS = (
    *("choices", "routed_experts", "prompt_routed_experts", "usage", "message", "sglext", "response", "body", "status_code", "error"),
    *("meta_info", "prompt_tokens", "completion_tokens", "prompt_token_ids", "token_ids", "start", "data", "shape", "dtype"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | st.text(max_size=6) | st.just(made.npy_base64(IDS[:3])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


@FUZZ
@given(row=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1), shape=st.sampled_from([made.vllm_lines, made.sglang_lines]))
def test_any_response(row: dict[str, Any], shape: Any) -> None:
    first, second, *_ = shape(IDS)
    lines = (first, second | row, row, {"response": {"status_code": 200, "body": second | row}}, [first, row])
    attempt("\n".join(json.dumps(x) for x in lines).encode())
    attempt(json.dumps(row).encode())
    attempt(json.dumps([first, row, {"choices": [second | row, row]}], indent=1).encode())


CELLS = st.sampled_from(["0", "1", "2", "8", "-1", "0.5", "nan", "", "99999999999", "x", '"', "topk", "²"])


@FUZZ
@given(
    header=st.lists(st.sampled_from(["layer", "expert", "count", "tokens", "k", "model", "mode", "task"]), min_size=1, max_size=6),
    rows=st.lists(st.lists(CELLS, max_size=6), max_size=6),
)
def test_any_table(header: list[str], rows: list[list[str]]) -> None:
    text = "\n".join(",".join(row) for row in (["layer", "expert", *header], *rows))
    attempt(text.encode())


TENSORS = st.builds(torch.from_numpy, hnp.arrays(np.int32, st.one_of(SIZES, hnp.array_shapes(max_dims=4, max_side=4))))
RECORD = ["global_physical_count", "topk_ids_of_layer", "forward_mode"]
VALUES = st.recursive(
    TENSORS | st.none() | st.integers() | st.text(max_size=3) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(RECORD), inner),
    max_leaves=6,
)


@FUZZ
@given(dump=st.dictionaries(st.sampled_from(["logical_count", "records", "last_physical_to_logical_map"]), VALUES), base=st.booleans())
def test_any_dump(dump: dict[str, Any], base: bool) -> None:
    buffer = io.BytesIO()
    torch.save((made.sglang_per_token(IDS) if base else {}) | dump, buffer)
    attempt(buffer.getvalue())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FORMATS), cuts=st.one_of(st.just([]), CUTS))
def test_a_profile_is_whole_or_not_there(
    name: str, cuts: list[tuple[float, bytes, int]], valid: dict[str, bytes], model: Path, latency: Latency, tmp_path: Path
) -> None:
    (tmp_path / "routing").write_bytes(mutate(valid[name], cuts))
    out = tmp_path / "profile"
    shutil.rmtree(out, ignore_errors=True)
    try:
        import_profile(str(model), tmp_path / "routing", out, latency=latency)
    except RemoeError:
        assert cuts and not out.exists()
    else:
        assert {path.name for path in out.iterdir()} == {"profile.json", "arrays.safetensors"}
        assert read_profile(out).record.routing.source == "imported"

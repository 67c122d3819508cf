"""Products of quantised matrices straight from their bytes: those of the dequantised matrix, and nothing is read beside it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from remoe_cli.function.dequantise import STORED, FormError, Tensors, dequantise
from remoe_cli.function.errors import FunctionMemoryError, FunctionProcessorError
from remoe_cli.function.expert_ffn import narrow, widen
from remoe_cli.function.packed import PackedMatrix, library, refusal
from remoe_cli.function.ready import ReadyExperts, form_of
from remoe_cli.function.weights import ShardFile
from remoe_cli.model.checkpoint import find
from remoe_cli.model.quantise import INT4, INT8, Integers, quantise
from remoe_cli.model.shards import write_shards
from tests.support.families import save
from tests.support.quantised import save_quantised

ROOT = Path(__file__).parents[2]
FUNCTION = ROOT / "remoe_cli" / "function"


def matrix(rows: int, columns: int, scales: str = "U8", seed: int = 0) -> Tensors:
    """Random codes, and scales of trained models' sizes."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 256, (rows, columns // 32, 16), dtype=np.uint8)
    return {"codes": ("U8", codes), "scales": (scales, random.integers(112, 130, (rows, columns // 32), dtype=np.uint8))}


def nvfp4(rows: int, columns: int, seed: int, last: str = "multiplier") -> Tensors:
    """The same in groups of 16, whose scales are 8-bit floats times a number."""
    random = np.random.default_rng(seed)
    scales = random.integers(8, 0x7F, (rows, columns // 16), dtype=np.uint8)
    codes = random.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    return {"codes": ("U8", codes), "scales": ("F8_E4M3", scales), last: ("F32", np.array([0.00123 + seed], np.float32))}


def eight(codes: str, scales: str, down: int, across: int) -> Callable[[int, int, int], Tensors]:
    """Every code of 8 bits that is a number, under scales for `down` rows and `across` columns."""

    def make(rows: int, columns: int, seed: int) -> Tensors:
        random = np.random.default_rng(seed)
        every = (
            np.arange(256) if codes in ("I8", "I32") else np.array([x for x in range(256) if x & 127 < (0x7F if "4" in codes else 0x7C)])
        )
        drawn = random.permutation(np.resize(every, rows * columns)).reshape(rows, columns).astype(np.uint8)
        grid = random.uniform(1e-3, 1e-2, (-(-rows // down), -(-columns // across))).astype(np.float32)
        bits = {"F32": grid, "BF16": narrow(grid, "bfloat16"), "U8": random.integers(120, 130, grid.shape, dtype=np.uint8)}[scales]
        tensors = {"codes": (codes, drawn.view(STORED[codes])), "scales": (scales, bits)}
        return tensors | ({"shape": ("I64", np.array([rows, columns]))} if codes == "I32" else {})

    return make


def four(exact: bool) -> Callable[[int, int, int], Tensors]:
    def make(rows: int, columns: int, seed: int) -> Tensors:
        tensors = eight("I32", "BF16", 1, 32)(rows, columns // 2, seed)
        scales = np.resize(tensors["scales"][1], (rows, columns // 32)) & np.uint16(0xFFF8 if exact else 0xFFFF)
        return tensors | {"scales": ("BF16", scales), "shape": ("I64", np.array([rows, columns]))}

    return make


def on_request(to: Integers) -> Callable[[int, int, int], Tensors]:
    def make(rows: int, columns: int, seed: int) -> Tensors:
        return quantise(np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32), to, "bfloat16")

    return make


# By name: the form, what makes its tensors of rows, columns and a seed, and the library's number of the form.
FORMS: dict[str, tuple[str, Callable[[int, int, int], Tensors], int]] = {
    "MXFP4": ("fp4", lambda rows, columns, seed: matrix(rows, columns, seed=seed), 0),
    "INT4, exact": ("words", four(True), 1),
    "INT8, on request": ("int8", on_request(INT8), 2),
    "INT4, on request": ("words", on_request(INT4), 1),
    "INT4": ("words", four(False), 3),
    "INT8, a scale a row": ("int8", eight("I8", "BF16", 1, 1 << 20), 4),
    "INT8, blocks of 128 x 64": ("int8", eight("I8", "F32", 128, 64), 10),
    "INT8 in words": ("words", eight("I32", "BF16", 1, 64), 9),
    "FP8, blocks": ("fp8", eight("F8_E4M3", "F32", 128, 128), 5),
    "FP8, exponents": ("fp8", eight("F8_E4M3", "U8", 128, 128), 5),
    "FP8, one scale": ("fp8", eight("F8_E5M2", "F32", 1 << 20, 1 << 20), 6),
    "FP8, a scale a row": ("fp8", eight("F8_E4M3", "BF16", 1, 1 << 20), 5),
    "NVFP4": ("fp4", nvfp4, 7),
    "NVFP4, a divisor": ("fp4", lambda rows, columns, seed: nvfp4(rows, columns, seed, "divisor"), 7),
}


def weights(tensors: Tensors, form: str = "fp4") -> Any:
    return widen(dequantise(form, tensors, "bfloat16"), "bfloat16")


@pytest.mark.parametrize("kind", ["U8", "F8_E8M0"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 32])
def test_every_byte_under_every_scale_is_the_dequantised_weight(rows: int, kind: str) -> None:
    """Each row of x picks one column: by few rows and by many, exact. Larger scales make infinite weights."""
    scales = np.arange(253, dtype=np.uint8)
    codes = np.arange(256, dtype=np.uint8).repeat(len(scales))[:, None].repeat(16, axis=1)
    tensors = {"codes": ("U8", codes), "scales": (kind, np.tile(scales, 256)[:, None])}
    held = PackedMatrix.of([tensors], "fp4", 32, "bfloat16")
    columns = np.arange(rows) % 2
    assert np.array_equal(held.apply(np.eye(32, dtype=np.float32)[columns]), weights(tensors)[:, columns].T)


@pytest.mark.parametrize("name", FORMS)
def test_weights_of_every_form_are_the_dequantised_ones_to_the_bit(name: str) -> None:
    """Also in blocks that the edges cut, by few rows and by many; rounding to bfloat16 included."""
    form, make, number = FORMS[name]
    tensors = make(200, 224, 3)
    held = PackedMatrix.of([tensors], form, 224, "bfloat16")
    assert [part.number for part in held.parts] == [number]
    expected, picks = weights(tensors, form).T, np.eye(224, dtype=np.float32)
    assert np.array_equal(held.apply(picks), expected)
    for rows in (1, 2, 3, 4):
        assert all(np.array_equal(held.apply(picks[at : at + rows]), expected[at : at + rows]) for at in (0, 31, 100, 220))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (13, 800), (24, 1600)])
def test_products_are_those_of_the_dequantised_matrix(name: str, rows: int, columns: int) -> None:
    """Sizes that are no whole number of blocks, parts below each other, and every number of rows that is computed in its own way."""
    form, make, _ = FORMS[name]
    if name.startswith("FP8, b") and columns == 32:
        columns = 128
    parts = [make(rows, columns, 0), make(rows + 2, columns, 1)]
    whole = np.concatenate([weights(part, form) for part in parts]).astype(np.float64)
    held = PackedMatrix.of(parts, form, columns, "bfloat16")
    for n in (0, 1, 2, 3, 4, 5, 7, 9, 33):
        x = widen(narrow(np.random.default_rng(n).standard_normal((n, columns), dtype=np.float32), "bfloat16"), "bfloat16")
        mine, exact = held.apply(x), x.astype(np.float64) @ whole.T
        assert mine.shape == exact.shape
        # Half a step of bfloat16, and what the order of sums in float32 can make.
        bound = np.abs(exact) * 2**-8 + (np.abs(x).astype(np.float64) @ np.abs(whole).T) * columns * 2**-24
        assert (np.abs(mine - exact) <= bound).all()
        theirs = widen(narrow(exact.astype(np.float32), "bfloat16"), "bfloat16")
        assert (mine != theirs).sum() <= 0.01 * mine.size + 1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", ["INT8, on request", "INT4, on request"])
def test_models_of_other_types_have_integers_too(name: str, dtype: str) -> None:
    form, make, _ = FORMS[name]
    tensors, picks = make(20, 96, 0), np.eye(96, dtype=np.float32)
    expected = widen(dequantise(form, tensors, dtype), dtype)
    assert np.array_equal(PackedMatrix.of([tensors], form, 96, dtype).apply(picks), expected.T)
    small = tensors | {"scales": ("BF16", np.full_like(tensors["scales"][1], 0x3000))}  # 2 ** -31
    if dtype == "float16":
        with pytest.raises(FormError, match="not numbers of float16"):
            PackedMatrix.of([small], form, 96, dtype)


def test_what_does_not_fit_is_refused() -> None:
    good = matrix(8, 64)
    (_, codes), (_, scales) = good["codes"], good["scales"]
    for broken in (
        {"codes": ("U8", codes[:7]), "scales": ("U8", scales)},
        {"codes": ("U8", codes[:, :1]), "scales": ("U8", scales)},
        {"codes": ("U8", codes), "scales": ("U8", scales[:, 0])},
        {"codes": ("U8", codes[:0]), "scales": ("U8", scales[:0])},
    ):
        with pytest.raises(FormError, match=r"do not fit|no packed product"):
            PackedMatrix.of([broken], "fp4", 64, "bfloat16")
    words, integers = four(True)(8, 64, 0), quantise(np.ones((8, 64), np.float32), INT8, "bfloat16")
    for form, good_one in (("words", words), ("int8", integers)):
        kind, whole = good_one["codes"]
        PackedMatrix.of([good_one], form, 64, "bfloat16")
        for codes in (
            whole[:, : whole.shape[1] // 2],
            whole[:, :-1],
            whole[:, :0],
            np.tile(whole, 3),
            whole[:, 0],
            whole.ravel(),
            whole[..., None],
        ):
            with pytest.raises(FormError, match=r"do not (hold|fit)|no packed product"):
                PackedMatrix.of([{**good_one, "codes": (kind, np.ascontiguousarray(codes))}], form, 64, "bfloat16")
    for wide in (matrix(8, 96), nvfp4(8, 32, 0)):
        with pytest.raises(FormError, match="scales for 64 weights have no packed product"):
            PackedMatrix.of([good, wide], "fp4", 64, "bfloat16")
    with pytest.raises(FormError, match="no parts"):
        PackedMatrix.of([], "fp4", 64, "bfloat16")
    with pytest.raises(FormError, match="rows of width 32 do not fit a matrix of 64 columns"):
        PackedMatrix.of([good], "fp4", 64, "bfloat16").apply(np.zeros((1, 32), np.float32))


def described(tensors: Tensors) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {role: (kind, array.shape) for role, (kind, array) in tensors.items()}


def test_forms_without_a_packed_product_are_named() -> None:
    for form, make, _ in FORMS.values():
        tensors = described(make(128, 128, 0))
        assert refusal(form, tensors, 128, "bfloat16") is None
        no_scales = {role: entry for role, entry in tensors.items() if role != "scales"}
        half = tensors | {"scales": ("F16", tensors["scales"][1])}
        assert refusal(form, no_scales, 128, "bfloat16") == f"{form} with scales in no type has no packed product"
        assert refusal(form, half, 128, "bfloat16") == f"{form} with scales in F16 has no packed product"
        assert "not a multiple of 32" in str(refusal(form, tensors, 120, "bfloat16"))
    zeros = described(four(False)(8, 64, 0)) | {"zero_points": ("I32", (1, 2))}
    assert "no packed product" in str(refusal("words", zeros, 64, "bfloat16"))
    assert "not float16" in str(refusal("fp4", described(matrix(8, 64)), 64, "float16"))
    assert "not float32" in str(refusal("fp8", described(eight("F8_E4M3", "F32", 1, 64)(8, 64, 0)), 64, "float32"))
    thirds = described(eight("F8_E4M3", "F32", 1, 96)(8, 768, 0))
    assert refusal("fp8", thirds, 768, "bfloat16") == "8 scales for 768 weights have no packed product"


def test_the_library_refuses_sizes_that_its_bytes_do_not_hold() -> None:
    tensors = matrix(8, 64)
    codes, scales = tensors["codes"][1], tensors["scales"][1]
    halves, x = np.zeros(256, np.float32), np.ones((1, 64), np.float32)
    good = {"form": 0, "codes_bytes": 256, "scales_bytes": 16, "down": 0, "across": 0, "out": 8, "in": 64, "rows": 1, "stride": 8}
    changes: list[dict[str, int]] = [{}, {"codes_bytes": 255}, {"scales_bytes": 15}, {"out": 9}, {"out": 0}, {"out": -8}, {"in": 96}]
    changes += [{"in": 40, "codes_bytes": 160, "scales_bytes": 8}, {"in": 0}, {"rows": -1}, {"stride": 7}, {"out": 1 << 62, "in": 1 << 62}]
    changes += [{"form": -1}, {"form": 11}, {"form": 1}, {"form": 2}, {"down": 1}, {"across": 1}, {"down": -1}, {"across": 25}]
    changes += [{"form": 7}, {"form": 7, "scales_bytes": 32, "down": 1}, {"form": 5, "codes_bytes": 512}]
    for change in changes:
        s, y = good | change, np.full(8, 7, np.float32)
        status = library().remoe_packed_product(
            *(s["form"], codes.ctypes.data, s["codes_bytes"], scales.ctypes.data, s["scales_bytes"], halves.ctypes.data),
            *(s["down"], s["across"], s["out"], s["in"], x.ctypes.data, s["rows"], y.ctypes.data, s["stride"]),
        )
        assert status == (1 if change else 0) and (y == (7 if change else 0)).all()


# Every array ends where the process may read no more, or begins there.
_GUARDED = """
import ctypes, mmap, sys
import numpy as np
from remoe_cli.function.packed import library

libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
kept = []

def guarded(array, at_end):
    inner = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for edge in (0, page + inner):
        assert libc.mprotect(ctypes.c_void_p(address + edge), ctypes.c_size_t(page), 0) == 0
    start = address + page + (inner - array.nbytes if at_end else 0)
    ctypes.memmove(start, array.ctypes.data, array.nbytes)
    kept.append(memory)
    return start

# Codes and scales that make each weight 1/4 on average: by form, a byte of codes, weights in a byte, and the scale.
FORMS = ((0, 1, 2, "b"), (1, 0x89, 2, "h"), (2, 1, 1, "h"), (3, 0x89, 2, "h"), (4, 1, 1, "h"), (5, 0x38, 1, "f"), (6, 0x3C, 1, "g"),
         (7, 1, 2, "p"), (8, 0x81, 1, "h"), (9, 0x81, 1, "h"), (10, 1, 1, "g"))
for form, code, in_byte, kind in FORMS:
    for out, width in ((1, 32), (14, 800), (24, 1568)):
        groups, down, across = width // 32, *((3, 2) if kind in "fg" else (0, 0))
        count = -(-out // 8) * -(-groups // 4) if kind in "fg" else out * groups
        quarter = 1.0 if in_byte == 2 else 0.5
        scale = {
            "b": np.full(count, 127, np.uint8),
            "p": np.full(2 * count, 127, np.uint8),
            "h": np.full(count, 0x3F00 if in_byte == 2 else 0x3E80, np.uint16),
            "f": np.full(count, 64, np.float32),
            "g": np.full(count, 0.25, np.float32),
        }[kind]
        for rows in (1, 2, 3, 4, 5, 8):
            for at_end in (False, True):
                codes = np.full(out * width // in_byte, code, np.uint8)
                halves, x, y = np.full(256, 0.5, np.float32), np.ones(rows * width, np.float32), np.zeros(rows * out, np.float32)
                at = [guarded(array, at_end) for array in (codes, scale, halves, x, y)]
                args = (form, at[0], codes.nbytes, at[1], scale.nbytes, at[2], down, across, out, width, at[3], rows, at[4], out)
                assert library().remoe_packed_product(*args) == 0, form
                sums = np.ctypeslib.as_array(ctypes.cast(at[4], ctypes.POINTER(ctypes.c_float)), (rows * out,))
                assert (sums == width / 4).all(), (form, sums[0], width)
print("whole")
sys.stdout.flush()
import os; os._exit(0)
"""


def test_nothing_is_read_or_written_beside_the_arrays() -> None:
    done = subprocess.run([sys.executable, "-c", _GUARDED], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr


def test_a_processor_without_what_it_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = library.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace(remoe_packed_runs_here=lambda: 0))
        with pytest.raises(FunctionProcessorError, match="need a processor with AVX2, FMA and F16C"):
            fresh()
    with monkeypatch.context() as patch:
        patch.setattr(os, "uname", lambda: SimpleNamespace(machine="riscv64"))
        with pytest.raises(FunctionProcessorError, match="run on x86_64 and aarch64, and there is no library for riscv64"):
            fresh()


def test_the_libraries_are_those_that_were_built_from_the_source() -> None:
    """`make kernel` builds them again and says whether the bytes are the same."""
    lines = [line.split("  ") for line in (FUNCTION / "kernel" / "SHA256SUMS").read_text().splitlines()]
    libraries = {"packed-x86_64.so": 62, "packed-aarch64.so": 183, "products-x86_64.so": 62}
    assert {name for _, name in lines} == {"kernel/build.py", "kernel/packed.c", "kernel/products.c", *libraries}
    for digest, name in lines:
        assert hashlib.sha256((FUNCTION / name).read_bytes()).hexdigest() == digest, f"{name} has changed: run 'make kernel'"
    for name, number in libraries.items():  # the processor in the head of an ELF file
        assert (FUNCTION / name).read_bytes()[18] == number


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardFile]:
    made = {}
    for family, form in (("gpt_oss", "mxfp4"), ("qwen3_moe", "fp8")):
        folder = tmp_path_factory.mktemp(form)
        save_quantised(family, form, folder / "model")
        (written,) = write_shards(find(str(folder / "model")), {0: (range(8),)}, 1, folder)
        made[form] = ShardFile(written.path)
    save("qwen3_moe", torch.bfloat16, folder / "plain", fused=False)
    (written,) = write_shards(find(str(folder / "plain")), {0: (range(2),)}, 1, folder / "model")
    return made | {"plain": ShardFile(written.path)}


@pytest.mark.parametrize("form", ["mxfp4", "fp8"])
def test_a_packed_expert_answers_as_a_ready_one_in_the_memory_of_its_shard(shards: dict[str, ShardFile], form: str) -> None:
    shard = shards[form]
    ready, held = ReadyExperts(shard, float("inf")), ReadyExperts(shard, shard.head.stored_bytes(0), "packed")
    random, width = np.random.default_rng(0), ready.get(0).width
    for n, expert in product((1, 3, 9), range(8)):
        x = narrow(random.standard_normal((n, width), dtype=np.float32), "bfloat16")
        mine, theirs = (widen(some.get(expert).run(x), "bfloat16") for some in (held, ready))
        assert np.abs(mine - theirs).max() <= 2**-7 * np.abs(theirs).max() and (mine != theirs).mean() < 0.05
    assert held.ids == tuple(range(8)) and all(held.get(e).weights_bytes <= 4 * 12 for e in range(8))  # 12 scales of FP8 as float32
    assert ready.get(0).weights_bytes > 1.8 * shard.head.stored_bytes(0) > 0
    with pytest.raises(FunctionMemoryError):
        ReadyExperts(shard, shard.head.stored_bytes(0) - 1, "packed")


def test_a_packed_function_of_another_form_does_not_start(shards: dict[str, ShardFile]) -> None:
    with pytest.raises(FunctionProcessorError, match="cannot be packed: down_proj of expert 0: it is not quantised"):
        ReadyExperts(shards["plain"], float("inf"), "packed")
    assert ReadyExperts(shards["plain"], float("inf")).get(0).weights_bytes


def test_the_form_is_one_that_there_is() -> None:
    assert (form_of({}), form_of({"REMOE_EXPERTS": "packed"})) == ("ready", "packed")
    with pytest.raises(FunctionProcessorError, match="REMOE_EXPERTS is 'fast', and experts are ready or packed"):
        form_of({"REMOE_EXPERTS": "fast"})

"""Products of MXFP4 matrices straight from their bytes: those of the dequantised matrix, and nothing is read beside it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from remoe_cli.function.dequantise import FormError, Tensors, dequantise
from remoe_cli.function.errors import FunctionMemoryError, FunctionProcessorError
from remoe_cli.function.expert_ffn import narrow, widen
from remoe_cli.function.packed import PackedMatrix, library, refusal
from remoe_cli.function.ready import ReadyExperts, form_of
from remoe_cli.function.weights import ShardFile
from remoe_cli.model.checkpoint import find
from remoe_cli.model.shards import write_shards
from tests.support.quantised import save_quantised

ROOT = Path(__file__).parents[2]
FUNCTION = ROOT / "remoe_cli" / "function"


def matrix(rows: int, columns: int, scales: str = "U8", seed: int = 0) -> Tensors:
    """Random codes, and scales of trained models' sizes."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 256, (rows, columns // 32, 16), dtype=np.uint8)
    return {"codes": ("U8", codes), "scales": (scales, random.integers(112, 130, (rows, columns // 32), dtype=np.uint8))}


def weights(tensors: Tensors) -> Any:
    return widen(dequantise("fp4", tensors, "bfloat16"), "bfloat16")


@pytest.mark.parametrize("kind", ["U8", "F8_E8M0"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 32])
def test_every_byte_under_every_scale_is_the_dequantised_weight(rows: int, kind: str) -> None:
    """Each row of x picks one column: by few rows and by many, exact. Larger scales make infinite weights."""
    scales = np.arange(253, dtype=np.uint8)
    codes = np.arange(256, dtype=np.uint8).repeat(len(scales))[:, None].repeat(16, axis=1)
    tensors = {"codes": ("U8", codes), "scales": (kind, np.tile(scales, 256)[:, None])}
    held = PackedMatrix.of([tensors], "fp4", "bfloat16")
    columns = np.arange(rows) % 2
    assert np.array_equal(held.apply(np.eye(32, dtype=np.float32)[columns]), weights(tensors)[:, columns].T)


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (7, 96), (13, 800), (24, 1600)])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 6, 7, 9, 33])
def test_products_are_those_of_the_dequantised_matrix(rows: int, columns: int, n: int) -> None:
    """Sizes that are no whole number of blocks, parts below each other, and every number of rows that is computed in its own way."""
    parts = [matrix(rows, columns), matrix(rows + 2, columns, seed=1)]
    x = widen(narrow(np.random.default_rng(2).standard_normal((n, columns), dtype=np.float32), "bfloat16"), "bfloat16")
    mine = PackedMatrix.of(parts, "fp4", "bfloat16").apply(x)
    whole = np.concatenate([weights(part) for part in parts]).astype(np.float64)
    exact = x.astype(np.float64) @ whole.T
    assert mine.shape == exact.shape
    # Half a step of bfloat16, and what the order of sums in float32 can make.
    bound = np.abs(exact) * 2**-8 + (np.abs(x).astype(np.float64) @ np.abs(whole).T) * columns * 2**-24
    assert (np.abs(mine - exact) <= bound).all()
    theirs = widen(narrow(exact.astype(np.float32), "bfloat16"), "bfloat16")
    assert (mine != theirs).sum() <= 0.01 * mine.size + 1


def test_what_does_not_fit_is_refused() -> None:
    good = matrix(8, 64)
    (_, codes), (_, scales) = good["codes"], good["scales"]
    for broken in (
        {"codes": ("U8", codes[:7]), "scales": ("U8", scales)},
        {"codes": ("U8", codes[:, :1]), "scales": ("U8", scales)},
        {"codes": ("U8", codes), "scales": ("U8", scales[0])},
        {"codes": ("U8", codes[:0]), "scales": ("U8", scales[:0])},
    ):
        with pytest.raises(FormError, match="do not fit"):
            PackedMatrix.of([broken], "fp4", "bfloat16")
    for parts in ([good, matrix(8, 96)], [good, matrix(8, 64, "F8_E8M0")]):
        with pytest.raises(FormError, match="differ in width or in the type"):
            PackedMatrix.of(parts, "fp4", "bfloat16")
    with pytest.raises(FormError, match="no parts"):
        PackedMatrix.of([], "fp4", "bfloat16")
    with pytest.raises(FormError, match="rows of width 32 do not fit a matrix of 64 columns"):
        PackedMatrix.of([good], "fp4", "bfloat16").apply(np.zeros((1, 32), np.float32))


def test_forms_without_a_packed_product_are_named() -> None:
    assert refusal("fp4", {"codes": "U8", "scales": "U8"}, "bfloat16") is None
    for form, types in product(("fp8", "int8", "words", "fp4"), ({"codes": "U8", "scales": "F32"}, {"codes": "U8"})):
        assert f"{form} with scales in" in str(refusal(form, types, "bfloat16"))
    assert "no packed product" in str(refusal("fp4", {"codes": "U8", "scales": "U8", "multiplier": "F32"}, "bfloat16"))
    assert "not float16" in str(refusal("fp4", {"codes": "U8", "scales": "U8"}, "float16"))


def test_the_library_refuses_sizes_that_its_bytes_do_not_hold() -> None:
    tensors = matrix(8, 64)
    codes, scales = tensors["codes"][1], tensors["scales"][1]
    halves, x = np.zeros(256, np.float32), np.ones((1, 64), np.float32)
    good = {"codes_bytes": 256, "scales_bytes": 16, "out": 8, "in": 64, "rows": 1, "stride": 8}
    changes: list[dict[str, int]] = [{}, {"codes_bytes": 255}, {"scales_bytes": 15}, {"out": 9}, {"out": 0}, {"out": -8}, {"in": 96}]
    changes += [{"in": 40, "codes_bytes": 160, "scales_bytes": 8}, {"in": 0}, {"rows": -1}, {"stride": 7}, {"out": 1 << 62, "in": 1 << 62}]
    for change in changes:
        s, y = good | change, np.full(8, 7, np.float32)
        status = library().remoe_mxfp4_product(
            *(codes.ctypes.data, s["codes_bytes"], scales.ctypes.data, s["scales_bytes"], halves.ctypes.data, s["out"], s["in"]),
            *(x.ctypes.data, s["rows"], y.ctypes.data, s["stride"]),
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

for out, width in ((1, 32), (14, 800), (24, 1568)):
    for rows in (1, 2, 3, 4, 5, 8):
        for at_end in (False, True):
            codes, scales = np.ones(out * width // 2, np.uint8), np.full(out * width // 32, 127, np.uint8)
            halves, x, y = np.full(256, 0.5, np.float32), np.ones(rows * width, np.float32), np.zeros(rows * out, np.float32)
            at = [guarded(array, at_end) for array in (codes, scales, halves, x, y)]
            args = (at[0], codes.nbytes, at[1], scales.nbytes, at[2], out, width, at[3], rows, at[4], out)
            assert library().remoe_mxfp4_product(*args) == 0
            sums = np.ctypeslib.as_array(ctypes.cast(at[4], ctypes.POINTER(ctypes.c_float)), (rows * out,))
            assert (sums == width / 4).all()  # the code 1 is 0.5, in every second place
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
        patch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace(remoe_mxfp4_runs_here=lambda: 0))
        with pytest.raises(FunctionProcessorError, match="need a processor with AVX2 and FMA"):
            fresh()
    with monkeypatch.context() as patch:
        patch.setattr(os, "uname", lambda: SimpleNamespace(machine="riscv64"))
        with pytest.raises(FunctionProcessorError, match="run on x86_64 and aarch64, and there is no library for riscv64"):
            fresh()


def test_the_libraries_are_those_that_were_built_from_the_source() -> None:
    """`make kernel` builds them again and says whether the bytes are the same."""
    lines = [line.split("  ") for line in (FUNCTION / "kernel" / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in lines} == {*("kernel/build.py", "kernel/mxfp4.c", "mxfp4-aarch64.so", "mxfp4-x86_64.so")}
    for digest, name in lines:
        assert hashlib.sha256((FUNCTION / name).read_bytes()).hexdigest() == digest, f"{name} has changed: run 'make kernel'"
    for machine, number in (("x86_64", 62), ("aarch64", 183)):  # the processor in the head of an ELF file
        assert (FUNCTION / f"mxfp4-{machine}.so").read_bytes()[18] == number


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardFile]:
    made = {}
    for family, form in (("gpt_oss", "mxfp4"), ("qwen3_moe", "fp8")):
        folder = tmp_path_factory.mktemp(form)
        save_quantised(family, form, folder / "model")
        (written,) = write_shards(find(str(folder / "model")), {0: (range(8),)}, 1, folder)
        made[form] = ShardFile(written.path)
    return made


def test_a_packed_expert_answers_as_a_ready_one_in_the_memory_of_its_shard(shards: dict[str, ShardFile]) -> None:
    shard = shards["mxfp4"]
    ready, held = ReadyExperts(shard, float("inf")), ReadyExperts(shard, shard.head.stored_bytes(0), "packed")
    random = np.random.default_rng(0)
    for n, expert in product((1, 3, 9), range(8)):
        x = narrow(random.standard_normal((n, 64), dtype=np.float32), "bfloat16")
        mine, theirs = (widen(some.get(expert).run(x), "bfloat16") for some in (held, ready))
        assert np.abs(mine - theirs).max() <= 2**-7 * np.abs(theirs).max() and (mine != theirs).mean() < 0.05
    assert held.ids == tuple(range(8)) and all(held.get(e).weights_bytes == 0 for e in range(8))
    assert ready.get(0).weights_bytes > 3 * shard.head.stored_bytes(0) > 0
    with pytest.raises(FunctionMemoryError):
        ReadyExperts(shard, shard.head.stored_bytes(0) - 1, "packed")


def test_a_packed_function_of_another_form_does_not_start(shards: dict[str, ShardFile]) -> None:
    message = r"cannot be packed: down_proj of expert 0: fp8 with scales in F32 has no packed product"
    with pytest.raises(FunctionProcessorError, match=message):
        ReadyExperts(shards["fp8"], float("inf"), "packed")
    assert ReadyExperts(shards["fp8"], float("inf")).get(0).weights_bytes


def test_the_form_is_one_that_there_is() -> None:
    assert (form_of({}), form_of({"REMOE_EXPERTS": "packed"})) == ("ready", "packed")
    with pytest.raises(FunctionProcessorError, match="REMOE_EXPERTS is 'fast', and experts are ready or packed"):
        form_of({"REMOE_EXPERTS": "fast"})

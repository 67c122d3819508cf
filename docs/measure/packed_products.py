"""Prints the tables of ADR 11: products of matrices of gpt-oss-20b's sizes, stored in MXFP4 by the ways that were weighed, and in others by
our library.

`make measure` runs it. Ways of libraries that remoe does not use are printed where they are installed, in an environment of their own:
pip install onnx onnxruntime libggml-python numkong numpy pybase64, then PYTHONPATH=. python docs/measure/packed_products.py. All ways take
turns over several matrices, so that weights come from memory. Weights are random, sizes are real. Functions compute with one thread: times
are the processor's, which other work on the machine changes least. With the argument avx2, numkong uses nothing newer. The argument forms
measures the other forms, and nothing else.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import ctypes
import importlib.util
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numkong
import numpy as np

from remoe_cli.function.dequantise import STORED, Stored, dequantise, eight_bits
from remoe_cli.function.expert_ffn import FfnSpec, Matrix, narrow, rounded, widen
from remoe_cli.function.packed import PackedMatrix
from remoe_cli.model.quantise import INT4, INT8, Integers, quantise

SIZES, ROWS, MATRICES = ((5760, 2880), (2880, 2880)), (1, 2, 4, 8, 32, 128), 5
SPEC = FfnSpec("bfloat16", "standard")
NEWER = ("genoa", "sapphire", "turin", "sapphireamx", "graniteamx", "diamond", "skylake", "icelake")  # than AVX2
_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])  # what the codes stand for
Way = Callable[[np.ndarray], np.ndarray]
Made = dict[str, Stored]


def stored(codes: np.ndarray, scales: np.ndarray) -> dict[str, tuple[str, np.ndarray]]:
    return {"codes": ("U8", codes), "scales": ("U8", scales)}


def packed(codes: np.ndarray, scales: np.ndarray) -> tuple[Way, int]:
    return PackedMatrix.of([stored(codes, scales)], "fp4", scales.shape[1] * 32, "bfloat16").apply, codes.nbytes + scales.nbytes


def ready(codes: np.ndarray, scales: np.ndarray) -> tuple[Way, int]:
    matrix = Matrix.of(dequantise("fp4", stored(codes, scales), "bfloat16"), SPEC)
    return matrix.apply, matrix.held_bytes


def blocks(codes: np.ndarray, scales: np.ndarray) -> tuple[Way, int]:
    """Dequantise blocks that fit the cache for each product, and multiply them with numkong."""
    step = 128

    def run(x: np.ndarray) -> np.ndarray:
        some = (slice(at, at + step) for at in range(0, len(codes), step))
        return np.concatenate(
            [Matrix.of(dequantise("fp4", stored(codes[rows], scales[rows]), "bfloat16"), SPEC).apply(x) for rows in some], axis=1
        )

    return run, codes.nbytes + scales.nbytes


def numpy_table(codes: np.ndarray, scales: np.ndarray) -> tuple[Way, int]:
    def run(x: np.ndarray) -> np.ndarray:
        return rounded(x @ widen(dequantise("fp4", stored(codes, scales), "bfloat16"), "bfloat16").T, "bfloat16")

    return run, codes.nbytes + scales.nbytes


def onnxruntime_8_bits(codes: np.ndarray, scales: np.ndarray) -> tuple[Way, int]:
    """MatMulNBits has 4 and 8 bits of whole numbers. Twice the numbers of MXFP4 are whole, and need 5 bits: so 8."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    out, inn = len(codes), scales.shape[1] * 32
    flat = codes.reshape(out, -1)
    whole = np.empty((out, inn), np.uint8)
    whole[:, 0::2], whole[:, 1::2] = _DOUBLED[flat & 15] + 128, _DOUBLED[flat >> 4] + 128
    halves = (eight_bits("U8")[scales] / 2).astype(np.float32)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=inn, N=out, bits=8, block_size=32, accuracy_level=1
    )
    held = [numpy_helper.from_array(whole.reshape(out, inn // 32, 32), "w"), numpy_helper.from_array(halves.reshape(-1), "s")]
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", inn])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", out])],
        held,
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: rounded(session.run(None, {"x": x})[0], "bfloat16"), whole.nbytes + halves.nbytes


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def ggml(codes: np.ndarray, scales: np.ndarray) -> tuple[Way, int]:
    """ggml's product of MXFP4, which rounds x to 8 bits. Its blocks have another order of the same bytes."""
    folder = Path(str(importlib.util.find_spec("libggml").submodule_search_locations[0])) / "lib64"  # type: ignore[union-attr, index]
    base, cpu = (ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in ("libggml-base.so", "libggml-cpu.so"))
    for name in ("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph", "ggml_get_data"):
        getattr(base, name).restype = ctypes.c_void_p
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    base.ggml_init.argtypes, base.ggml_new_tensor_2d.argtypes = [_InitParams], [pointer, ctypes.c_int, number, number]
    base.ggml_mul_mat.argtypes, base.ggml_new_graph.argtypes = [pointer] * 3, [pointer]
    base.ggml_build_forward_expand.argtypes, base.ggml_get_data.argtypes = [pointer] * 2, [pointer]
    cpu.ggml_graph_compute_with_ctx.argtypes = [pointer, pointer, ctypes.c_int]
    base.ggml_free.argtypes = base.ggml_reset.argtypes = [pointer]
    out, inn, f32, mxfp4 = len(codes), scales.shape[1] * 32, 0, 39
    flat = codes.reshape(out, -1, 16)
    apart = np.empty((*flat.shape[:2], 32), np.uint8)
    apart[..., 0::2], apart[..., 1::2] = flat & 15, flat >> 4
    made = np.concatenate([scales[..., None], apart[..., :16] | apart[..., 16:] << 4], axis=2)
    weights_context = base.ggml_init(_InitParams(made.nbytes + (1 << 16), None, False))
    w = base.ggml_new_tensor_2d(weights_context, mxfp4, inn, out)
    ctypes.memmove(base.ggml_get_data(w), made.ctypes.data, made.nbytes)
    context = base.ggml_init(_InitParams(64 << 20, None, False))

    def run(x: np.ndarray) -> np.ndarray:
        base.ggml_reset(context)
        given = base.ggml_new_tensor_2d(context, f32, inn, len(x))
        ctypes.memmove(base.ggml_get_data(given), x.ctypes.data, x.nbytes)
        product = base.ggml_mul_mat(context, w, given)
        graph = base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, product)
        assert cpu.ggml_graph_compute_with_ctx(context, graph, 1) == 0
        y = np.empty((len(x), out), np.float32)
        ctypes.memmove(y.ctypes.data, base.ggml_get_data(product), y.nbytes)
        return rounded(y, "bfloat16")

    return run, made.nbytes


WAYS: dict[str, tuple[str | None, Callable[[np.ndarray, np.ndarray], tuple[Way, int]]]] = {
    "packed (chosen)": (None, packed),
    "ready: numkong, bfloat16": (None, ready),
    "numkong, dequantised in blocks": (None, blocks),
    "numpy, dequantised each time": (None, numpy_table),
    "onnxruntime, MatMulNBits of 8 bits": ("onnxruntime", onnxruntime_8_bits),
    "ggml": ("libggml", ggml),
}


def other_forms(random: np.random.Generator, out: int, inn: int) -> dict[str, tuple[str, Callable[[], Made]]]:
    """By name, the form and what makes random tensors of it."""

    def eight(kind: str) -> Made:
        codes = random.integers(0, 127, (out, inn), dtype=np.uint8) | random.integers(0, 2, (out, inn), dtype=np.uint8) << 7
        return {"codes": (kind, codes.view(STORED[kind]))}

    def blocks_of_128() -> np.ndarray:
        return random.uniform(1e-4, 1e-3, (-(-out // 128), -(-inn // 128))).astype(np.float32)

    def groups(columns: int, low: int = 0x3800) -> np.ndarray:
        return random.integers(low, low + 256, (out, inn // columns), dtype=np.uint16)

    def words() -> Made:
        return {
            "codes": ("I32", random.integers(-(1 << 31), 1 << 31, (out, inn // 8)).astype(np.int32)),
            "shape": ("I64", np.array([out, inn])),
        }

    def nvfp4() -> Made:
        scales = random.integers(0x30, 0x70, (out, inn // 16), dtype=np.uint8)
        codes = random.integers(0, 256, (out, inn // 2), dtype=np.uint8)
        return {"codes": ("U8", codes), "scales": ("F8_E4M3", scales), "multiplier": ("F32", np.array([1e-4], np.float32))}

    weights = random.standard_normal((out, inn), dtype=np.float32)
    return {
        "INT8 on request": ("int8", lambda: quantise(weights, INT8, "bfloat16")),
        "INT4 on request": ("words", lambda: quantise(weights, INT4, "bfloat16")),
        "INT8, a scale a row": ("int8", lambda: eight("I8") | {"scales": ("BF16", groups(inn))}),
        "INT4, groups of 32": ("words", lambda: words() | {"scales": ("BF16", groups(32))}),
        "FP8 (E4M3), blocks": ("fp8", lambda: eight("F8_E4M3") | {"scales": ("F32", blocks_of_128())}),
        "NVFP4": ("fp4", nvfp4),
    }


def errors(random: np.random.Generator, to: Integers) -> str:
    """Compare the error of scales of few digits with that of any scales, as a share of the weights' root mean square."""
    weights = random.standard_normal((1024, 2880), dtype=np.float32)
    half = 1 << (to.bits - 1)
    any_scale = np.abs(weights.reshape(-1, 32)).max(axis=1)[:, None] / (half - 0.5)
    plain = (np.clip(np.rint(weights.reshape(-1, 32) / any_scale), -half, half - 1) * any_scale).reshape(weights.shape)
    ours = widen(dequantise(to.form, quantise(weights, to, "bfloat16"), "bfloat16"), "bfloat16")
    of_any, of_few = (float(np.sqrt(np.square(made - weights).mean() / np.square(weights).mean())) for made in (plain, ours))
    return f"error {of_few:.2%} of the weights, with any scales {of_any:.2%}"


def forms(random: np.random.Generator) -> None:
    """Print the time of products of other forms, beside those of the same numbers made ready."""
    out, inn = SIZES[0]
    print(f"| {out} x {inn} | MB |", *(f"{n} rows |" for n in ROWS))
    print("| --- " * (len(ROWS) + 2) + "|")
    for name, (form, make) in other_forms(random, out, inn).items():
        made = [make() for _ in range(MATRICES)]
        held = {
            f"{name}, packed": [PackedMatrix.of([one], form, inn, "bfloat16").apply for one in made],
            f"{name}, ready": [Matrix.of(dequantise(form, one, "bfloat16"), SPEC).apply for one in made],
        }
        megabytes = {
            way: sum(array.nbytes for _, array in made[0].values()) / 1e6 if "packed" in way else out * inn * 2 / 1e6 for way in held
        }
        cells: dict[str, list[str]] = {way: [] for way in held}
        for n in ROWS:
            x = widen(narrow(random.standard_normal((n, inn), dtype=np.float32), "bfloat16"), "bfloat16")
            times: dict[str, list[float]] = {way: [] for way in held}
            for turn in list(range(MATRICES)) * (1 if n > 8 else 4):
                for way, runs in held.items():
                    start = time.process_time()
                    runs[turn](x)
                    times[way].append(1000 * (time.process_time() - start))
            for way in held:
                cells[way].append(f"{statistics.median(times[way]):.2f} |")
        for way in held:
            print(f"| {way} | {megabytes[way]:.1f} |", *cells[way], flush=True)
    print()
    for to in (INT8, INT4):
        print(f"{to.name}: {errors(random, to)}")


def main() -> None:
    if "avx2" in sys.argv[1:]:
        for capability in NEWER:
            numkong.disable_capability(capability)
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores; ms a product, median\n")
    ways = {name: make for name, (package, make) in WAYS.items() if package is None or importlib.util.find_spec(package)}
    random = np.random.default_rng(0)
    if "forms" in sys.argv[1:]:
        forms(random)
        return
    for out, inn in SIZES:
        print(f"| {out} x {inn} | MB |", *(f"{n} rows |" for n in ROWS), "not the nearest bfloat16 |")
        print("| --- " * (len(ROWS) + 3) + "|")
        made = [
            (random.integers(0, 256, (out, inn // 32, 16), dtype=np.uint8), random.integers(116, 121, (out, inn // 32), dtype=np.uint8))
            for _ in range(MATRICES)
        ]
        held: dict[str, list[tuple[Way, int]]] = {name: [make(*one) for one in made] for name, make in ways.items()}
        exact = widen(dequantise("fp4", stored(*made[-1]), "bfloat16"), "bfloat16").astype(np.float64)
        cells: dict[str, list[str]] = {name: [] for name in ways}
        wrong: dict[str, Any] = dict.fromkeys(ways, 0)
        numbers = 0
        for n in ROWS:
            x = widen(narrow(random.standard_normal((n, inn), dtype=np.float32), "bfloat16"), "bfloat16")
            nearest = narrow((x.astype(np.float64) @ exact.T).astype(np.float32), "bfloat16")
            numbers += nearest.size
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(1 if n > 8 else 4):
                for turn in range(MATRICES):
                    for name in ways:
                        run = held[name][turn][0]
                        start = time.process_time()
                        y = run(x)
                        times[name].append(1000 * (time.process_time() - start))
                        if turn == MATRICES - 1 and len(times[name]) == MATRICES:
                            wrong[name] += int((narrow(y, "bfloat16") != nearest).sum())
            for name in ways:
                cells[name].append(f"{statistics.median(times[name]):.2f} |")
        for name in ways:
            print(f"| {name} | {held[name][0][1] / 1e6:.1f} |", *cells[name], f"{wrong[name]:,} of {numbers:,} |")
        print()


if __name__ == "__main__":
    main()

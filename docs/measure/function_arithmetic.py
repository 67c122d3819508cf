"""Prints the tables of ADR 3: one expert's time in a function, by arithmetic and rows, and how close to torch it is.

`make measure` runs it.

All in one run, one thread (the processor's time), medians of interleaved repetitions over several experts, so that weights come from
memory. What a function takes here is marked.
`ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2` before the command holds torch to AVX2; numkong takes what the CPU has.
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import numpy as np
import torch

from remoe_cli.function.expert_ffn import Expert, FfnSpec, Matrix, OrderedMatrix, Product, narrow, widen
from remoe_cli.function.products import are_needed, orders

torch.set_num_threads(1)
BF16 = FfnSpec("bfloat16", "standard")


def torch_expert(tensors: dict[str, np.ndarray]) -> Callable[[np.ndarray], object]:
    up, down = (torch.from_numpy(tensors[n].copy()).view(torch.bfloat16) for n in ("gate_up_proj", "down_proj"))

    def run(rows: np.ndarray) -> object:
        gate, value = torch.nn.functional.linear(torch.from_numpy(rows).view(torch.bfloat16), up).chunk(2, dim=-1)
        return torch.nn.functional.linear(torch.nn.functional.silu(gate) * value, down)

    return run


def numpy_widened_once(tensors: dict[str, np.ndarray]) -> Callable[[np.ndarray], object]:
    """float32 copies are kept: twice the memory of the weights. Rounds where the others do."""
    up, down = (widen(tensors[n], "bfloat16") for n in ("gate_up_proj", "down_proj"))
    return lambda rows: _numpy(widen(rows, "bfloat16"), up, down)


def numpy_widened_each_call(tensors: dict[str, np.ndarray]) -> Callable[[np.ndarray], object]:
    return lambda rows: _numpy(widen(rows, "bfloat16"), widen(tensors["gate_up_proj"], "bfloat16"), widen(tensors["down_proj"], "bfloat16"))


def _numpy(x: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    def r(v: np.ndarray) -> np.ndarray:
        return widen(narrow(v, "bfloat16"), "bfloat16")

    gate, value = np.split(r(x @ up.T), 2, axis=1)
    return narrow(r(r(gate / (1 + np.exp(-gate))) * value) @ down.T, "bfloat16")


def by(matrix: Callable[[np.ndarray], Product]) -> Callable[[dict[str, np.ndarray]], Callable[[np.ndarray], object]]:
    """Make an expert whose matrices are multiplied in one way."""

    def expert(tensors: dict[str, np.ndarray]) -> Callable[[np.ndarray], object]:
        up, down = matrix(tensors["gate_up_proj"]), matrix(tensors["down_proj"])
        return Expert(BF16, down.rows, up, down, None, None).run

    return expert


PRODUCTS: dict[str, Callable[[np.ndarray], Product]] = {"numkong": lambda stored: Matrix.of(stored, BF16)}
if orders():
    PRODUCTS["in torch's order"] = OrderedMatrix
CHOSEN = "in torch's order" if are_needed() else "numkong"
WAYS: dict[str, Callable[[dict[str, np.ndarray]], Callable[[np.ndarray], object]]] = {
    **{f"{name}{' (taken)' * (name == CHOSEN)}": by(matrix) for name, matrix in PRODUCTS.items()},
    "numpy, widened once": numpy_widened_once,
    "numpy, widened each call": numpy_widened_each_call,
    "torch bfloat16": torch_expert,
}


def main() -> None:
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread; ms an expert (GFLOP/s)")
    print(f"{'hidden x inner':<16}{'rows':>5}" + "".join(f"{name:>26}" for name in WAYS))
    generator = np.random.default_rng(0)
    for hidden, inner, experts in ((576, 96, 64), (2048, 1408, 8)):
        shapes = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
        stored = [
            {n: narrow(generator.standard_normal(s, dtype=np.float32) / s[1] ** 0.5, "bfloat16") for n, s in shapes.items()}
            for _ in range(experts)
        ]
        ready = {name: [make(tensors) for tensors in stored] for name, make in WAYS.items()}
        for rows in (1, 8, 128):
            x = narrow(generator.standard_normal((rows, hidden), dtype=np.float32), "bfloat16")
            times: dict[str, list[float]] = {name: [] for name in WAYS}
            for turn in range(40):
                for name, expert in ready.items():
                    start = time.thread_time()
                    expert[turn % experts](x)
                    times[name].append((time.thread_time() - start) * 1000)
            medians = [statistics.median(times[name][8:]) for name in WAYS]
            cells = [f"{ms:.3f} ({6 * hidden * inner * rows / ms / 1e6:.0f})" for ms in medians]
            print(f"{f'{hidden} x {inner}':<16}{rows:>5}" + "".join(f"{cell:>26}" for cell in cells))


def numbers() -> None:
    """How many numbers of 30 up projections of 576 x 192 differ from torch's, by rows."""
    print(f"\nnumbers that differ from torch's\nrows   of{''.join(f'{name:>20}' for name in PRODUCTS)}")
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 8, 16, 32, 33, 64, 200):
        differ = dict.fromkeys(PRODUCTS, 0)
        for _ in range(30):
            weights = (torch.randn((192, 576), generator=generator) / 24).bfloat16()
            x = (torch.randn((rows, 576), generator=generator) * 3).bfloat16()
            theirs = torch.nn.functional.linear(x, weights).float().numpy()
            for name, matrix in PRODUCTS.items():
                differ[name] += int((theirs != matrix(weights.view(torch.uint16).numpy()).apply(x.float().numpy())).sum())
        print(f"{rows:<5}{30 * rows * 192:>9,}{''.join(f'{count:>20}' for count in differ.values())}")


if __name__ == "__main__":
    main()
    numbers()

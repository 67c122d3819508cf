"""`make test-gpu`: what only a GPU can show, in at most 8 minutes, as one table; the exit code is 1 where a limit is broken.

With --dry it does all but the device's work, on a machine without a GPU: the same models, workers and comparisons, on the CPU, with a small
model in place of the real sizes. Everything that it needs is made in a temporary folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from remoe_cli.runtime.device import choose, describe
from tests.gpu import checkpoint, measure, tokens
from tests.gpu.row import Row, at_most
from tests.gpu.speed import PLACEMENTS
from tests.support.paths import ROOT

NOT_RUN = "not run"
MEMORY_OFF = 0.05  # of the planned bytes
HOST_ROOM = 1.1


def rows(device: str, folder: Path) -> Iterator[Row]:
    found = describe(torch.device(device))
    yield Row("device", f"{found.name}, {found.memory_bytes / 1e9:.0f} GB", found.driver or "")
    yield from tokens.rows(device, folder / "families")
    if device == "cuda":
        there, back = measure.link_bytes_per_s()
        yield Row("link to the device and back", f"{there / 1e9:.1f} and {back / 1e9:.1f} GB/s")
    yield Row("reading this machine's memory", f"{measure.memory_bytes_per_s() / 1e9:.1f} GB/s")
    path = checkpoint.write(checkpoint.REAL if device == "cuda" else checkpoint.SMALL, folder / "olmoe")
    for placement in PLACEMENTS:
        yield from _speed(placement, device, folder, path)


def _speed(placement: str, device: str, folder: Path, path: Path) -> Iterator[Row]:
    if PLACEMENTS[placement] is None and device != "cuda":
        yield Row(placement, NOT_RUN, "it needs a GPU")
        return
    if PLACEMENTS[placement] is None and find_spec("accelerate") is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "accelerate"], check=False)
    work = folder / placement.replace(" ", "-").replace("'", "").replace(",", "")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.gpu.speed", str(work), str(path), device, placement], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if ran.returncode:
        yield Row(placement, f"ended with {ran.returncode}", "see above", PLACEMENTS[placement] is None and None)
        return
    figures = json.loads(ran.stdout.splitlines()[-1])
    yield Row(f"{placement}: TTFT, TPOT", f"{1e3 * figures['ttft_s']:.0f} ms, {1e3 * figures['tpot_s']:.1f} ms")
    if "token_bytes" not in figures:
        return
    yield Row(f"{placement}: weights read for a token", f"{figures['token_bytes'] / figures['tpot_s'] / 1e9:.3g} GB/s")
    if device == "cuda":  # a small model's weights are less than what the libraries take
        host, expected = figures["host_bytes"] / 1e6, figures["host_expected_bytes"] / 1e6
        yield at_most(f"{placement}: memory of the host, MB", round(host), round(HOST_ROOM * expected))
        off = figures["device_bytes"] / figures["device_expected_bytes"] - 1
        yield at_most(f"{placement}: memory of the device, off by", abs(off), MEMORY_OFF)


def main() -> int:
    from rich.console import Console
    from rich.table import Table

    device, start = "cpu" if "--dry" in sys.argv[1:] else choose(True), time.perf_counter()
    table, broken = Table("figure", "value", "limit", "ok", title="make test-gpu" + (" --dry" if device == "cpu" else "")), 0
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(device, Path(folder)):
            broken += row.ok is False
            table.add_row(row.what, row.value, row.limit, {True: "yes", False: "NO", None: ""}[row.ok])
            print(f"{time.perf_counter() - start:6.1f} s  {row.what}: {row.value}", file=sys.stderr, flush=True)
    Console(width=140).print(table)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())

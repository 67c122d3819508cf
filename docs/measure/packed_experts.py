"""Prints the second table of ADR 11: one layer of gpt-oss-20b's real sizes in one function of the local twin, in each form.

`make measure` runs it; it writes 2 GB into a temporary folder. Weights are random. Three functions hold the 32 experts of a layer: in
bfloat16, in MXFP4 that is made ready, and in MXFP4 that stays packed. Each answers with all of them in the memory that a plan gives it by
the local catalog; there its memory is read. Its times are those of functions with more than one vCPU, all of the same size.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import quantised_experts

from remoe_cli import artifacts, cages
from remoe_cli.deploy.local import processes
from remoe_cli.deploy.local.config import FunctionConfig
from remoe_cli.function.codec import Batch, from_wire, pack, to_wire, unpack
from remoe_cli.function.expert_ffn import narrow
from remoe_cli.function.weights import Head, read_head
from remoe_cli.model.checkpoint import find
from remoe_cli.model.experts import expert_layers
from remoe_cli.model.loader import load
from remoe_cli.model.shards import write_shard, write_shards
from remoe_cli.package.bundle import HANDLER, expert_form, function_zip
from remoe_cli.plan.catalog.catalog import read_catalog

sys.path.append(str(Path(__file__).parents[2]))
from tests.support.twin import Running, run_twin

EXPERTS, ROWS, STARTS, CALLS, WHOLE_MB = 32, (1, 2, 4, 8, 32, 128), 5, 9, 2560
WIDTH = quantised_experts.SIZE


@dataclass(frozen=True)
class Way:
    """A shard, the form in which its function computes, and what a plan counts for its experts."""

    name: str
    shard: Path
    form: str
    experts_bytes: int

    @property
    def planned_mb(self) -> int:
        side = read_catalog("local").function
        return ceil(side.runtime_memory_mb + self.experts_bytes / 2**20)


@contextmanager
def function(way: Way, folder: Path, memory_mb: int, mechanism: cages.Mechanism) -> Iterator[Running]:
    head = read_head(way.shard)
    config = FunctionConfig(
        name="f",
        handler=HANDLER,
        code_dir=str(folder / "code"),
        environment={
            "REMOE_SHARD": str(way.shard),
            "REMOE_SHARD_HEADER": f"{len(head)}:{artifacts.sha256_bytes(head)}",
            **expert_form(way.form),
        },
        memory_mb=memory_mb,
        timeout_s=120,
        reserved_concurrency=1,
    )
    with run_twin([config], folder / "logs", mechanism) as running:
        yield running


def ask(running: Running, experts: Sequence[int], rows: int) -> Batch:
    x = narrow(np.random.default_rng(0).standard_normal((rows * len(experts), WIDTH), dtype=np.float32), "bfloat16")
    answer = running.raw(to_wire(pack(Batch("bfloat16", tuple(experts), (rows,) * len(experts), x))))
    if "FunctionError" in answer:
        raise SystemExit(answer["body"])
    return unpack(from_wire(answer["body"]))


def measure(way: Way, folder: Path, mechanism: cages.Mechanism) -> dict[str, Any]:
    starts = []
    for _ in range(STARTS + 1):  # the first one fills the page cache
        with function(way, folder, WHOLE_MB, mechanism) as running:
            begun = time.perf_counter()
            ask(running, [0], 1)
            starts.append(time.perf_counter() - begun)
    with function(way, folder, WHOLE_MB, mechanism) as running:
        begun = time.perf_counter()
        ask(running, range(EXPERTS), 1)
        all_s = time.perf_counter() - begun
        ms = {n: statistics.median(ask(running, [turn % EXPERTS], n).compute_us / 1000 for turn in range(CALLS)) for n in ROWS}
    with function(way, folder, way.planned_mb, mechanism) as running:
        for expert in (*range(EXPERTS), *range(EXPERTS)):
            ask(running, [expert], 4)
        (worker,) = running.started
        held = processes.memory(worker.pid)
    return {"first_s": statistics.median(starts[1:]), "all_s": all_s, "ms": ms, "own": held.anonymous_bytes, "peak": held.peak_bytes}


def main() -> None:
    print(f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, {EXPERTS} experts of {WIDTH} x {2 * WIDTH} and {WIDTH} x {WIDTH}")
    quantised_experts.EXPERTS = EXPERTS
    mechanism = cages.probe(f"remoe-measure-{os.getpid()}")
    print(f"limits of memory: {mechanism.memory}, of the CPU: {mechanism.cpu}\n")
    titles = ["experts in", "planned MB", "own memory, MB", "resident at most, MB", "cold start, s", "all experts, s"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zipfile.ZipFile(BytesIO(function_zip())).extractall(folder / "code")
        (folder / "model").mkdir()
        quantised_experts.checkpoint(folder / "model")
        found = find(str(folder / "model"))
        plain = folder / "bfloat16.safetensors"
        write_shard(plain, expert_layers(load(found))[0], range(EXPERTS))
        (stored,) = write_shards(found, {0: (range(EXPERTS),)}, 1, folder)
        head, factor = Head.parse(read_head(stored.path)), read_catalog("local").function.expert_memory_factor
        whole, small = head.expert_bytes(0), head.stored_bytes(0)
        ways = (
            Way("bfloat16", plain, "ready", round(EXPERTS * whole * factor)),
            Way("MXFP4, ready", stored.path, "ready", round(EXPERTS * whole * factor + whole)),
            Way("MXFP4, packed", stored.path, "packed", round(EXPERTS * small * factor)),
        )
        print("|", *(f"{title} |" for title in titles), *(f"{n} rows, ms |" for n in ROWS))
        print("| --- " * (len(titles) + len(ROWS)) + "|")
        for way in ways:
            got = measure(way, folder, mechanism)
            cells = [way.name, way.planned_mb, f"{got['own'] / 2**20:.0f}", f"{got['peak'] / 2**20:.0f}"]
            cells += [f"{got['first_s']:.2f}", f"{got['all_s']:.2f}", *(f"{got['ms'][n]:.1f}" for n in ROWS)]
            print("|", *(f"{cell} |" for cell in cells), flush=True)
    for root in mechanism.groups:
        cages.remove(root)


if __name__ == "__main__":
    main()

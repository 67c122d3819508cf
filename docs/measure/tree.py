"""Prints the tables of ADR 5: nearest-neighbour search by brute force, by the SPS tree and by libraries, at several sizes.

    python docs/measure/tree.py [--sizes 5000 200000] [--vectors FILE.npy]

All of a size in one run, one query at a time, ways in turn. A search is one thread, and its time is that thread's processor time, so that
other work on the machine does not stretch the long ones more than the short ones; building is given as it passed and as processor time of
all threads. usearch holds bfloat16 and is filled by one thread; faiss is measured when it is installed (`pip install faiss-cpu`).

Without --vectors, prompts are synthetic: tokens drawn by Zipf's law, partly from all words and partly from one of 200 topics, each an
embedding row out of a table whose spectrum falls and whose mean is not zero; rows are normalised and summed. The first line of each table
says how such prompts lie beside each other, to hold against real ones.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import platform
import time
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from remoe_cli.predict import neighbours, tree

ALPHA, QUERIES, TOPICS, WORDS, WORDS_OF_TOPIC, DIMENSIONS = 15, 300, 200, 8192, 200, 576
Search = Callable[[np.ndarray], np.ndarray]
Way = tuple[str, tuple[float, float], float, Search]  # name, building in s of clock and of processor, MB beside the vectors, search


def synthetic(n: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    falling = np.arange(1, DIMENSIONS + 1, dtype=np.float32) ** -0.6
    table = generator.standard_normal((WORDS, DIMENSIONS), dtype=np.float32) * falling
    table += 0.25 * np.linalg.norm(falling) / DIMENSIONS**0.5  # the direction that all rows share
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    of_all, of_topic, of_topics = (_zipf(*law) for law in ((WORDS, 1.0), (WORDS_OF_TOPIC, 0.8), (TOPICS, 0.7)))
    words = np.stack([generator.permutation(WORDS)[:WORDS_OF_TOPIC] for _ in range(TOPICS)])
    out = np.empty((n, DIMENSIONS), dtype=np.float32)
    for start in range(0, n, 4096):
        size = min(4096, n - start)
        lengths = generator.lognormal(np.log(80), 0.9, size).clip(4, 1000).astype(int)
        prompt = np.repeat(np.arange(size), lengths)
        ids = np.searchsorted(of_all, generator.random(len(prompt)))
        topical = generator.random(len(prompt)) < generator.beta(2, 4 / 3, size)[prompt]  # 60% on average
        topic = np.searchsorted(of_topics, generator.random(size))[prompt[topical]]
        ids[topical] = words[topic, np.searchsorted(of_topic, generator.random(len(topic)))]
        offsets = torch.from_numpy(np.cumsum(lengths) - lengths)
        out[start : start + size] = torch.nn.functional.embedding_bag(torch.from_numpy(ids), torch.from_numpy(table), offsets, mode="sum")
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def _zipf(n: int, power: float) -> np.ndarray:
    shares = np.cumsum(np.arange(1, n + 1) ** -power)
    return shares[:-1] / shares[-1]  # without the last, so that a search never runs past it


def ways(vectors: np.ndarray) -> list[Way]:
    found: list[Way] = [("brute force", (0.0, 0.0), 0.0, lambda q: _brute(vectors, q))]
    seconds, built = _timed(lambda: tree.build(vectors))
    nodes_mb = (sum(array.nbytes for array in built.to_arrays().values()) + built.centres.nbytes) / 1e6
    for at_least in (ALPHA, tree.BETA, 600, 2400):
        if at_least < len(vectors):
            found.append((f"tree, {at_least} seen", seconds, nodes_mb, _tree_search(built, at_least)))
    found += _usearch(vectors)
    if find_spec("faiss"):
        found += _faiss(vectors)
    return found


def _brute(vectors: np.ndarray, q: np.ndarray) -> np.ndarray:
    similarities = vectors @ q
    best = np.argpartition(similarities, len(similarities) - ALPHA)[-ALPHA:]
    return best[np.argsort(-similarities[best])]


def _tree_search(built: tree.Tree, at_least: int) -> Search:
    return lambda q: tree.search(built, q, alpha=ALPHA, at_least=at_least)[0]


def _usearch(vectors: np.ndarray) -> list[Way]:
    seconds, nearest = _timed(lambda: neighbours.build(vectors, exact=0))
    index = nearest.index
    memory_mb = index.memory_usage / 1e6

    def at(expansion: int, search: Search) -> Search:
        def run(q: np.ndarray) -> np.ndarray:
            index.expansion_search = expansion
            return search(q)

        return run

    plain = [
        (f"usearch, ef {ef}", seconds, memory_mb, at(ef, lambda q: np.asarray(index.search(q, ALPHA).keys))) for ef in (32, 64, 128, 256)
    ]
    ours = at(128, lambda q: neighbours.search(nearest, q, alpha=ALPHA)[0])
    return [*plain, ("neighbours.py, ef 128", seconds, memory_mb, ours)]


def _faiss(vectors: np.ndarray) -> list[Way]:
    import faiss

    lists = int(4 * len(vectors) ** 0.5)
    coarse = faiss.IndexFlatIP(vectors.shape[1])
    index = faiss.IndexIVFFlat(coarse, vectors.shape[1], lists, faiss.METRIC_INNER_PRODUCT)

    def fill() -> None:
        index.train(vectors[: 64 * lists])
        index.add(vectors)

    seconds, _ = _timed(fill)
    memory_mb = (vectors.nbytes + lists * vectors.shape[1] * 4) / 1e6

    def at(probes: int) -> Search:
        def search(q: np.ndarray) -> np.ndarray:
            index.nprobe = probes
            return np.asarray(index.search(q[None], ALPHA)[1][0])

        return search

    return [(f"faiss IVF, {probes} of {lists} lists", seconds, memory_mb, at(probes)) for probes in (4, 16, 64)]


def _timed(work: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    clock, processor = time.perf_counter(), time.process_time()
    result = work()
    return (time.perf_counter() - clock, time.process_time() - processor), result


def table(vectors: np.ndarray, queries: np.ndarray) -> None:
    near = np.sort(queries @ vectors[:5000].T, axis=1)
    print(f"\n{len(vectors):,} vectors of {vectors.shape[1]}, {len(queries)} queries that are not among them; cosine of two prompts: "
          f"median {np.median(near):.2f}, 1% {np.quantile(near, 0.01):.2f}, 99% {np.quantile(near, 0.99):.2f}")  # fmt: skip
    measured = ways(vectors)
    truth = [set(measured[0][3](q).tolist()) for q in queries]
    times = np.zeros((len(measured), len(queries)))
    hits = np.zeros((len(measured), len(queries)))
    for turn in range(len(queries)):
        for i, (_, _, _, search) in enumerate(measured):
            j = (turn + 37 * i) % len(queries)  # another query for each way: none finds in the cache what the one before it read
            start = time.thread_time()
            found = search(queries[j])
            times[i, j], hits[i, j] = (time.thread_time() - start) * 1e6, len(truth[j].intersection(found.tolist())) / len(truth[j])
    print(f"{'':<28}{'build s':>9}{'cpu s':>8}{'search us':>11}{'p90 us':>9}{'x brute force':>15}{'recall@15':>11}{'extra MB':>10}")
    for i, (name, (clock_s, processor_s), memory_mb, _) in enumerate(measured):
        ratio = np.median(times[0]) / np.median(times[i])
        print(f"{name:<28}{clock_s:>9.2f}{processor_s:>8.2f}{np.median(times[i]):>11.0f}{np.quantile(times[i], 0.9):>9.0f}"
              f"{ratio:>15.1f}{hits[i].mean():>11.3f}{memory_mb:>10.1f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 1000, 5000, 200_000])
    parser.add_argument("--vectors", type=Path, help="a .npy of real prompt vectors [N, d] to use instead")
    chosen = parser.parse_args()
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores; one thread for a search "
          + ", ".join(f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith("OPENBLAS")))  # fmt: skip
    if chosen.vectors:
        every = np.load(chosen.vectors).astype(np.float32)
        every = (every / np.linalg.norm(every, axis=1, keepdims=True))[np.random.default_rng(0).permutation(len(every))]
        held = min(QUERIES, len(every) // 5)
        table(np.ascontiguousarray(every[held:]), every[:held])
        return
    for size in chosen.sizes:
        every = synthetic(size + QUERIES)
        table(np.ascontiguousarray(every[QUERIES:]), every[:QUERIES])


if __name__ == "__main__":
    main()

"""Many clients at a deployment of the local twin: is an answer lost or mixed up, how long does each wait, does memory grow?

    python docs/measure/load.py NAME [--trace FILE] [--clients 64] [--minutes 3] [--one-by-one 1000]

NAME is a deployment with a main server. Each prompt is first answered alone; under load, every answer has
to have the same tokens. Requests come with the gaps and lengths of the trace, stretched so that about half of the clients wait at any time;
without a trace, each client asks again at once. Then requests are asked one by one, and the memory of the main function is compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from remoe_cli.cli.options import read_data
from remoe_cli.demo_data import PROMPTS
from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.local.target import LocalTarget
from remoe_cli.plan.problem.trace_requests import read_requests
from remoe_cli.runtime.client import Http

_TEXTS, _LENGTHS = 16, (4, 8, 16, 32)
_SHORT = 4  # tokens of each request that is asked one by one


@dataclass
class Answers:
    """What became of the requests, and what the main function held meanwhile (bytes, once a second)."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    wrong: int = 0
    lost: list[str] = field(default_factory=list)
    turned_away: int = 0
    resident: list[int] = field(default_factory=list)


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Stream one answer: its tokens, and the seconds at which text came."""
    begun_s, times, ids = time.perf_counter(), [], None
    async with client.stream("POST", "/invocations", json=body | {"stream": True}) as response:
        if response.status_code != 200:
            await response.aread()
            response.raise_for_status()
        async for line in response.aiter_lines():
            if not line:
                continue  # which the server sends while a request waits, so that no proxy closes its stream
            event = json.loads(line)
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            times.append(time.perf_counter() - begun_s)
            ids = event["answer"]["token_ids"] if "answer" in event else ids
    if ids is None:
        raise RuntimeError("the stream ended without an answer")
    return ids, times


def bodies() -> Iterator[dict[str, Any]]:
    for text in read_data(str(PROMPTS), "prompt").texts[:_TEXTS]:
        for length in _LENGTHS:
            yield {"prompt": str(text), "max_new_tokens": length}


def gaps(trace: Path | None, mean_s: float) -> Iterator[float]:
    """Yield times between requests for ever: the trace's, stretched to a mean."""
    if trace is None:
        while True:
            yield 0.0
    each = np.diff(read_requests(trace).at_s)[100:]  # the first requests of Azure's trace are rare
    each = each[each >= 0] * (mean_s / each.mean())
    while True:
        yield from each.tolist()


async def load(
    client: httpx.AsyncClient,
    alone: list[tuple[dict[str, Any], list[int]]],
    trace: Path | None,
    clients: int,
    over_s: float,
    alone_s: float,
) -> Answers:
    found, free, asked = Answers(), asyncio.Semaphore(clients), set[asyncio.Task[None]]()
    draw, ends_s = random.Random(0), time.monotonic() + over_s

    async def one(body: dict[str, Any], expected: list[int]) -> None:
        try:
            ids, times = await ask(client, body)
            found.wrong += ids != expected
            found.ttft_s.append(times[0])
            if len(times) > 2:
                found.tpot_s.append((times[-1] - times[0]) / (len(ids) - 1))
        except httpx.HTTPStatusError as error:
            if error.response.status_code == 429:
                found.turned_away += 1
            else:
                found.lost.append(f"HTTP {error.response.status_code}")
        except Exception as error:
            found.lost.append(f"{type(error).__name__}: {error}")
        finally:
            free.release()

    async def watch() -> None:
        while True:
            found.resident.append((await client.get("/main")).json()["resident_bytes"])
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    for gap_s in gaps(trace, alone_s / 4):
        if time.monotonic() > ends_s:
            break
        await asyncio.sleep(gap_s)
        await free.acquire()
        task = asyncio.create_task(one(*draw.choice(alone)))
        asked.add(task)
        task.add_done_callback(asked.discard)
    await asyncio.gather(*asked)
    watching.cancel()
    return found


async def measure(url: str, options: argparse.Namespace) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False, limits=limits) as client:
        begun_s = time.perf_counter()
        alone = [(body, (await ask(client, body))[0]) for body in bodies()]
        alone_s = (time.perf_counter() - begun_s) / len(alone)
        print(f"{date.today()}, {os.cpu_count()} cores; {len(alone)} requests alone, {alone_s:.2f} s each", flush=True)
        found = await load(client, alone, options.trace, options.clients, options.minutes * 60, alone_s)
        count = len(found.ttft_s)
        print(
            f"{count} answers to at most {options.clients} clients in {options.minutes:g} minutes, {count / options.minutes:.0f} a minute"
        )
        print(f"  lost {len(found.lost)}, with other tokens {found.wrong}, turned away (429) {found.turned_away}")
        for name, values in (("TTFT", found.ttft_s), ("TPOT", found.tpot_s)):
            p50, p99 = np.percentile(values, (50, 99))
            print(f"  {name} p50 {p50:.2f} s, p99 {p99:.2f} s")
        for reason in sorted(set(found.lost)):
            print(f"  lost: {reason}")
        third = max(1, len(found.resident) // 3)
        first, last = (statistics.median(part) for part in (found.resident[third : 2 * third], found.resident[-third:]))
        print(f"  resident memory in the last third of the time {last / first:.3f} of that in the second")
        if options.one_by_one:
            sizes = []
            for number in range(options.one_by_one):
                body, expected = alone[number % len(alone)]
                ids, _ = await ask(client, body | {"max_new_tokens": _SHORT})
                assert ids == expected[:_SHORT], "one by one, an answer has other tokens"
                if number in (options.one_by_one // 10, options.one_by_one - 1):
                    sizes.append((await client.get("/main")).json()["resident_bytes"])
            print(f"{options.one_by_one} requests one by one: resident memory {sizes[-1] / sizes[0]:.3f} of that after a tenth of them")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--one-by-one", type=int, default=1000)
    options = parser.parse_args()
    address = LocalTarget(SILENT).main_address(options.name)
    assert isinstance(address, Http), "the deployment needs a main server"
    asyncio.run(measure(address.url, options))


if __name__ == "__main__":
    main()

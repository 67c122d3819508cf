"""What a cold start takes on the local twin where several functions start at once and share the machine's cores.

    python docs/measure/starts_at_once.py PLAN [--at-once 1 2 4 8 16 30] [--rounds 5]

PLAN has at least as many expert functions; `remoe demo` leaves one in ~/.cache/remoe/demo/smolmoe-float32/plan-remote.json. It is deployed,
so many idle instances are ended, their functions are called at once, and the deployment is destroyed. A call's time is that of its client.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.local import lifecycle
from remoe_cli.deploy.local.calibrate import restart
from remoe_cli.deploy.local.target import LocalTarget
from remoe_cli.deploy.target import DeployOptions
from remoe_cli.errors import InvokeError
from remoe_cli.runtime.invoke import health, make_client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--at-once", nargs="+", type=int, default=[1, 2, 4, 8, 16, 30])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    name, target = f"starts-{os.getpid()}", LocalTarget(SILENT)
    target.deploy(arguments.plan, name, DeployOptions())
    try:
        print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {arguments.rounds} rounds\n")
        print("| functions started at once | ms until the first answer | median | until the last | not within 10 s |")
        print("| --- | --- | --- | --- | --- |")
        for at_once in arguments.at_once:
            rounds = [_starts_ms(name, at_once) for _ in range(arguments.rounds)]
            failed = sum(time_ms is None for times in rounds for time_ms in times)
            answered = [ended for times in rounds if (ended := [time_ms for time_ms in times if time_ms is not None])]
            shown = (f"{statistics.median(map(of, answered)):.0f}" if answered else "" for of in (min, statistics.median, max))
            print(f"| {at_once} | {' | '.join(shown)} | {failed / arguments.rounds:.3g} |", flush=True)
    finally:
        target.destroy(name)


def _starts_ms(name: str, at_once: int) -> list[float | None]:
    """Start that many functions at once; return how long each call took, None where its start was given up."""
    status = lifecycle.status(name)
    functions = [function["name"] for function in status["functions"]][:at_once]
    client = make_client(status["endpoint"], at_once, 60.0)
    for function in functions:
        restart(name, function)

    def call(function: str) -> float | None:
        begun_s = time.perf_counter()
        try:
            health(client, function)
        except InvokeError:  # Lambda, and so the twin, give a start 10 s, not counting its wait for a turn
            return None
        return (time.perf_counter() - begun_s) * 1e3

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(call, functions))


if __name__ == "__main__":
    main()

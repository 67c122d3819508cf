"""What it costs how OpenMP's threads wait: TTFT and TPOT of the demo model by setting, on a quiet machine and beside busy programs.

    python docs/measure/thread_waits.py [--prompts 4] [--rounds 2]

Each setting has a process of its own, in turns, for the settings are read when torch is imported (remoe_cli/openmp.py). Prints medians over
prompts and rounds, relative to the setting that remoe chooses.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date

from remoe_cli.openmp import WAITS

CHOSEN = " ".join(f"{name}={value}" for name, value in WAITS.items())
SETTINGS = (CHOSEN, "libgomp's own", "OMP_WAIT_POLICY=PASSIVE", "GOMP_SPINCOUNT=100", "GOMP_SPINCOUNT=10000")
NEW_TOKENS, GIVE_UP_S = 12, 120


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_answers(options.prompts)))
        return
    print(f"{date.today()}, {os.cpu_count()} cores; medians, TTFT and TPOT relative to {CHOSEN}")
    for busy in (0, os.cpu_count() or 1, 3 * (os.cpu_count() or 1)):
        with _busy(busy):
            taken: dict[str, list[tuple[float, float]]] = {setting: [] for setting in SETTINGS}
            for _ in range(options.rounds):
                for setting in SETTINGS:
                    taken[setting] += _asked(setting, options.prompts)
        if not taken[CHOSEN]:
            print(f"{busy} busy programs: {CHOSEN} gave no answer within {GIVE_UP_S} s")
            continue
        base = [statistics.median(times) for times in zip(*taken[CHOSEN], strict=True)]
        print(f"{busy} busy programs: {CHOSEN} takes {base[0] * 1e3:.0f} ms and {base[1] * 1e3:.0f} ms")
        for setting, times in taken.items():
            medians = [statistics.median(each) for each in zip(*times, strict=True)]
            line = f"{medians[0] / base[0]:.2f}  {medians[1] / base[1]:.2f}" if medians else f"no answer within {GIVE_UP_S} s"
            print(f"  {setting:<26}{line}", flush=True)


def _asked(setting: str, prompts: int) -> list[tuple[float, float]]:
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= dict([setting.split("=")]) if "=" in setting else {}
    command = [sys.executable, __file__, "--child", "--prompts", str(prompts)]
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=GIVE_UP_S, check=True)
    except subprocess.TimeoutExpired:
        return []
    return [(ttft_s, tpot_s) for ttft_s, tpot_s in json.loads(done.stdout)]


def _answers(prompts: int) -> list[tuple[float, float]]:
    """Ask the demo model itself, all experts local; the first answer warms."""
    from remoe_cli.cli.demo import _prompts
    from remoe_cli.model.checkpoint import find_named
    from remoe_cli.model.demo import demo_model
    from remoe_cli.model.spec import read_spec
    from remoe_cli.runtime.engine import start_engine
    from remoe_cli.runtime.invoke import make_caller

    checkpoint = find_named(str(demo_model("float32")))
    engine = start_engine(checkpoint, read_spec(checkpoint), {}, lambda connections, timeout_s: make_caller(None, connections, timeout_s))
    engine.warm_up()
    times = []
    for text in random.Random(0).sample(_prompts().texts, prompts + 1):
        generated = engine.generate(engine.prompt_ids(text), NEW_TOKENS)
        times.append((generated.ttft_s, generated.tpot_s or 0.0))
    return times[1:]


@contextmanager
def _busy(programs: int) -> Iterator[None]:
    children = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(programs)]
    for child in children:
        child.start()
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.join()


def _spin() -> None:
    while True:
        pass


if __name__ == "__main__":
    main()

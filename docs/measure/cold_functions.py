"""What starting functions ahead is worth: the first token of a prompt whose functions are all cold, with it and without, in turns.

    python docs/measure/cold_functions.py PLAN [--prompts 3] [--rounds 3] [--start-ms 0 250]

`remoe demo` leaves a plan in ~/.cache/remoe/demo/smolmoe-float32/plan-remote.json. It is deployed on the local twin, and loaded in this
process as its main server loads it; HTTP is left out. Before each answer all instances of its functions are ended. The tokens have to be
the same. On the twin the functions that start share this machine's cores; on Lambda each has its own. So each start also sleeps for
--start-ms, as a start on Lambda mostly waits: for a virtual machine, and for what it reads.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median

from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.local import lifecycle
from remoe_cli.deploy.local.calibrate import restart
from remoe_cli.deploy.local.target import LocalTarget
from remoe_cli.deploy.target import DeployOptions

WAYS = ("one layer after the other", "ahead")


def main() -> None:
    from remoe_cli.cli.demo import _prompts
    from remoe_cli.runtime.invoke import make_caller
    from remoe_cli.runtime.load_main import load_here
    from remoe_cli.runtime.main_function import Request

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--start-ms", nargs="+", type=float, default=[0.0, 250.0])
    options = parser.parse_args()
    name, target = f"cold-{os.getpid()}", LocalTarget(SILENT)
    target.deploy(options.plan, name, DeployOptions())
    thread = ThreadPoolExecutor(1, "model")
    try:
        folder, status = target.deployed_plan(name).parent, lifecycle.status(name)
        served = thread.submit(load_here, folder / "server.json", partial(make_caller, status["endpoint"])).result()
        functions = [function["name"] for function in status["functions"]]
        texts = _prompts().texts[: options.prompts]
        print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {len(functions)} functions,")
        print(f"{len(texts)} prompts x {options.rounds} rounds\n")
        print(
            "| start sleeps, ms | functions start | TTFT, s | ratio | cold starts | starts ahead | billed ms | USD of functions | in all |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        (handler,) = (folder / "bundle" / "code").glob("**/handler.py")
        code = handler.read_text()
        for start_ms in options.start_ms:
            handler.write_text(f"{code}\ntime.sleep({start_ms / 1e3})\n")

            def ask(text: str, policy):  # type: ignore[no-untyped-def]
                for function in functions:
                    restart(name, function)
                served.engine.dispatcher.policy = policy
                served.engine.dispatcher.called_s.clear()  # as after a pause
                return served.answer(Request(prompt=text, max_new_tokens=4))

            made = _in_turns(lambda *given: thread.submit(ask, *given).result(), texts, options.rounds, served.config.start_ahead)
            _print(start_ms, made)
    finally:
        target.destroy(name)
        thread.shutdown()


def _in_turns(ask, texts: Sequence[str], rounds: int, policy) -> dict[str, list]:  # type: ignore[no-untyped-def, type-arg]
    made: dict[str, list] = {way: [] for way in WAYS}  # type: ignore[type-arg]
    for number, text in enumerate(texts):
        for turn in range(rounds):
            tokens = set()
            for way in WAYS if (number + turn) % 2 else WAYS[::-1]:
                answer = ask(text, policy if way == "ahead" else None)
                tokens.add(answer.token_ids)
                made[way].append(answer.receipt)
            assert len(tokens) == 1, "an answer has other tokens where functions were started ahead"
    return made


def _print(start_ms: float, made) -> None:  # type: ignore[no-untyped-def]
    base_s = median(receipt.ttft_s for receipt in made[WAYS[0]])
    for way, receipts in made.items():
        ttft_s, cold, ahead, billed_ms, usd, all_usd = (
            median(map(of, receipts))
            for of in (
                lambda r: r.ttft_s,
                lambda r: r.cold_starts,
                lambda r: r.starts_ahead,
                lambda r: r.billed_ms,
                lambda r: r.cost.functions_usd,
                lambda r: r.cost.total_usd,
            )
        )
        figures = f"{ttft_s:.2f} | {ttft_s / base_s:.2f} | {cold:g} | {ahead:g} | {billed_ms:.0f} | {usd:.3g} | {all_usd:.3g}"
        print(f"| {start_ms:g} | {way} | {figures} |", flush=True)


if __name__ == "__main__":
    main()

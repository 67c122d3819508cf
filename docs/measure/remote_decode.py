"""What calls cost a token: decoding with half of the experts remote beside all experts local, in turns.

    python docs/measure/remote_decode.py [--tokens 48] [--rounds 3] [--models demo,olmoe] [--rtt-ms 0]

The models and the deployment of batching.py: float32, every second expert of each layer in a function of the local twin, one function a
layer. The same prompts are asked one after another of a main function that calls functions and of one that holds all experts, and the
tokens have to be the same. HTTP to the main function is left out. A call is what the layer waits for it; of that, `billed` is what the
function computed, as Lambda bills it, in whole ms.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from batching import THREAD, _demo, _olmoe, serving

PROMPTS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default="demo,olmoe")
    parser.add_argument("--rtt-ms", type=float, default=0.0)
    options = parser.parse_args()
    load_now = os.getloadavg()[0]
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, load {load_now:.1f}, {options.rtt_ms:g} ms round trip")
    print("model   all local, ms   half remote, ms   ratio   calls a token   ms a token's call   of that billed   waited for")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REMOE_STATE_DIR"] = f"{folder}/state"
        for name in options.models.split(","):
            _measure(name, Path(folder), options)


def _measure(name: str, folder: Path, options: argparse.Namespace) -> None:
    from remoe_cli.runtime.load_main import load

    checkpoint, prompts = _demo(PROMPTS) if name == "demo" else _olmoe(folder / name, PROMPTS)
    with serving(name, checkpoint, folder, options) as served:
        remote: Any = served
        local = THREAD.submit(load, remote.config.model_copy(update={"functions": ()}), checkpoint, lambda *_: None).result()
        decoded: dict[str, list[float]] = {"local": [], "remote": []}
        calls: list[Any] = []
        for round_ in range(options.rounds + 1):
            for ids in prompts:
                answers = {
                    kind: THREAD.submit(partial(main.engine.generate, ids, options.tokens)).result()
                    for kind, main in (("local", local), ("remote", remote))
                }
                assert answers["local"].token_ids == answers["remote"].token_ids, "other tokens with remote experts"
                if round_:  # the first one warms up
                    for kind, answer in answers.items():
                        decoded[kind].append(1e3 * float(np.median(np.diff(answer.token_times_s))))
                    calls += [call for call in answers["remote"].invocations[answers["remote"].invoked[0] :] if call.plain]
        local_ms, remote_ms = median(decoded["local"]), median(decoded["remote"])
        per_token = len(calls) / options.rounds / len(prompts) / (options.tokens - 1)
        print(
            f"{name:<8}{local_ms:>13.1f}{remote_ms:>18.1f}{local_ms / remote_ms:>8.2f}{per_token:>16.1f}"
            f"{(remote_ms - local_ms) / per_token:>20.2f}{median(call.billed_ms for call in calls):>17.0f}"
            f"{median(call.elapsed_s for call in calls) * 1e3:>13.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
    THREAD.shutdown()

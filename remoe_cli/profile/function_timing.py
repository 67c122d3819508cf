"""Times a shard's experts in a process of its own: `python -m remoe_cli.profile.function_timing SHARD TOKENS...`.

Prints a JSON list of median seconds for one expert, one for each count of tokens. Imports only function/.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from remoe_cli.function.expert_ffn import Expert, FfnSpec, narrow
from remoe_cli.function.weights import ExpertFile

_REPEAT_S = 0.2


def main(path: str, *tokens: str) -> None:
    shard = ExpertFile(Path(path))
    spec = FfnSpec(**shard.ffn)
    experts = [Expert.of(shard.tensors(e), spec) for e in shard.experts]
    down = shard.tensors(shard.experts[0])["down_proj"]
    width = down.shape[-1 if spec.transposed else -2]
    medians = []
    for n in map(int, tokens):
        x = narrow(np.random.default_rng(0).standard_normal((n, width), dtype=np.float32), spec.dtype)
        times: list[float] = []
        while len(times) < 3 or sum(times) < _REPEAT_S:
            expert = experts[len(times) % len(experts)]
            start = time.perf_counter()
            expert.run(x)
            times.append(time.perf_counter() - start)
        medians.append(statistics.median(times))
    sys.stdout.write(json.dumps(medians))


if __name__ == "__main__":
    main(*sys.argv[1:])

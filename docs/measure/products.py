"""What a product with bfloat16 weights takes on this CPU: the ways of remoe_cli/model/products.py, in turns.

    python docs/measure/products.py [--threads 1]

ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 in the environment keep torch's bfloat16 products from newer instructions, as on a
processor without them; float32 products still use them. Times are the processor's ms.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from datetime import date

import torch
import torch.nn.functional as F

from remoe_cli.model.products import own, ways, widened

SIZES = ((2816, 2048), (2048, 1408), (1536, 576))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, {options.threads} used, {torch.backends.cpu.get_cpu_capability()}, "
        f"load {os.getloadavg()[0]:.1f}; chosen: {ways()}"
    )
    print(f"{'weights':<22}{''.join(f'{rows:>5} rows' for rows in ROWS)}")
    with torch.inference_mode():
        for outputs, inputs in SIZES:
            weights = [torch.randn(outputs, inputs).bfloat16() for _ in range(max(2, 64_000_000 // (outputs * inputs)))]
            taken: dict[str, list[float]] = {"torch": [], "own": [], "widened": []}
            for rows in ROWS:
                x = torch.randn(rows, inputs).bfloat16()
                for name, way in (("torch", F.linear), ("own", own), ("widened", widened)):
                    best = float("inf")
                    for _ in range(3):
                        start = time.process_time()
                        for weight in weights:
                            way(x, weight)
                        best = min(best, (time.process_time() - start) / len(weights))
                    taken[name].append(best * 1e3)
            for name, times in taken.items():
                print(f"{outputs:>5} x {inputs:<5}{name:<9}{''.join(f'{ms:>10.2f}' for ms in times)}", flush=True)


if __name__ == "__main__":
    main()

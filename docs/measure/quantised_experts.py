"""Prints the table of ADR 10: a function with experts of gpt-oss-20b's size, stored in bfloat16 and in MXFP4.

`make measure` runs it. Weights are random; the sizes are real: 2880 x 5760 and 2880 x 2880, with biases. Each function is a process of its
own with one thread, which reads its shard from the page cache: a cold start on AWS adds the reading, which the bytes decide.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GptOssConfig

from remoe_cli.model.checkpoint import find
from remoe_cli.model.experts import expert_layers
from remoe_cli.model.loader import load
from remoe_cli.model.shards import write_shard, write_shards

EXPERTS, SIZE, ROWS = 8, 2880, (1, 4, 16, 64)
FUNCTION = """
import json, statistics, sys, time
begun = time.perf_counter()
from pathlib import Path
import numpy as np
from remoe_cli.function.expert_ffn import narrow
from remoe_cli.function.ready import ReadyExperts
from remoe_cli.function.weights import ShardFile

def anonymous():
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon:")).split()[1]) / 1024

imported, empty_mb = time.perf_counter(), anonymous()
ready = ReadyExperts(ShardFile(Path(sys.argv[1])), float("inf"))
x = narrow(np.random.default_rng(0).standard_normal((64, 2880), dtype=np.float32), "bfloat16")
ready.get(0).run(x[:1])
first_s = time.perf_counter() - imported
for expert in ready.shard.experts:
    ready.get(expert)
opened_s = time.perf_counter() - imported
times = {}
for rows in json.loads(sys.argv[2]):
    each = []
    for turn in range(16):
        expert = ready.get(ready.shard.experts[turn % len(ready.shard.experts)])
        start = time.perf_counter()
        expert.run(x[:rows])
        each.append(time.perf_counter() - start)
    times[rows] = 1000 * statistics.median(each)
print(json.dumps({"ready_mb": anonymous() - empty_mb, "first_s": first_s, "all_s": opened_s, "ms": times}))
"""


def checkpoint(folder: Path) -> None:
    """Write one layer of the model in MXFP4; every byte is a pair of numbers."""
    GptOssConfig(
        num_hidden_layers=1, num_local_experts=EXPERTS, num_experts_per_tok=4, hidden_size=SIZE, intermediate_size=SIZE, head_dim=64,
        num_attention_heads=8, num_key_value_heads=2, vocab_size=128, layer_types=["full_attention"], dtype="bfloat16",
        pad_token_id=0, eos_token_id=1, quantization_config={"quant_method": "mxfp4"},
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    layer, heads = "model.layers.0.", 64 * 8
    small = {
        **{f"{layer}self_attn.{x}_proj.weight": (64 * n, SIZE) for x, n in (("q", 8), ("k", 2), ("v", 2))},
        **{f"{layer}self_attn.{x}_proj.bias": (64 * n,) for x, n in (("q", 8), ("k", 2), ("v", 2))},
        **{f"{layer}self_attn.o_proj.weight": (SIZE, heads), f"{layer}self_attn.o_proj.bias": (SIZE,), f"{layer}self_attn.sinks": (8,)},
        **{f"{layer}mlp.router.weight": (EXPERTS, SIZE), f"{layer}mlp.router.bias": (EXPERTS,)},
        **{f"{layer}{x}_layernorm.weight": (SIZE,) for x in ("input", "post_attention")},
        **{"model.norm.weight": (SIZE,), "model.embed_tokens.weight": (128, SIZE), "lm_head.weight": (128, SIZE)},
        **{f"{layer}mlp.experts.gate_up_proj_bias": (EXPERTS, 2 * SIZE), f"{layer}mlp.experts.down_proj_bias": (EXPERTS, SIZE)},
    }
    tensors = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in small.items()}
    for name, rows in (("gate_up_proj", 2 * SIZE), ("down_proj", SIZE)):
        tensors[f"{layer}mlp.experts.{name}_blocks"] = torch.randint(0, 256, (EXPERTS, rows, SIZE // 32, 16), dtype=torch.uint8)
        tensors[f"{layer}mlp.experts.{name}_scales"] = torch.randint(116, 121, (EXPERTS, rows, SIZE // 32), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def measure(shard: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", FUNCTION, str(shard), json.dumps(ROWS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return {"mb": shard.stat().st_size / 2**20, **json.loads(done.stdout)}


def main() -> None:
    print(f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, {EXPERTS} experts of {SIZE} x {2 * SIZE} and {SIZE} x {SIZE}\n")
    print("| stored in | stored MB | memory MB | first expert ready and run, s | all ready, s |", *(f"{n} rows, ms |" for n in ROWS))
    print("| --- " * (5 + len(ROWS)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        checkpoint(model)
        found = find(str(model))
        plain = Path(folder) / "bfloat16.safetensors"
        write_shard(plain, expert_layers(load(found))[0], range(EXPERTS))
        (quantised,) = write_shards(found, {0: (range(EXPERTS),)}, 1, Path(folder))
        for name, shard in (("bfloat16", plain), ("MXFP4, dequantised when loaded", quantised.path)):
            got = measure(shard)
            cells = [f"{got['mb']:.0f}", f"{got['ready_mb']:.0f}", f"{got['first_s']:.3f}", f"{got['all_s']:.2f}"]
            print(f"| {name} |", *(f"{cell} |" for cell in cells), *(f"{got['ms'][str(n)]:.1f} |" for n in ROWS))


if __name__ == "__main__":
    main()

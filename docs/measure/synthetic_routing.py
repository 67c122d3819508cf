"""Draws routing for a model of which there is only a config.json, in a file that `remoe profile import MODEL FILE` reads. It is made up.

    python docs/measure/synthetic_routing.py CONFIG.json -o FILE.npz [--zipf 1.5 | --dirichlet 0.1] [--tokens N] [--prompts N] [--seed N]

Every layer has popularities p of its experts: Zipf's law, p_k proportional to rank^-s in a random order, or a draw from a symmetric
Dirichlet(alpha), of which a small alpha leaves most experts unused. A prompt's logits are log p + noise of its own (normal), and each of
its tokens takes the top k of logits + Gumbel noise: k draws without replacement. Half of a prompt's tokens are its prompt, half its answer.

Layers and tokens are independent of each other but for the prompt. Real tokens are not, and real routers are flatter than Zipf 1
(docs/explanation/planning.md). The array `label` says that the file is synthetic; a profile keeps of that only the file's name, so give it
one that tells.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from remoe_cli.model.checkpoint import find
from remoe_cli.model.spec import MoeSpec, read_spec

Array = np.ndarray
TOKENS, PROMPTS, NOISE = 16_384, 64, 0.5
LEAST = 1e-12  # of a popularity: a Dirichlet draw may be 0, and has a logarithm here


@dataclass(frozen=True)
class Law:
    """How popular the experts of a layer are."""

    kind: Literal["zipf", "dirichlet"]
    value: float

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"

    def popularity(self, experts: int, random: np.random.Generator) -> Array:
        if self.kind == "dirichlet":
            return random.dirichlet(np.full(experts, self.value))
        shares = np.arange(1, experts + 1) ** -self.value
        return random.permutation(shares / shares.sum())


def draw(spec: MoeSpec, law: Law, tokens: int = TOKENS, prompts: int = PROMPTS, noise: float = NOISE, seed: int = 0) -> dict[str, Array]:
    """The arrays of the file: ids [T, L, k], seq_offsets [P + 1], prompt_tokens [P] and label. All prompts have as many tokens."""
    random = np.random.default_rng(seed)
    layers, experts, k = len(spec.moe_layers), spec.experts_per_layer, spec.top_k
    shared = np.log(np.maximum([law.popularity(experts, random) for _ in range(layers)], LEAST))
    length = max(2, tokens // prompts)
    ids = np.empty((prompts * length, layers, k), dtype=np.uint8 if experts <= 256 else np.uint16)
    for prompt in range(prompts):
        weights = np.exp(shared + noise * random.standard_normal((layers, experts))).astype(np.float32)
        # The first k arrivals of exponential clocks are the top k of Gumbel noise and logits, at a third of the time.
        arrivals = random.standard_exponential((length, layers, experts), dtype=np.float32) / weights
        ids[prompt * length : (prompt + 1) * length] = np.argpartition(arrivals, k, axis=2)[:, :, :k] if k < experts else np.arange(k)
    label = f"synthetic: {law}, noise {noise:g}, seed {seed}"
    return {
        "ids": ids,
        "seq_offsets": np.arange(prompts + 1) * length,
        "prompt_tokens": np.full(prompts, length // 2),
        "label": np.array(label),
    }


def sizes_of(config: Path) -> MoeSpec:
    """Sizes from a config.json of any name, or a folder that holds one."""
    if config.is_dir():
        return read_spec(find(str(config)))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(config, Path(folder) / "config.json")
        return read_spec(find(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="config.json of the model, by any name, or its folder")
    parser.add_argument("-o", "--out", type=Path, required=True, help="an .npz file")
    law = parser.add_mutually_exclusive_group()
    law.add_argument("--zipf", type=float, default=1.5, help="exponent s")
    law.add_argument("--dirichlet", type=float, help="alpha")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--noise", type=float, default=NOISE, help="standard deviation of a prompt's own logits")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    spec = sizes_of(chosen.config)
    drawn = Law("zipf", chosen.zipf) if chosen.dirichlet is None else Law("dirichlet", chosen.dirichlet)
    arrays = draw(spec, drawn, chosen.tokens, chosen.prompts, chosen.noise, chosen.seed)
    np.savez_compressed(chosen.out, **arrays)
    tokens, layers, k = arrays["ids"].shape
    print(f"{chosen.out}: {arrays['label']}; {tokens} tokens, {layers} MoE layers of {spec.experts_per_layer} experts, top-{k}")


if __name__ == "__main__":
    main()

"""Prints how often worst-case bounds on the tokens of experts hold for prompts that they have not seen (remoe_cli/plan/paper/bound.py).

    python docs/measure/worst_case.py PROFILE

Least used experts and the calibrated bound come from 70% of the profile's prompts, coverage from the rest: first of one split, then means
over many. A bound that promises 95%
of prompts has to hold in all layers at once, for the time to the first token is a sum over layers; the share of single layers is higher.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from remoe_cli.plan.paper.bound import Coverage, PaperBound, TokenBound, calibrate, coverage, expert_coverage, least_first
from remoe_cli.profile.record import read_profile

SHARE, SPLITS = 0.7, 100
SIZES = (0.25, 0.5, 0.75)  # of the experts of a layer, the least used


def split(prompts: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(prompts)
    first = round(SHARE * prompts)
    return order[:first], order[first:]


def measure(counts: np.ndarray, tokens: np.ndarray, seed: int) -> Iterator[tuple[str, str, Coverage, float]]:
    """(what, bound, coverage, mean bound in tokens for each token of the prompt)."""
    known, held = split(len(counts), seed)
    _, layers, experts = counts.shape
    top_k = round(float((counts.sum(axis=2) / tokens[:, None]).max()))
    bounds: list[TokenBound] = [PaperBound(layers, experts, top_k, True), PaperBound(layers, experts, top_k)]
    bounds.append(calibrate(counts[known], tokens[known], top_k))
    order = least_first(counts[known])
    for bound in bounds:
        single = [float((bound.largest(n, experts) / n).mean()) for n in tokens[held]]
        yield "each expert", bound.name, expert_coverage(bound, counts[held], tokens[held]), float(np.mean(single))
        for m in (round(size * experts) for size in SIZES):
            together = [float((bound.together(n, m) / n).mean()) for n in tokens[held]]
            yield f"{m} least used", bound.name, coverage(bound, counts[held], tokens[held], order, m), float(np.mean(together))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path)
    profile = read_profile(parser.parse_args().profile)
    counts, tokens = profile.counts("prefill").astype(np.int64), profile.arrays["prompt_tokens"].astype(np.int64)
    known, held = split(len(counts), 0)
    print(f"{len(known)} prompts known, {len(held)} held out; {counts.shape[1]} layers of {counts.shape[2]} experts; "
          f"prompts of {tokens.min()} to {tokens.max()} tokens, median {np.median(tokens):.0f}")  # fmt: skip
    splits = [list(measure(counts, tokens, seed)) for seed in range(SPLITS)]
    print(f"{'':<16}{'':<16}{'one split':>20}{'':>6}mean of {SPLITS} splits (least of all at once)")
    print(f"{'':<16}{'bound':<16}{'single':>10}{'at once':>10}{'single':>12}{'at once':>10}{'least':>8}{'tokens a token':>16}")
    for row in sorted(range(len(splits[0])), key=lambda row: (row % (len(SIZES) + 1), row)):
        what, name, first, width = splits[0][row]
        single, at_once = ([getattr(rows[row][2], field) for rows in splits] for field in ("single", "at_once"))
        print(f"{what:<16}{name:<16}{first.single:>10.1%}{first.at_once:>10.1%}"
              f"{np.mean(single):>12.1%}{np.mean(at_once):>10.1%}{min(at_once):>8.1%}{width:>16.2f}")  # fmt: skip


if __name__ == "__main__":
    main()

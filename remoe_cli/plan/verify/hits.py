"""For the verifier: how many experts of each place a token uses."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from remoe_cli.plan.document import LayerPlan
from remoe_cli.plan.verify.inputs import Hits, Layer, VerifierInputs


def hit_shares(inputs: VerifierInputs, layer: LayerPlan, routed: Layer) -> Hits:
    """Compute the share of tokens that hit so many experts of each place: CPU, GPU, each function."""
    key = (layer.layer, layer.parts, layer.gpu)
    if key not in inputs.hits:
        inputs.hits[key] = count_hits(layer, routed.choices)
    populations = [(1 - inputs.even_share, inputs.hits[key])]
    if inputs.even_share:
        experts, k = len(routed.use), inputs.profile.record.spec.top_k
        even = [tuple((first + step) % experts for step in range(k)) for first in range(experts)]
        populations.append((inputs.even_share, count_hits(layer, dict.fromkeys(even, 1))))
    shares: defaultdict[tuple[int, int, tuple[int, ...]], float] = defaultdict(float)
    for share, seen in populations:
        total = sum(seen.values())
        for hits, tokens in seen.items():
            shares[hits] += share * tokens / total
    return shares


def count_hits(layer: LayerPlan, choices: Mapping[tuple[int, ...], float]) -> Hits:
    """Count the tokens of each such kind."""
    placed = dict.fromkeys(layer.gpu, -1) | {expert: part for part, experts in enumerate(layer.parts) for expert in experts}
    where, alike = defaultdict(lambda: -2, placed), defaultdict[tuple[int, ...], float](float)
    for choice, tokens in choices.items():
        alike[tuple(sorted(map(where.__getitem__, choice)))] += tokens
    seen: defaultdict[tuple[int, int, tuple[int, ...]], float] = defaultdict(float)
    for counts, tokens in ((Counter(places), tokens) for places, tokens in alike.items()):
        seen[counts.pop(-2, 0), counts.pop(-1, 0), tuple(sorted(counts.values()))] += tokens
    return seen

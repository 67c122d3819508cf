"""What a report says of a profile's routing.

It is the use of experts by layer and by group of prompts, its skew, and pairs of prompts.

Shapes: P prompts, L MoE layers with routing, E experts a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.predict.divergence import jensen_shannon
from remoe_cli.predict.medoids import k_medoids
from remoe_cli.predict.pairs import Similarity, similarity_of
from remoe_cli.predict.tree import unit
from remoe_cli.profile.record import Profile

LEAST_PROMPTS = 20  # with fewer, groups and pairs of prompts say nothing
GROUPS = 6
_PAIRS = 4000
_SEED = 0


@dataclass(frozen=True)
class Use:
    """How often tokens use each expert.

    shares   [L, E], share of the tokens; each row sums to top-k
    """

    title: str
    shares: Floats


@dataclass(frozen=True)
class Skew:
    """How many of the choices go to how many of the experts, the most used ones first.

    least, median, most   [E + 1], over the layers: share of the choices that go to the 0, 1, ... most used experts
    """

    least: Floats
    median: Floats
    most: Floats

    def half(self) -> int:
        """Count the experts that take half of the choices in the median layer."""
        return int(np.searchsorted(self.median, 0.5))


@dataclass(frozen=True)
class Groups:
    """Groups of prompts of similar meaning, or of similar routing where the profile has no vectors.

    sizes            prompts in each
    within, across   mean activation similarity (1 - divergence in bits) of a prompt with its own group's mean and with all prompts' mean
    """

    by_meaning: bool
    sizes: tuple[int, ...]
    within: float
    across: float


@dataclass(frozen=True)
class Routing:
    """The routing of a profile.

    layers   hidden-layer indices
    uses     all tokens first, then by phase, then by group of prompts
    """

    layers: tuple[int, ...]
    experts: int
    top_k: int
    prompts: int
    tokens: int
    uses: tuple[Use, ...]
    skew: Skew
    groups: Groups | None
    pairs: Similarity | None

    @property
    def octaves(self) -> int:
        """How many times use doubles from even use to the darkest colour of a map."""
        most = max(float(use.shares.max()) for use in self.uses) * self.experts / self.top_k
        return int(min(5, max(2, math.ceil(math.log2(most)))))


def routing_of(profile: Profile) -> Routing | None:
    """Read what a report says of a profile's routing; None where the profile has none."""
    spec, routing = profile.record.spec, profile.record.routing
    layers = spec.moe_layers if routing.layers is None else routing.layers
    there = np.isin(spec.moe_layers, layers)
    by_phase = {phase: profile.arrays[f"{phase}_counts"][:, there] for phase in routing.phases}
    counts = sum((each.astype(np.int64) for each in by_phase.values()), np.zeros((), dtype=np.int64))
    if not counts.size or not (counts.sum(axis=(0, 2)) > 0).all():
        return None
    uses = [Use("all tokens", _shares(counts, spec.top_k))]
    if len(by_phase) > 1:
        names = {"prefill": "tokens of prompts", "decode": "generated tokens"}
        uses += [Use(names[phase], _shares(each, spec.top_k)) for phase, each in by_phase.items() if (each.sum(axis=(0, 2)) > 0).all()]
    groups: Groups | None = None
    of_groups: tuple[Use, ...] = ()
    pairs: Similarity | None = None
    used = np.flatnonzero((counts.sum(axis=2) > 0).all(axis=1))
    if routing.row == "prompt" and len(used) >= LEAST_PROMPTS:
        frequencies = counts[used] / counts[used].sum(axis=2, keepdims=True)
        vectors = profile.arrays["prompt_vectors"][used]
        groups, of_groups = _groups(counts[used], frequencies, vectors, spec.top_k)
        if vectors.shape[1]:
            pairs = similarity_of(vectors, frequencies, _SEED, _PAIRS)
            pairs = pairs if np.isfinite(pairs.correlation) else None
    return Routing(
        layers=tuple(layers),
        experts=spec.experts_per_layer,
        top_k=spec.top_k,
        prompts=len(profile.arrays["prompt_tokens"]),
        tokens=round(float(counts.sum(axis=(0, 2)).max()) / spec.top_k),
        uses=(*uses, *of_groups),
        skew=_skew(uses[0].shares),
        groups=groups,
        pairs=pairs,
    )


def _shares(counts: Ints, top_k: int) -> Floats:
    total = counts.sum(axis=0, dtype=np.float64)
    shares: Floats = total / total.sum(axis=1, keepdims=True) * top_k
    return shares


def _skew(shares: Floats) -> Skew:
    falling = -np.sort(-shares, axis=1)
    reached = np.cumsum(np.concatenate([np.zeros((len(falling), 1)), falling], axis=1), axis=1) / falling.sum(axis=1, keepdims=True)
    return Skew(reached.min(axis=0), np.median(reached, axis=0), reached.max(axis=0))


def _groups(counts: Ints, frequencies: Floats, vectors: np.ndarray, top_k: int) -> tuple[Groups | None, tuple[Use, ...]]:
    """Divide prompts into groups, the largest first."""
    by_meaning = bool(vectors.shape[1])
    rows = unit(vectors) if by_meaning else unit(np.sqrt(frequencies).reshape(len(frequencies), -1))
    labels, _ = k_medoids(rows, GROUPS, np.random.default_rng(_SEED))
    sizes = np.bincount(labels)
    members = [np.flatnonzero(labels == one) for one in np.argsort(-sizes, kind="stable")]
    if len(members) < 2:
        return None, ()
    means = [frequencies[rows].mean(axis=0) for rows in members]
    within = np.concatenate([1 - jensen_shannon(frequencies[rows], mean).mean(axis=1) for rows, mean in zip(members, means, strict=True)])
    across = 1 - jensen_shannon(frequencies, frequencies.mean(axis=0)).mean(axis=1)
    uses = tuple(Use(f"group {number} ({len(rows)} prompts)", _shares(counts[rows], top_k)) for number, rows in enumerate(members, 1))
    return Groups(by_meaning, tuple(len(rows) for rows in members), float(within.mean()), float(across.mean())), uses

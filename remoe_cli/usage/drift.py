"""How far the routing of served requests is from the profile's, in bits.

The divergence is taken for each layer and each phase, and the phases are weighed by the tokens that were served in them: a profile has
another mix of long prompts and long answers, and that is no change of routing. Pure.

Two samples of the same workload differ too. The noise floor says by how much: requests of the served lengths are drawn from the profile's
prompts, and so is another profile. Both draws take whole prompts, because the tokens of one prompt depend on each other. The interval is
that of drawing served requests again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from remoe_cli.artifacts import Part
from remoe_cli.errors import ArtifactError, DeployError
from remoe_cli.predict.divergence import jensen_shannon
from remoe_cli.profile.record import Profile
from remoe_cli.progress import Report, no_report
from remoe_cli.runtime.observed import Observed

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
LEAST_REQUESTS = 8
_DRAWS, _LEAST_DRAWS = 400, 40
_MOST_COUNTS = 2_500_000  # of served requests that are compared, by phase, layer and expert: those of the last ones
_WORK = 2e8  # counts that are drawn in all, at most: where there are many, there are fewer draws
_INTERVAL, _FLOOR = (0.025, 0.975), 0.99


class Divergence(Part):
    """A divergence in bits.

    low, high     95% interval, by drawing served requests again
    floor         what two samples of the profile of this size have in the mean
    floor_p99     what 99% of them do not exceed
    """

    bits: float
    low: float
    high: float
    floor: float
    floor_p99: float

    @property
    def is_drift(self) -> bool:
        """Whether chance does not explain it."""
        return self.bits > self.floor_p99


class LayerDrift(Divergence):
    """The divergence of one layer."""

    layer: int


class Drift(Part):
    """The divergence of served routing from the profile's.

    requests                       that were served, and are compared
    prefill_tokens, decode_tokens  of these requests, in the mean
    whole                          the mean of all layers
    drifted                        layers in which chance does not explain it
    """

    requests: int
    prefill_tokens: float
    decode_tokens: float
    whole: Divergence
    layers: tuple[LayerDrift, ...]
    drifted: tuple[int, ...]


@dataclass(frozen=True)
class Routing:
    """How often requests chose each expert: int64 [N, L, E] of each phase."""

    prefill: Ints
    decode: Ints

    @property
    def phases(self) -> tuple[Ints, Ints]:
        """Both phases."""
        return self.prefill, self.decode


def served_routing(name: str, profile: Profile, observed: Iterable[Observed]) -> Routing:
    """Stack the routing of served requests: of the last ones, where there are many.

    Raises: DeployError for too few requests, ArtifactError for requests of another model than the profile's.
    """
    spec, revision = profile.record.spec, profile.record.model.revision
    shape = (len(spec.moe_layers), spec.experts_per_layer)
    counted: deque[tuple[Ints, Ints]] = deque(maxlen=max(LEAST_REQUESTS, _MOST_COUNTS // (2 * shape[0] * shape[1])))
    for each in observed:
        if not each.prefill:
            continue
        if each.revision != revision:
            raise ArtifactError(
                f"Some requests of '{name}' were served with another model ({each.revision[:20]}) than the profile's ({revision[:20]}).",
                "Compare what was served since the deployment has this model: --since TIME.",
            )
        try:
            prefill, decode = (np.array(counts, dtype=np.int64) for counts in (each.prefill, each.decode))
        except ValueError:  # its layers have different numbers of experts
            prefill = decode = np.zeros((0, 0), dtype=np.int64)
        if prefill.shape != shape or decode.shape != shape:
            raise ArtifactError(f"The kept routing of '{name}' has other layers or experts than the profile.", "Give --since TIME.")
        counted.append((prefill, decode))
    if len(counted) < LEAST_REQUESTS:
        raise DeployError(
            f"The routing of {len(counted)} served requests of '{name}' is kept, and {LEAST_REQUESTS} are needed.",
            "Ask the deployment more.",
        )
    prefills, decodes = zip(*counted, strict=True)
    return Routing(np.stack(prefills), np.stack(decodes))


def drift(profile: Profile, served: Routing, seed: int = 0, progress: Report = no_report) -> Drift:
    """Compare the routing of served requests with a profile's.

    Raises: ArtifactError for a profile that has no routing of some layer.
    """
    spec = profile.record.spec
    recorded = Routing(*(profile.counts(phase).astype(np.int64) for phase in ("prefill", "decode")))
    if not all(phase.sum(axis=(0, 2)).all() for phase in recorded.phases):
        raise ArtifactError(f"The profile {profile.path} has no routing of some layers.", "Profile again with more prompts.")
    random = np.random.default_rng(seed)
    size, prompts = len(served.prefill), len(recorded.prefill)
    draws = int(np.clip(_WORK / (2 * (recorded.prefill.size + served.prefill.size)), _LEAST_DRAWS, _DRAWS))
    means = Routing(*(phase.sum(axis=0) for phase in recorded.phases))
    weights = _phase_weights(served)
    observed = _bits(means, Routing(*(phase.sum(axis=0) for phase in served.phases)), weights)
    again, floor = [], []
    for draw in range(draws):
        times = random.multinomial(size, np.full(size, 1 / size))
        drawn = Routing(*(np.tensordot(times, phase, axes=1) for phase in served.phases))
        again.append(_bits(means, drawn, _phase_weights(drawn)))
        sampled = _sampled(random, recorded, served)
        other = random.multinomial(prompts, np.full(prompts, 1 / prompts))
        others = Routing(*(np.tensordot(other, phase, axes=1) for phase in recorded.phases))
        floor.append(_bits(others, sampled, weights))
        progress(draw + 1, draws)
    intervals, floors = _interval(observed, np.stack(again)), np.stack(floor)
    layers = tuple(
        LayerDrift(layer=layer, **_divergence(observed[at], intervals[:, at], floors[:, at])) for at, layer in enumerate(spec.moe_layers)
    )
    whole = _interval(observed.mean(keepdims=True), np.stack(again).mean(axis=1, keepdims=True))[:, 0]
    tokens = [float(phase.sum()) / (spec.top_k * len(spec.moe_layers) * size) for phase in served.phases]
    return Drift(
        requests=size,
        prefill_tokens=tokens[0],
        decode_tokens=tokens[1],
        whole=Divergence(**_divergence(observed.mean(), whole, floors.mean(axis=1))),
        layers=layers,
        drifted=tuple(each.layer for each in layers if each.is_drift),
    )


def _phase_weights(served: Routing) -> Floats:
    """Weigh the phases by what was served in them. Shapes: [2]."""
    totals = np.array([phase.sum() for phase in served.phases], dtype=np.float64)
    return cast("Floats", totals / totals.sum())


def _bits(one: Routing, other: Routing, weights: Floats) -> Floats:
    """Compute the divergence of each layer from total counts [L, E]; a phase with nothing weighs nothing. Shapes: [L]."""
    bits = np.zeros(len(one.prefill))
    for weight, counts in zip(weights, zip(one.phases, other.phases, strict=True), strict=True):
        if weight > 0:
            shares = [each / np.maximum(each.sum(axis=1, keepdims=True), 1) for each in counts]
            bits += weight * jensen_shannon(*shares)
    return bits


def _sampled(random: np.random.Generator, recorded: Routing, served: Routing) -> Routing:
    """Draw requests of the served lengths from the profile's prompts: their total counts.

    Of a longer prompt a part of its choices is drawn. Those of a shorter one count more: choices that are drawn anew would have the noise
    of the prompt and their own.
    """
    of = random.integers(len(recorded.prefill), size=len(served.prefill))
    drawn = []
    for phase, asked in zip(recorded.phases, served.phases, strict=True):
        counts = phase[of]
        # A prompt without this phase (an answer of one token) routes as all prompts do.
        counts = np.where(counts.sum(axis=2, keepdims=True) > 0, counts, phase.sum(axis=0))
        share = asked.sum(axis=2, keepdims=True) / counts.sum(axis=2, keepdims=True)
        drawn.append((random.binomial(counts, np.minimum(share, 1.0)) * np.maximum(share, 1.0)).sum(axis=0))
    return Routing(*drawn)


def _interval(observed: Floats, again: Floats) -> Floats:
    """Compute the interval of drawing again, around what was observed: a draw of a draw has the noise of both. Shapes: [2, L]."""
    around = np.quantile(again, _INTERVAL, axis=0) - again.mean(axis=0)
    return cast("Floats", np.maximum(observed + around, 0.0))


def _divergence(bits: float, interval: Floats, floor: Floats) -> dict[str, float]:
    low, high = interval.tolist()
    return {
        "bits": float(bits),
        "low": low,
        "high": high,
        "floor": float(floor.mean()),
        "floor_p99": float(np.quantile(floor, _FLOOR)),
    }

"""Our predictor: kernel ridge regression from a prompt's words to the roots of its frequencies.

Three choices make it better than a mean of similar prompts (docs/explanation/prediction.md says what was tried):

- a prompt is the sum of its distinct tokens' embeddings, each weighted by log(1 + count) and by how few prompts have it (IDF);
- it predicts square roots, not frequencies or their logarithms: least squares is then the Hellinger distance, which for close
  distributions is the Jensen-Shannon divergence times a constant, and counts of rare and of frequent experts are equally noisy;
- each layer has its own ridge, which pulls it to the mean of all prompts; its leave-one-out divergence chooses the strength.

In ridge regression leave-one-out predictions cost nothing extra, because the leverages are known. So no data is held out: these
predictions choose the kernel's width and the strengths, and their errors give the interval of each prediction.

Shapes: P prompts, d width of an embedding, m landmarks, L layers, E experts. Up to LANDMARKS prompts are all landmarks, and this is exact
kernel ridge; with more prompts it is the Nystroem approximation over so many of them, drawn by the seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_cli.errors import ArtifactError
from remoe_cli.predict.divergence import jensen_shannon
from remoe_cli.predict.history import History, PromptFeatures

Floats = npt.NDArray[np.float64]

LANDMARKS = 1024
WIDTHS = (0.25, 0.5, 1.0, 2.0)
STRENGTHS = np.geomspace(1e-3, 30, 15)
COVERAGE = 0.8  # of the interval
_SCORED_NUMBERS = 1_000_000  # frequencies that choose width and strengths: of as many prompts as have so many, at least 100
_SCALARS = ("unseen", "width")
_LEAST_ROOT = 1e-3  # no expert is predicted to be never used


@dataclass(frozen=True)
class Ridge:
    """A fitted predictor.

    idf_tokens, idf   token ids of the training prompts, ascending, and their weights
    unseen            the weight of any other token
    landmarks         float32 [m, d], of length one
    width             of the kernel exp((cosine - 1) / width)
    weights, mean     [m, L * E] and [L, E]: the square root of a frequency is mean + kernel @ weights
    below, above      [L, E] ends of the interval, as differences of square roots
    strengths         [L] the ridge of each layer
    """

    idf_tokens: npt.NDArray[np.int32]
    idf: npt.NDArray[np.float32]
    unseen: float
    landmarks: npt.NDArray[np.float32]
    width: float
    weights: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32]
    below: npt.NDArray[np.float32]
    above: npt.NDArray[np.float32]
    strengths: npt.NDArray[np.float64]

    @property
    def coverage(self) -> float:
        """The probability that a frequency is inside its interval."""
        return COVERAGE

    def predict(self, prompts: PromptFeatures) -> Floats:
        """Predict the frequencies of Q prompts, float64 [Q, L, E]; rows sum to 1."""
        return _frequencies(self._roots(prompts))

    def interval(self, prompts: PromptFeatures) -> tuple[Floats, Floats]:
        """Predict the ends of each frequency's interval, two [Q, L, E], from errors in training."""
        predicted = np.sqrt(self.predict(prompts))
        low: Floats = np.maximum(predicted + self.below, 0.0) ** 2
        high: Floats = np.minimum(np.maximum(predicted + self.above, 0.0), 1.0) ** 2
        return low, high

    def _roots(self, prompts: PromptFeatures) -> Floats:
        words = _words(prompts, self.idf_tokens, self.idf, self.unseen)
        roots: Floats = self.mean + (_kernel(words, self.landmarks, self.width) @ self.weights).reshape(-1, *self.mean.shape)
        return roots

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return all fields as arrays."""
        return {field.name: np.atleast_1d(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Ridge:
        """Restore what `to_arrays` returned.

        Raises: ArtifactError when arrays are missing or do not fit each other.
        """
        if wrong := _wrong(arrays):
            raise ArtifactError(f"The stored predictor is damaged: {wrong} is missing or wrong.", "Make the profile again.")
        stored: dict[str, Any] = {field.name: arrays[field.name] for field in fields(cls)}
        return cls(**stored | {name: stored[name].item() for name in _SCALARS})


def _wrong(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """Return the name of the first array that is missing, or whose shape or numbers do not fit the others; else nothing."""
    tokens, landmarks, mean = (arrays.get(name, np.empty(0)).shape for name in ("idf_tokens", "landmarks", "mean"))
    if (len(tokens), len(landmarks), len(mean)) != (1, 2, 2):
        return "idf_tokens, landmarks or mean"
    shapes = dict.fromkeys(("idf_tokens", "idf"), tokens) | dict.fromkeys(("mean", "below", "above"), mean)
    shapes |= {"landmarks": landmarks, "weights": (landmarks[0], mean[0] * mean[1]), "strengths": mean[:1]} | dict.fromkeys(_SCALARS, (1,))
    for name, shape in shapes.items():
        array = arrays.get(name)
        if array is None or array.shape != shape or array.dtype.kind != ("i" if name == "idf_tokens" else "f"):
            return name
        if not np.isfinite(array).all():
            return name
    return "width" if arrays["width"].item() <= 0 else ""


def fit(history: History, seed: int = 0) -> Ridge:
    """Fit the predictor to at least one prompt; the same history and seed give the same numbers."""
    prompts, (count, layers, experts) = history.prompts, history.frequencies.shape
    tokens, frequency = np.unique(prompts.bags.tokens, return_counts=True)
    idf, unseen = np.log((1 + count) / (1 + frequency)) + 1, np.log(1 + count) + 1
    words = _words(prompts, tokens, idf, unseen)
    random = np.random.default_rng(seed)
    chosen = np.sort(random.permutation(count)[:LANDMARKS])
    scored = np.sort(random.permutation(count)[: max(100, _SCORED_NUMBERS // (layers * experts))])
    roots = np.sqrt(history.frequencies)
    mean = roots.mean(axis=0)
    centred = (roots - mean).reshape(count, -1)
    fits = [_Regression.of(words, words[chosen], width, centred) for width in WIDTHS]
    tried = [_choose(one, centred, mean, history.frequencies, scored) for one in fits]
    best = min(range(len(fits)), key=lambda i: tried[i][0])
    regression, strengths, held_out = fits[best], tried[best][1], tried[best][2]
    errors = roots[scored] - np.sqrt(_frequencies(held_out))
    below, above = np.quantile(errors, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], axis=0)
    return Ridge(
        idf_tokens=tokens.astype(np.int32),
        idf=idf.astype(np.float32),
        unseen=float(unseen),
        landmarks=words[chosen],
        width=WIDTHS[best],
        weights=regression.weights(np.repeat(strengths, experts)).astype(np.float32),
        mean=mean.astype(np.float32),
        below=np.minimum(below, 0).astype(np.float32),
        above=np.maximum(above, 0).astype(np.float32),
        strengths=strengths,
    )


@dataclass(frozen=True)
class _Regression:
    """Ridge regression in the eigenbasis of the landmarks' features, where every strength is one division.

    basis      [m, r]  kernel values -> coordinates
    rows       [P, r]  the training prompts' coordinates
    spectrum   [r]     their squared lengths
    targets    [r, T]  rows' @ targets
    """

    basis: Floats
    rows: Floats
    spectrum: Floats
    targets: Floats

    @classmethod
    def of(cls, words: npt.NDArray[np.float32], landmarks: npt.NDArray[np.float32], width: float, targets: Floats) -> _Regression:
        values, vectors = np.linalg.eigh(_kernel(landmarks, landmarks, width))
        kept = values > values[-1] * 1e-10
        whitened = vectors[:, kept] / np.sqrt(values[kept])
        features = _kernel(words, landmarks, width) @ whitened
        spectrum, rotation = np.linalg.eigh(features.T @ features)
        rows = features @ rotation
        return cls(whitened @ rotation, rows, np.maximum(spectrum, 0.0), rows.T @ targets)

    def coordinates(self, strength: npt.ArrayLike) -> Floats:
        """Compute the coordinates [r, T] for one strength, or for one strength for each target."""
        coordinates: Floats = self.targets / (self.spectrum[:, None] + np.atleast_1d(strength)[None, :])
        return coordinates

    def weights(self, strength: npt.ArrayLike) -> Floats:
        """Compute the weights [m, T] of kernel values."""
        return self.basis @ self.coordinates(strength)

    def left_out(self, strength: float, targets: Floats, at: npt.NDArray[np.intp]) -> Floats:
        """Predict the training prompts `at`, each from the others: y - (y - fit) / (1 - leverage)."""
        rows = self.rows[at]
        leverage = (rows**2 / (self.spectrum + strength)).sum(axis=1, keepdims=True)
        left_out: Floats = targets[at] - (targets[at] - rows @ self.coordinates(strength)) / np.maximum(1 - leverage, 1e-6)
        return left_out


def _choose(
    regression: _Regression, centred: Floats, mean: Floats, frequencies: Floats, at: npt.NDArray[np.intp]
) -> tuple[float, Floats, Floats]:
    """Choose the strength of each layer by leave-one-out divergence.

    Returns: the mean divergence, the strengths [L], and the predicted roots [n, L, E].
    """
    layers = len(mean)
    best, strengths, roots = np.full(layers, np.inf), np.full(layers, STRENGTHS[-1]), np.zeros((len(at), *mean.shape))
    for strength in STRENGTHS:
        left_out = mean + regression.left_out(strength, centred, at).reshape(len(at), *mean.shape)
        score = jensen_shannon(_frequencies(left_out), frequencies[at]).mean(axis=0)
        better = score < best
        best[better], strengths[better], roots[:, better] = score[better], strength, left_out[:, better]
    return float(best.mean()), strengths, roots


def _words(prompts: PromptFeatures, tokens: npt.NDArray[Any], idf: npt.NDArray[Any], unseen: float) -> npt.NDArray[np.float32]:
    """Compute weighted sums of the prompts' embeddings, of length one, float32 [P, d]."""
    bag = prompts.bags
    at = np.minimum(np.searchsorted(tokens, bag.tokens), max(len(tokens) - 1, 0))
    weight = np.where(tokens[at] == bag.tokens, idf[at], unseen) if len(tokens) else np.full(len(bag.tokens), unseen)
    sums = prompts.table.sums(bag, np.log1p(bag.counts) * weight)
    words: npt.NDArray[np.float32] = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), np.float32(1e-12))
    return words


def _kernel(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], width: float) -> Floats:
    kernel: Floats = np.exp((a.astype(np.float64) @ b.T.astype(np.float64) - 1) / width)
    return kernel


def _frequencies(roots: Floats) -> Floats:
    squares = np.maximum(roots, _LEAST_ROOT) ** 2
    frequencies: Floats = squares / squares.sum(axis=-1, keepdims=True)
    return frequencies

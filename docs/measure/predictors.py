"""Prints the trail of docs/explanation/prediction.md: what was tried to predict activations, each idea in the same folds.

    python docs/measure/predictors.py PROFILE

Every line changes one thing. Strengths and temperatures are chosen by leave-one-out on the training folds, never on the held-out one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np

from remoe_cli.predict import baselines
from remoe_cli.predict.divergence import jensen_shannon, noise_floor
from remoe_cli.predict.evaluate import PREDICTORS, folds
from remoe_cli.predict.history import History, PromptFeatures, features_of, histories
from remoe_cli.profile.record import read_profile

Array = np.ndarray
STRENGTHS = np.geomspace(1e-3, 30, 13)
LEAST = 1e-6
# What is regressed, and back to something that is normalised to frequencies.
TARGETS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "frequencies": (lambda f: f, lambda y: np.maximum(y, LEAST)),
    "logarithms": (lambda f: np.log(f + 1e-3), np.exp),
    "square roots": (np.sqrt, lambda y: np.maximum(y, LEAST**0.5) ** 2),
}


def words(prompts: PromptFeatures, known: PromptFeatures, idf: bool, sublinear: bool) -> Array:
    bag = prompts.bags
    frequency = np.bincount(known.bags.tokens, minlength=prompts.table.weight.shape[0])
    weight = np.log((1 + len(known)) / (1 + frequency[bag.tokens])) + 1 if idf else np.ones(len(bag.tokens))
    sums = prompts.table.sums(bag, (np.log1p(bag.counts) if sublinear else bag.counts) * weight).astype(np.float64)
    return sums / np.linalg.norm(sums, axis=1, keepdims=True)


def token_overlap(a: PromptFeatures, b: PromptFeatures, known: PromptFeatures) -> Array:
    """Cosine of TF-IDF bags: the same words, whatever they mean."""
    frequency = np.bincount(known.bags.tokens, minlength=known.table.weight.shape[0])
    columns = np.flatnonzero(frequency)

    def rows(prompts: PromptFeatures) -> Array:
        out = np.zeros((len(prompts), len(frequency)), dtype=np.float32)
        weight = np.log((1 + len(known)) / (1 + frequency[prompts.bags.tokens])) + 1
        out[prompts.bags.prompt, prompts.bags.tokens] = np.log1p(prompts.bags.counts) * weight
        return out[:, columns] / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)

    return rows(a) @ rows(b).T


def normalised(values: Array) -> Array:
    return values / values.sum(axis=2, keepdims=True)


def regress(
    known: History, kernel: Array, query: Array, target: str, by_layer: bool = False, blend: Array | None = None, left: Array | None = None
) -> Array:
    """Predictions [Q, L, E]; strength by leave-one-out divergence. `blend` and `left` are neighbours' roots for queries and training."""
    there, back = TARGETS[target]
    shape = known.frequencies.shape
    y = there(known.frequencies).reshape(shape[0], -1)
    mean = y.mean(axis=0)
    values, vectors = np.linalg.eigh(kernel)
    turned = vectors.T @ (y - mean)
    best, out = np.full(shape[1], np.inf), np.zeros((len(query), *shape[1:]))
    for strength in STRENGTHS:
        inverse = 1 / (np.maximum(values, 0) + strength)
        dual = vectors @ (inverse[:, None] * turned)
        alone = (y - dual / (vectors**2 @ inverse)[:, None]).reshape(shape)
        predicted = (mean + query @ dual).reshape(-1, *shape[1:])
        for share in (0.0,) if blend is None or left is None else (0.0, 0.1, 0.2, 0.4):
            a = alone if left is None else (1 - share) * alone + share * left
            p = predicted if blend is None else (1 - share) * predicted + share * blend
            score = jensen_shannon(normalised(back(a)), known.frequencies).mean(axis=0)
            better = score < best if by_layer else np.full(shape[1], score.mean() < best.mean())
            best[better], out[:, better] = score[better], p[:, better]
    return normalised(back(out))


def neighbours_roots(known: History, queries: Array, vectors: Array, alone: bool) -> Array:
    similarities = queries @ vectors.T
    if alone:
        np.fill_diagonal(similarities, -2)
    found = np.argsort(-similarities, axis=1)[:, :15]
    weights = np.exp((np.take_along_axis(similarities, found, 1) - similarities.max(axis=1, keepdims=True)) / 0.02)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.stack([np.tensordot(w, np.sqrt(known.frequencies[f]), axes=1) for w, f in zip(weights, found, strict=True)])


def ideas(known: History, test: PromptFeatures) -> dict[str, Array]:
    out = {name: PREDICTORS[name](known, 0).predict(test) for name in ("DOP", "BF", "SPS", "neighbours")}
    own = known.prompts
    vectors = {
        "plain": (words(own, own, False, False), words(test, own, False, False)),
        "idf": (words(own, own, True, False), words(test, own, True, False)),
        "idf, log tf": (words(own, own, True, True), words(test, own, True, True)),
    }
    for temperature, roots in ((0.02, False), (1.0, True), (0.02, True)):
        name = f"BF, temperature {temperature:g}" + (", mean of square roots" if roots else "")
        out[name] = replace(baselines.brute_force(known, 0), temperature=temperature, roots=roots).predict(test)
    for target in TARGETS:
        a, q = vectors["plain"]
        out[f"linear ridge, {target}"] = regress(known, a @ a.T, q @ a.T, target)
    for name in ("idf", "idf, log tf"):
        a, q = vectors[name]
        out[f"linear ridge, square roots, {name}"] = regress(known, a @ a.T, q @ a.T, "square roots")
    a, q = vectors["idf, log tf"]
    curved = {width: (np.exp((a @ a.T - 1) / width), np.exp((q @ a.T - 1) / width)) for width in (0.25, 0.5, 1.0)}
    for width, (k, kq) in curved.items():
        out[f"kernel exp((cos - 1) / {width}), square roots, idf, log tf"] = regress(known, k, kq, "square roots")
    k, kq = curved[0.5]
    out["  the same, strength by layer"] = regress(known, k, kq, "square roots", by_layer=True)
    out["  the same, blended with neighbours"] = regress(
        known, k, kq, "square roots", True, neighbours_roots(known, q, a, False), neighbours_roots(known, a, a, True)
    )
    overlap, overlap_q = token_overlap(own, own, own), token_overlap(test, own, own)
    out["  the same, and a fifth of word overlap"] = regress(known, k + 0.2 * overlap, kq + 0.2 * overlap_q, "square roots", True)
    out["ridge (shipped)"] = PREDICTORS["ridge"](known, 0).predict(test)
    return out


def main() -> None:
    profile = read_profile(Path(sys.argv[1]))
    history = next(iter(histories(profile, features_of(profile)).values()))
    scores: dict[str, list[Array]] = {}
    for fold in folds(len(history), 5):
        known, test = history.take(np.setdiff1d(np.arange(len(history)), fold)), history.take(fold)
        for name, predicted in ideas(known, test.prompts).items():
            scores.setdefault(name, []).append(jensen_shannon(predicted, test.frequencies).mean(axis=1))
    print(f"{date.today()}, {profile.record.model.path}, {len(history)} prompts, 5 folds; divergence in bits and its standard error")
    for name, parts in scores.items():
        values = np.concatenate(parts)
        print(f"{name:<62}{values.mean():.4f} +- {values.std(ddof=1) / len(values) ** 0.5:.4f}")
    print(f"{'noise floor':<62}{noise_floor(history.frequencies, history.selections).mean():.4f}")


if __name__ == "__main__":
    main()

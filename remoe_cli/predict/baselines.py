"""The paper's predictors (method section 5): SPS, and what it is compared with, Fate excepted (predict/fate.py needs the model).

EF      every expert equally likely
DOP     the mean of the history, for every prompt
BF      softmax-weighted mean over the `alpha` most similar prompts, found by comparing with all
SPS     the same over those that the tree finds
VarPAM  SPS with a tree divided by PAM
VarED   SPS with a tree divided by the Euclidean distance of activation matrices

`temperature` is the softmax's; the paper's is 1, with which cosines, all between -1 and 1, weigh nearly alike. `tuned` chooses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from remoe_cli.predict import neighbours
from remoe_cli.predict import tree as trees
from remoe_cli.predict.divergence import jensen_shannon
from remoe_cli.predict.history import Floats, History, PromptFeatures

ALPHA = trees.ALPHA
TEMPERATURES = (1.0, 0.3, 0.1, 0.05, 0.02, 0.01, 0.005)
_TUNED_ON = 300
# query vectors [Q, d] -> the positions of their neighbours in the history and the cosines, both [Q, a]
Search = Callable[[npt.NDArray[np.float32]], tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]


@dataclass(frozen=True)
class Constant:
    """The same matrix [L, E] for every prompt."""

    frequencies: Floats

    def predict(self, prompts: PromptFeatures) -> Floats:
        return np.broadcast_to(self.frequencies, (len(prompts), *self.frequencies.shape))


@dataclass(frozen=True)
class Neighbours:
    """Softmax-weighted mean of similar prompts' frequencies, or with `roots` of their square roots (Hellinger mean)."""

    frequencies: Floats
    search: Search
    temperature: float = 1.0
    roots: bool = False

    def predict(self, prompts: PromptFeatures) -> Floats:
        found, similarities = self.search(prompts.vectors)
        return _mean(self.frequencies, found, similarities, self.temperature, self.roots)


def equal_frequency(history: History, seed: int) -> Constant:
    shape = history.frequencies.shape[1:]
    return Constant(np.full(shape, 1 / shape[1]))


def history_mean(history: History, seed: int) -> Constant:
    return Constant(history.frequencies.mean(axis=0))


def brute_force(history: History, seed: int) -> Neighbours:
    return Neighbours(history.frequencies, _nearest(neighbours.build(history.prompts.vectors, exact=len(history))))


def sps(history: History, seed: int) -> Neighbours:
    return over_tree(history, trees.build(history.prompts.vectors, seed=seed))


def var_pam(history: History, seed: int) -> Neighbours:
    return over_tree(history, trees.build(history.prompts.vectors, seed=seed, method="pam"))


def var_ed(history: History, seed: int) -> Neighbours:
    return over_tree(history, trees.build(history.prompts.vectors, features=history.frequencies, seed=seed))


def over_tree(history: History, tree: trees.Tree) -> Neighbours:
    """SPS over a tree that is there already."""
    return Neighbours(history.frequencies, _in_tree(tree))


def tuned(history: History, seed: int) -> Neighbours:
    """The default search, with the temperature, and the mean of frequencies or of their roots, that suit the history best."""
    return tuned_over(history, neighbours.build(history.prompts.vectors), seed)


def tuned_over(history: History, nearest: neighbours.Nearest, seed: int) -> Neighbours:
    """`tuned` over a search that is there already. Each prompt's own neighbourhood is without itself (leave one out)."""
    at = np.sort(np.random.default_rng(seed).permutation(len(history))[:_TUNED_ON])
    found, closeness = neighbours.search(nearest, history.prompts.vectors[at], alpha=ALPHA + 1)
    # A prompt is its own closest, but for others that are just alike: the first place goes, whoever stands there, unless it is elsewhere.
    own = np.where((found == at[:, None]).any(axis=1), (found == at[:, None]).argmax(axis=1), 0)
    others = np.arange(found.shape[1]) != own[:, None]
    found, closeness = found[others].reshape(len(at), -1), closeness[others].reshape(len(at), -1)

    def divergence(choice: tuple[float, bool]) -> float:
        predicted = _mean(history.frequencies, found, closeness, *choice)
        return float(jensen_shannon(predicted, history.frequencies[at]).mean())

    choices = [(temperature, roots) for temperature in TEMPERATURES for roots in (False, True)]
    temperature, roots = min(choices, key=divergence) if found.size else choices[0]
    return Neighbours(history.frequencies, _nearest(nearest), temperature, roots)


def _mean(
    frequencies: Floats, found: npt.NDArray[np.int32], similarities: npt.NDArray[np.float32], temperature: float, roots: bool
) -> Floats:
    """[Q, L, E] from neighbours and cosines [Q, a]."""
    weights = np.exp((similarities.astype(np.float64) - similarities.max(axis=1, keepdims=True)) / temperature)
    weights /= weights.sum(axis=1, keepdims=True)
    known = np.sqrt(frequencies) if roots else frequencies
    # One prompt at a time: all neighbours' matrices of all prompts at once may not fit into memory.
    mean = np.stack([np.tensordot(w, known[f], axes=1) for w, f in zip(weights, found, strict=True)])
    if roots:
        mean = mean**2
    predicted: Floats = mean / mean.sum(axis=2, keepdims=True)
    return predicted


def _nearest(nearest: neighbours.Nearest) -> Search:
    return lambda queries: neighbours.search(nearest, queries, alpha=ALPHA)


def _in_tree(tree: trees.Tree) -> Search:
    return lambda queries: trees.search(tree, queries, alpha=ALPHA)

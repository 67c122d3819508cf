"""The paper's predictors: SPS, and all that it is compared with except Fate.

Fate needs the model, and is in fate.py.

EF       every expert equally often
DOP      the mean of the history, for every prompt
BF       the softmax-weighted mean over the `alpha` most similar prompts, found by comparing all
SPS      the same over the prompts that the tree finds
VarPAM   SPS with a tree that PAM divides
VarED    SPS with a tree divided by the Euclidean distance of activation matrices

`temperature` is that of the softmax. The paper's is 1, and then cosines, which are between -1 and 1, get nearly equal weights. `tuned`
chooses it.

Source: method.md, section 5.
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
        """Predict the same matrix for each of Q prompts, [Q, L, E]."""
        return np.broadcast_to(self.frequencies, (len(prompts), *self.frequencies.shape))


@dataclass(frozen=True)
class Neighbours:
    """The softmax-weighted mean of similar prompts' frequencies, or of their roots (Hellinger mean)."""

    frequencies: Floats
    search: Search
    temperature: float = 1.0
    roots: bool = False

    def predict(self, prompts: PromptFeatures) -> Floats:
        """Predict the frequencies of Q prompts, [Q, L, E]."""
        found, similarities = self.search(prompts.vectors)
        return _mean(self.frequencies, found, similarities, self.temperature, self.roots)


def equal_frequency(history: History, seed: int) -> Constant:
    """Fit EF."""
    shape = history.frequencies.shape[1:]
    return Constant(np.full(shape, 1 / shape[1]))


def history_mean(history: History, seed: int) -> Constant:
    """Fit DOP."""
    return Constant(history.frequencies.mean(axis=0))


def brute_force(history: History, seed: int) -> Neighbours:
    """Fit BF."""
    return Neighbours(history.frequencies, _nearest(neighbours.build(history.prompts.vectors, exact=len(history))))


def sps(history: History, seed: int) -> Neighbours:
    """Fit SPS."""
    return over_tree(history, trees.build(history.prompts.vectors, seed=seed))


def var_pam(history: History, seed: int) -> Neighbours:
    """Fit VarPAM."""
    return over_tree(history, trees.build(history.prompts.vectors, seed=seed, method="pam"))


def var_ed(history: History, seed: int) -> Neighbours:
    """Fit VarED."""
    return over_tree(history, trees.build(history.prompts.vectors, features=history.frequencies, seed=seed))


def over_tree(history: History, tree: trees.Tree) -> Neighbours:
    """Fit SPS over a tree that is built already."""
    return Neighbours(history.frequencies, _in_tree(tree))


def tuned(history: History, seed: int) -> Neighbours:
    """Fit the mean of similar prompts, with the temperature and the kind of mean that suit best."""
    return tuned_over(history, neighbours.build(history.prompts.vectors), seed)


def tuned_over(history: History, nearest: neighbours.Nearest, seed: int) -> Neighbours:
    """Do what `tuned` does, over an index that is built already.

    A prompt is not its own neighbour (leave one out).
    """
    at = np.sort(np.random.default_rng(seed).permutation(len(history))[:_TUNED_ON])
    found, closeness = neighbours.search(nearest, history.prompts.vectors[at], alpha=ALPHA + 1)
    # A prompt is the closest to itself, unless others are equal to it. It is left out where it is found, else the first place is.
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
    """Average the neighbours' frequencies.

    Shapes: found and similarities [Q, a]; returns [Q, L, E].
    """
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

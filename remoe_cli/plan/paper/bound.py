"""The most tokens that some experts of a layer get out of n: the paper's bound, and a calibrated one.

Both are about the m least used experts of each layer, X_lm(n) tokens together and Y_lm(n) the largest single one's, and should hold with
probability LEVEL. A token uses at most min(k_top, m) of m experts, and none twice: no bound is above n min(k_top, m), or n.

**Paper.** n independent draws of mean m/K exceed it by sqrt(3 n / 2) with probability 5% (Hoeffding: exp(-2 t^2 / n) at t = sqrt(1.498 n)):
  literal: X_lm <= n m / K + sqrt(3 n / 2);   with k_top: X_lm <= k_top n m / K + sqrt(3 n / 2);   Y_lm likewise, at m = 1.
A token makes k_top draws, so only the second has the right mean. Neither knows that routers are not uniform and that prompts differ.

**Calibrated.** Of P prompts, X_lm / n has the mean p_lm, and a prompt's own share scatters around it: for n tokens drawn from that share
  sd_lm(n)^2 = a_lm n + c_lm n^2,   a_lm = p_lm (1 - p_lm / min(k_top, m)),   c_lm = mean of (X_lm / n - p_lm)^2 - a_lm / n, at least 0,
so that the scale is right for shorter and longer prompts too (p and c as with one more prompt, of uniform routing). A prompt's score is its
worst layer's, max_l (X_lm - n p_lm) / sd_lm(n), with order, p and c of the other folds' prompts. With q_m the score at `place` (P),
X_lm <= n p_lm + q_m sd_lm(n) in all layers at once for a share LEVEL of prompts like these, whatever their distribution. Y_lm likewise,
with 1 for min(k_top, m).

A bound is calibrated once and then used, so its coverage must not depend on the luck of these P prompts. The share of all prompts
whose score is below the j-th smallest of P is at least LEVEL with probability P(Bin(P, LEVEL) < j); q_m is the first score at which that is
CONFIDENCE. (Split conformal's ceil((P + 1) LEVEL)-th smallest, which is lower, gives LEVEL only in the mean over draws of the P prompts.)

Source: method.md, section 6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.problem.problem import Problem

LEVEL = 0.95
CONFIDENCE = 0.9
FOLDS = 10
Counts = npt.NDArray[np.integer]


class TokenBound(Protocol):
    """The most of n tokens that the `m` least used experts of each layer get.

    together   all of them together
    largest    any single one

    Shapes: [L].
    """

    @property
    def name(self) -> str: ...

    def together(self, n: float, m: int) -> Floats: ...

    def largest(self, n: float, m: int) -> Floats: ...


@dataclass(frozen=True)
class PaperBound:
    """The paper's bound. `literal` takes each token as one draw, as the paper writes it."""

    layers: int
    experts: int
    top_k: int
    literal: bool = False

    @property
    def name(self) -> str:
        return "paper, literal" if self.literal else "paper"

    def together(self, n: float, m: int) -> Floats:
        draws = 1 if self.literal else self.top_k
        return np.full(self.layers, min(draws * n * m / self.experts + math.sqrt(1.5 * n), n * min(self.top_k, m)))

    def largest(self, n: float, m: int) -> Floats:
        return self.together(n, min(m, 1))


@dataclass(frozen=True)
class Calibrated:
    """A bound that `calibrate` made.

    mean, drawn, spread   p, a and c, [2, L, K] at m - 1; the first axis is X, Y
    factor                q, [2, K]
    """

    top_k: int
    mean: Floats
    drawn: Floats
    spread: Floats
    factor: Floats

    @property
    def name(self) -> str:
        return "calibrated"

    def together(self, n: float, m: int) -> Floats:
        return self._at(0, n, m, min(self.top_k, m))

    def largest(self, n: float, m: int) -> Floats:
        return self._at(1, n, m, 1)

    def _at(self, what: int, n: float, m: int, most: int) -> Floats:
        if m == 0 or n == 0:
            return np.zeros(self.mean.shape[1])
        sd = np.sqrt(self.drawn[what, :, m - 1] * n + self.spread[what, :, m - 1] * n**2)
        at_most: Floats = np.minimum(n * self.mean[what, :, m - 1] + self.factor[what, m - 1] * sd, n * most)
        return at_most


def paper_bound(problem: Problem) -> PaperBound:
    """Make the paper's bound for a problem."""
    layers, experts = problem.workload.use.shape
    return PaperBound(layers, experts, problem.spec.top_k)


def least_first(counts: Counts) -> Ints:
    """Order the experts of each layer by rising use; of equals, the lower id goes first.

    Shapes: `counts` [P, L, K]; int64 [L, K].
    """
    order: Ints = np.argsort(counts.sum(axis=0, dtype=np.int64), axis=1, kind="stable")
    return order


def place(prompts: int) -> int | None:
    """Find which of the scores, counted from 1, bounds a new one.

    Fewer than 45 prompts cannot give CONFIDENCE: then it is the largest, which still covers LEVEL in the mean. Fewer than 19 cannot give
    that either: None.
    """
    if prompts < LEVEL * (prompts + 1) - 1e-9:
        return None
    below = 0.0
    for j in range(prompts):
        log = math.lgamma(prompts + 1) - math.lgamma(j + 1) - math.lgamma(prompts - j + 1)
        below += math.exp(log + j * math.log(LEVEL) + (prompts - j) * math.log(1 - LEVEL))
        if below >= CONFIDENCE:
            return j + 1
    return prompts


def calibrate(counts: Counts, tokens: Counts, top_k: int) -> Calibrated:
    """Calibrate a bound for the least used experts on P prompts; prompts without tokens are left out.

    Shapes: `counts` [P, L, K], `tokens` [P].
    """
    counts, tokens = counts[tokens > 0], tokens[tokens > 0]
    prompts, layers, experts = counts.shape
    at = place(prompts)
    scores = np.full((2, prompts, experts), -np.inf)
    fold = np.random.default_rng(0).permutation(prompts) % FOLDS  # profiles come sorted by topic: neighbours are alike
    for layer in range(layers if at else 0):
        for held in (fold == f for f in range(FOLDS)):
            others = _moments(counts[~held, layer], tokens[~held], top_k)
            scores[:, held] = np.maximum(scores[:, held], others.scores(counts[held, layer], tokens[held]))
    moments = [_moments(counts[:, layer], tokens, top_k) for layer in range(layers)]
    return Calibrated(
        top_k=top_k,
        mean=np.stack([one.mean for one in moments], axis=1),
        drawn=np.stack([one.drawn for one in moments], axis=1),
        spread=np.stack([one.spread for one in moments], axis=1),
        factor=np.sort(scores, axis=1)[:, at - 1] if at else np.full((2, experts), np.inf),
    )


@dataclass(frozen=True)
class _Moments:
    """The order of one layer's experts [K], and p, a and c as [2, K]."""

    order: Ints
    mean: Floats
    drawn: Floats
    spread: Floats

    def scores(self, counts: Counts, tokens: Counts) -> Floats:
        """Score prompts.

        Shapes: [2, P, K].
        """
        n = tokens[:, None].astype(np.float64)
        sd = np.sqrt(self.drawn[:, None] * n + self.spread[:, None] * n**2)
        scores: Floats = (_prefixes(counts, self.order) - n * self.mean[:, None]) / sd
        return scores


def _moments(counts: Counts, tokens: Counts, top_k: int) -> _Moments:
    order = least_first(counts[:, None])[0]
    n = tokens[:, None].astype(np.float64)
    shares = _prefixes(counts, order) / n
    prompts, experts = counts.shape
    sizes = np.arange(1, experts + 1)
    most = np.stack([np.minimum(top_k, sizes), np.ones(experts)])
    # One more prompt that uses all experts alike: without it, experts that no prompt used would have no scale, and be taken for never used.
    alike = np.minimum(most, np.stack([top_k * sizes / experts, np.full(experts, top_k / experts)]))
    mean = (shares.sum(axis=1) + alike) / (prompts + 1)
    drawn = np.maximum(mean * (1 - mean / most), 1e-9)  # 0 where all experts are meant
    scatter = (np.square(shares - mean[:, None]) - drawn[:, None] / n).sum(axis=1) + np.square(alike - mean)
    return _Moments(order, mean, drawn, np.maximum(0.0, scatter / (prompts + 1)))


def _prefixes(counts: Counts, order: Ints) -> Floats:
    """Count the tokens of the m = 1 .. K first experts of an order, together and of the largest.

    Shapes: `counts` [P, K]; [2, P, K].
    """
    ordered = counts[:, order].astype(np.float64)
    return np.stack([np.cumsum(ordered, axis=1), np.maximum.accumulate(ordered, axis=1)])


@dataclass(frozen=True)
class Coverage:
    """How often a bound holds for prompts that it has not seen.

    single    share of (prompt, layer) pairs in which it holds; for single experts, of (prompt, layer, expert)
    at_once   share of prompts for which it holds in all layers (and for all experts)
    """

    single: float
    at_once: float


def coverage(bound: TokenBound, counts: Counts, tokens: Counts, order: Ints, m: int) -> Coverage:
    """Measure the bound on what the first m experts of an order get together.

    Shapes: `counts` [P, L, K], `order` [L, K].
    """
    got = np.take_along_axis(counts, order[None, :, :m], axis=2).sum(axis=2)
    holds = got <= np.array([bound.together(float(n), m) for n in tokens]) + 1e-9
    return Coverage(float(holds.mean()), float(holds.all(axis=1).mean()))


def expert_coverage(bound: TokenBound, counts: Counts, tokens: Counts) -> Coverage:
    """Measure the bound on what each single expert gets."""
    largest = np.array([bound.largest(float(n), counts.shape[2]) for n in tokens])
    holds = counts <= largest[:, :, None] + 1e-9
    return Coverage(float(holds.mean()), float(holds.all(axis=(1, 2)).mean()))


def measured_note(counts: Counts, tokens: Counts, top_k: int, m: int) -> str | None:
    """Say how often the paper's bound, and a calibrated one, hold in all layers at once.

    They are known from every other prompt and measured on the rest, for the `m` least used experts; None when there are too few prompts.
    """
    known = np.arange(len(tokens)) % 2 == 0
    if place(int(known.sum())) is None or not m:
        return None
    order, bounds = (
        least_first(counts[known]),
        (PaperBound(counts.shape[1], counts.shape[2], top_k), calibrate(counts[known], tokens[known], top_k)),
    )
    held = [coverage(bound, counts[~known], tokens[~known], order, m).at_once for bound in bounds]
    return (
        f"The paper's worst-case bound was used; for the {m} least used experts of every layer it holds for {held[0]:.1%} of "
        f"{(~known).sum()} prompts that were held out, a bound calibrated on the others for {held[1]:.1%}."
    )

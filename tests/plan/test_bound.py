"""Worst-case bounds: the paper's as written, what the calibrated one covers of prompts it has not seen, and coverage on a known law."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from remoe_cli.plan.paper.bound import (
    Calibrated,
    Coverage,
    PaperBound,
    calibrate,
    coverage,
    expert_coverage,
    least_first,
    measured_note,
    place,
)

LAYERS, EXPERTS, TOP_K = 4, 16, 3


def prompts(seed: int, count: int, scatter: float, tokens: tuple[float, float] = (3.0, 0.8)) -> tuple[np.ndarray, np.ndarray]:
    """Counts [P, L, K] and tokens [P] of exchangeable prompts: lengths are lognormal, and each prompt's popularity of experts is the
    model's times exp of normal noise; every token uses TOP_K different experts."""
    popularity = np.random.default_rng(99).standard_normal((LAYERS, EXPERTS))  # the model, the same for every seed
    random = np.random.default_rng(seed)
    lengths = random.lognormal(*tokens, count).astype(int) + 5
    counts = np.zeros((count, LAYERS, EXPERTS), dtype=np.int64)
    for prompt, n in enumerate(lengths):
        logits = popularity + scatter * random.standard_normal((LAYERS, EXPERTS))
        chosen = np.argpartition(-(logits + random.gumbel(size=(n, LAYERS, EXPERTS))), TOP_K, axis=2)[:, :, :TOP_K]
        for layer in range(LAYERS):
            counts[prompt, layer] = np.bincount(chosen[:, layer].ravel(), minlength=EXPERTS)
    return counts, lengths


@dataclass(frozen=True)
class Above:
    """A bound `by` tokens above uniform routing of one expert a token."""

    by: float
    name: str = "above"

    def together(self, n: float, m: int) -> np.ndarray:
        return np.full(LAYERS, n * m / EXPERTS + self.by)

    def largest(self, n: float, m: int) -> np.ndarray:
        return self.together(n, 1)


def test_paper_bounds_are_the_papers_formulas() -> None:
    n, m = 96, 16
    for literal, draws in ((True, 1), (False, 6)):
        bound = PaperBound(layers=2, experts=64, top_k=6, literal=literal)
        assert bound.together(n, m).tolist() == pytest.approx([draws * n * m / 64 + 12] * 2)  # sqrt(3 x 96 / 2) = 12
        assert bound.largest(n, m).tolist() == bound.together(n, 1).tolist() == pytest.approx([draws * n / 64 + 12] * 2)
    assert bound.together(4, 64).tolist() == [24, 24]  # no token has more than 6
    assert bound.together(4, 2).tolist() == pytest.approx([4 * 6 * 2 / 64 + math.sqrt(6)] * 2)
    assert bound.largest(1, 3).tolist() == [1, 1] and bound.together(9, 0).tolist() == bound.largest(9, 0).tolist() == [0, 0]


def test_coverage_is_that_of_a_known_law() -> None:
    """One uniform expert a token: m experts together get a binomial count, layers are independent."""
    n, m, prompts_ = 40, 4, 3000
    random = np.random.default_rng(1)
    counts = random.multinomial(n, np.full(EXPERTS, 1 / EXPERTS), size=(prompts_, LAYERS))
    tokens = np.full(prompts_, n)
    order = np.tile(random.permutation(EXPERTS), (LAYERS, 1))
    for by in (0.0, 2.0, 4.0):
        at_most = math.floor(n * m / EXPERTS + by)
        probability = sum(math.comb(n, i) * (m / EXPERTS) ** i * (1 - m / EXPERTS) ** (n - i) for i in range(at_most + 1))
        found = coverage(Above(by), counts, tokens, order, m)
        assert found.single == pytest.approx(probability, abs=0.02)
        assert found.at_once == pytest.approx(probability**LAYERS, abs=0.04)
        single = sum(math.comb(n, i) / EXPERTS**i * (1 - 1 / EXPERTS) ** (n - i) for i in range(math.floor(n / EXPERTS + by) + 1))
        assert expert_coverage(Above(by), counts, tokens).single == pytest.approx(single, abs=0.02)
    one = np.zeros((1, LAYERS, EXPERTS), dtype=int)
    one[0, 0, order[0, :2]], one[0, 1, order[1, -1]] = 6, 9  # together 12 in one layer, none in the others; one expert alone has 9
    tokens = np.array([16])
    assert coverage(Above(7.0), one, tokens, order, 2) == Coverage(0.75, 0.0)
    assert coverage(Above(7.0), one, tokens, order, 1) == Coverage(1.0, 1.0)
    assert expert_coverage(Above(7.0), one, tokens) == Coverage(1 - 1 / one.size, 0.0)


def test_only_the_bound_with_k_top_has_the_right_mean() -> None:
    random = np.random.default_rng(2)
    chosen = random.random((200, 100, LAYERS, EXPERTS)).argsort(axis=3)[..., :TOP_K]  # uniform, without replacement
    counts = (chosen[..., None] == np.arange(EXPERTS)).sum(axis=(1, 3))
    tokens = np.full(200, 100)
    order = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    literal, k_top = (PaperBound(LAYERS, EXPERTS, TOP_K, literal) for literal in (True, False))
    for m in (4, 8, 12):
        assert coverage(k_top, counts, tokens, order, m).single > 0.95
        assert coverage(literal, counts, tokens, order, m).single < 0.05


@pytest.mark.parametrize("scatter", [0.0, 0.5, 2.0])
def test_calibrated_covers_what_it_promises_and_says_something(scatter: float) -> None:
    """In all layers at once, of prompts it has not seen, over draws of the prompts that it was calibrated on."""
    held, lengths = prompts(1000, 700, scatter)
    found = []
    for seed in range(8):
        counts, tokens = prompts(seed, 120, scatter)
        bound, order = calibrate(counts, tokens, TOP_K), least_first(counts)
        found.append(
            [coverage(bound, held, lengths, order, m).at_once for m in (1, 4, 8, 12)] + [expert_coverage(bound, held, lengths).at_once]
        )
    assert np.mean(found, axis=0).min() >= 0.95, np.mean(found, axis=0)
    # An order statistic that holds 95% with a confidence of 90%: of 8 draws one may miss, and not by much.
    assert np.quantile(found, 0.15) >= 0.945 and np.min(found) > 0.9, found
    assert np.mean(found) < 0.998
    bounded = np.array([bound.together(float(n), 4).max() / n for n in lengths if n > 20])
    assert np.median(bounded) < 0.8 * TOP_K  # far below what is trivially true


def test_calibrated_scale_is_right_for_other_lengths() -> None:
    """Calibrated on long prompts, the bound holds for short ones, whose shares scatter more."""
    counts, tokens = prompts(3, 200, 0.5, (5.0, 0.3))
    bound, order = calibrate(counts, tokens, TOP_K), least_first(counts)
    held, lengths = prompts(4, 700, 0.5, (2.5, 0.3))
    assert lengths.max() < tokens.min()
    for m in (4, 8, 12):
        assert coverage(bound, held, lengths, order, m).at_once >= 0.93


def test_a_prompt_is_not_scored_by_what_it_taught() -> None:
    """Each prompt uses few experts of its own, so those that no known prompt used look safer than they are."""
    random = np.random.default_rng(5)

    def draw(count: int) -> np.ndarray:
        own = random.random((count, LAYERS, 64)).argsort(axis=2)[..., :3]
        sizes = random.integers(1, 40, size=own.shape)
        return ((own[..., None] == np.arange(64)) * sizes[..., None]).sum(axis=2)

    held, found = draw(600), []
    for _ in range(6):
        counts = draw(48)
        bound = calibrate(counts, np.full(48, 120), 1)
        found.append(coverage(bound, held, np.full(600, 120), least_first(counts), 8).at_once)
    assert np.mean(found) >= 0.95


def test_the_score_that_bounds_a_new_one() -> None:
    """The share of a uniform law below the chosen order statistic is 95% or more in 90% of draws, and with the one before it is not."""
    assert [place(n) for n in (1, 18, 19, 44, 45)] == [None, None, 19, 44, 45]
    uniform = np.sort(np.random.default_rng(6).random((20_000, 149)), axis=1)
    at = place(149)
    assert at is not None and (uniform[:, at - 1] >= 0.95).mean() >= 0.9 > (uniform[:, at - 2] >= 0.95).mean()
    assert np.random.default_rng(7).random((20_000, 19)).max(axis=1).mean() >= 0.949  # 19/20: the mean coverage of the largest of 19


def test_few_prompts_bound_nothing_beyond_the_trivial() -> None:
    counts, tokens = prompts(8, 18, 0.5)
    bound = calibrate(counts, tokens, TOP_K)
    assert bound.together(10, 8).tolist() == [30.0] * LAYERS and bound.largest(10, 8).tolist() == [10.0] * LAYERS
    assert bound.together(10, 2).tolist() == [20.0] * LAYERS and bound.together(10, 0).tolist() == [0.0] * LAYERS
    more, lengths = prompts(8, 19, 0.5)
    assert calibrate(more, lengths, TOP_K).together(1000, 4).max() < 1000


def test_prompts_without_tokens_do_not_count() -> None:
    counts, tokens = prompts(9, 60, 0.5)
    empty = np.concatenate([np.zeros((30, LAYERS, EXPERTS), dtype=int), counts])
    without, found = calibrate(counts, tokens, TOP_K), calibrate(empty, np.concatenate([np.zeros(30, dtype=int), tokens]), TOP_K)
    assert isinstance(found, Calibrated)
    assert np.array_equal(found.factor, without.factor) and np.array_equal(found.mean, without.mean)


def test_a_plan_says_how_often_its_bound_held() -> None:
    random = np.random.default_rng(0)
    counts = random.multinomial(400, np.full(8, 1 / 8), size=(120, 3))
    tokens = np.full(120, 100)
    note = measured_note(counts, tokens, 4, 4)
    assert note is not None and "for the 4 least used experts" in note and "of 60 prompts" in note
    assert float(note.split("calibrated on the others for ")[1].rstrip("%.")) >= 85
    assert measured_note(counts[:6], tokens[:6], 4, 4) is None and measured_note(counts, tokens, 4, 0) is None

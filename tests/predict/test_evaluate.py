"""Scores of predictors: what the numbers mean, and that no predictor sees what it is scored on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from remoe_cli.errors import ModelError, UsageError
from remoe_cli.model.checkpoint import find
from remoe_cli.model.vectors import Bags
from remoe_cli.predict import baselines, evaluate, ridge
from remoe_cli.predict.divergence import jensen_shannon, noise_floor, remote_hits
from remoe_cli.predict.evaluate import OURS, PREDICTORS, folds, similarity
from remoe_cli.predict.fate import ask_routers
from remoe_cli.predict.history import History, PromptFeatures
from tests.support.families import EXPERTS, TOP_K, save
from tests.support.topical import topical


@pytest.fixture(scope="module")
def history() -> History:
    return topical(150)


@pytest.fixture(scope="module")
def scored(history: History) -> evaluate.Evaluation:
    return evaluate.evaluate(history, "request", k=3, progress=lambda done, total: None)


def test_divergence_in_bits() -> None:
    p, q = np.array([0.5, 0.5, 0.0, 0.0]), np.array([0.0, 0.0, 0.25, 0.75])
    assert jensen_shannon(p, p) == 0
    assert jensen_shannon(p, q) == pytest.approx(1)
    # By hand: the middle is (3/4, 1/4), H = 0.8113; less half of H(1, 0) + H(1/2, 1/2) = 1/2.
    assert jensen_shannon(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(0.811278 - 0.5, abs=1e-6)
    assert jensen_shannon(np.stack([p, q]), p) == pytest.approx([0, 1])


def test_the_noise_floor_is_what_the_true_frequencies_score() -> None:
    true = np.random.default_rng(0).dirichlet(np.ones(8), size=(200, 4))
    drawn = np.random.default_rng(7).multinomial(50, true)
    expected = jensen_shannon(true, drawn / 50).mean()
    assert noise_floor(true, np.full(200, 50)).mean() == pytest.approx(expected, rel=0.05)
    assert noise_floor(true, np.full(200, 500)).mean() == pytest.approx(expected / 10, rel=0.2)


def test_remote_hits_are_those_of_the_experts_predicted_least() -> None:
    true = np.array([[[0.1, 0.2, 0.3, 0.4]]])
    assert remote_hits(true, true, 2) == pytest.approx([0.3])
    assert remote_hits(true[..., ::-1], true, 2) == pytest.approx([0.7])
    assert remote_hits(true, true, 0) == pytest.approx([0])


def test_folds_hold_each_prompt_out_once() -> None:
    parts = folds(17, 5)
    assert sorted(np.concatenate(parts).tolist()) == list(range(17))
    assert {len(part) for part in parts} == {3, 4}
    assert [p.tolist() for p in parts] == [p.tolist() for p in folds(17, 5)]


def test_no_predictor_sees_the_prompts_it_is_scored_on(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt's first frequency is made its number, so that a fit can tell which prompts it was given."""
    marked = History(history.prompts, history.frequencies.copy(), history.selections)
    marked.frequencies[:, 0, 0] = np.arange(len(history))
    given: list[set[int]] = []

    def spy(known: History, seed: int) -> baselines.Constant:
        given.append({int(x) for x in known.frequencies[:, 0, 0]})
        return baselines.equal_frequency(known, seed)

    monkeypatch.setattr(evaluate, "PREDICTORS", {OURS: ridge.fit, "spy": spy})
    evaluate.evaluate(history=marked, view="request", k=3, progress=lambda done, total: None)
    everyone = set(range(len(history)))
    assert [everyone - g for g in given] == [set(fold.tolist()) for fold in folds(len(history), 3)]


def test_the_table_orders_predictors_as_they_are(scored: evaluate.Evaluation) -> None:
    bits = {name: score.jsd_bits for name, score in scored.predictors.items()}
    assert list(bits) == list(PREDICTORS)
    assert scored.noise_floor_bits < bits[OURS] < bits["SPS"] < bits["DOP"] < bits["EF"]
    assert 0.99 < bits["SPS"] / bits["BF"] < 1.03
    for score in scored.predictors.values():
        assert len(score.folds) == 3 and np.mean(score.folds) == pytest.approx(score.jsd_bits)
        assert score.build_s > 0 and score.search_ms > 0
    shares = {name: score.remote_hit_share for name, score in scored.predictors.items()}
    assert scored.oracle_remote_hit_share < shares[OURS] < shares["DOP"]
    assert abs(scored.interval_coverage - scored.interval_nominal) < 0.06


def test_scores_are_what_the_predictor_itself_gives(history: History, scored: evaluate.Evaluation) -> None:
    means = []
    for fold in folds(len(history), 3):
        rest = np.setdiff1d(np.arange(len(history)), fold)
        mean = history.frequencies[rest].mean(axis=0)
        means.append(jensen_shannon(mean[None], history.frequencies[fold]).mean())
    assert scored.predictors["DOP"].folds == pytest.approx(means)


def test_too_few_prompts_for_the_folds_are_refused() -> None:
    with pytest.raises(UsageError, match="7 prompts with decode routing are too few for 4 folds"):
        evaluate.evaluate(topical(7), "decode", k=4, progress=lambda done, total: None)


def test_similar_prompts_use_similar_experts(history: History) -> None:
    pairs = similarity(history)
    assert pairs.correlation == pytest.approx(np.corrcoef(pairs.semantic, pairs.activation)[0, 1])
    assert pairs.correlation > 0.5
    order = np.random.default_rng(1).permutation(len(history))
    assert abs(similarity(History(history.prompts, history.frequencies[order], history.selections)).correlation) < 0.1


def test_temperature_is_chosen_by_leaving_each_prompt_out(history: History) -> None:
    chosen = baselines.tuned(history, 0)
    assert chosen.temperature in baselines.TEMPERATURES
    test = topical(80, seed=4)

    def score(predictor: baselines.Neighbours) -> float:
        return float(jensen_shannon(predictor.predict(test.prompts), test.frequencies).mean())

    assert score(chosen) < score(baselines.sps(history, 0))


def test_the_papers_softmax_weighs_by_similarity(history: History) -> None:
    predictor = baselines.brute_force(history, 0)
    test = topical(5, seed=3)
    a, b = (h.prompts.vectors / np.linalg.norm(h.prompts.vectors, axis=1, keepdims=True) for h in (test, history))
    for prompt in range(5):
        cosines = b @ a[prompt]
        best = np.argsort(-cosines)[:15]
        weights = np.exp(cosines[best].astype(np.float64)) / np.exp(cosines[best].astype(np.float64)).sum()
        expected = (weights[:, None, None] * history.frequencies[best]).sum(axis=0)
        assert np.allclose(predictor.predict(test.prompts)[prompt], expected, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_fate_asks_the_routers_about_the_embeddings(family: str, tmp_path: Path) -> None:
    model = save(family, torch.float32, tmp_path, fused=False)
    tokens = np.array([3, 7, 7, 90], dtype=np.int32)
    layers = [number for number, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    fate = ask_routers(find(str(tmp_path)), tokens, layers)
    assert fate.choices.shape == (3, len(layers), TOP_K)
    seen: list[torch.Tensor] = []
    for number in layers:
        block = model.model.layers[number].mlp
        handle = block.experts.register_forward_pre_hook(lambda _module, args: seen.append(args[1]))
        with torch.inference_mode():
            block(model.get_input_embeddings()(torch.tensor([[3, 7, 90]])))
        handle.remove()
    expected = torch.stack(seen, dim=1).sort(dim=2).values.numpy()
    assert np.array_equal(np.sort(fate.choices, axis=2), expected)

    bag = Bags(*(np.array(x, dtype=np.int32) for x in ([2], [3, 7], [1, 3])))
    prompts = PromptFeatures(np.zeros((1, 4), dtype=np.float32), bag, None)  # type: ignore[arg-type]
    counts = sum(n * np.stack([np.bincount(row, minlength=EXPERTS) for row in fate.choices[i]]) for i, n in ((0, 1), (1, 3)))
    assert np.allclose(fate.predict(prompts)[0], counts / (4 * TOP_K))


def test_fate_refuses_what_it_cannot_ask(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError):
        ask_routers(find(str(tmp_path)), np.array([1], dtype=np.int32), [0])

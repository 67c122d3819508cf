"""The predictor that a profile carries, and `remoe predict` on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli import artifacts
from remoe_cli.cli import app
from remoe_cli.errors import UsageError
from remoe_cli.predict import ridge
from remoe_cli.predict.divergence import jensen_shannon
from remoe_cli.predict.evaluate import PREDICTORS, folds
from remoe_cli.predict.history import features_from, features_of, histories
from remoe_cli.predict.train import CANDIDATES, PredictorRecord, train, trained
from remoe_cli.profile.prompts import PromptSet
from remoe_cli.profile.record import Profile, RoutingRef, read_profile, write_profile
from tests.profile.test_run import WORDS, save_checkpoint
from tests.support.synthetic import synthetic_profile

PROMPTS, EXPERTS, LAYERS = 60, 4, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


def texts(prompts: int = PROMPTS) -> tuple[str, ...]:
    """Prompts of ten words from one third of the vocabulary each."""
    random = np.random.default_rng(0)
    third = len(WORDS) // 3
    return tuple(" ".join(random.choice(WORDS[i % 3 * third :][:third], 10)) for i in range(prompts))


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A profile in which the third of the vocabulary that a prompt is from decides its experts."""
    from remoe_cli.model.checkpoint import find
    from remoe_cli.model.vectors import prompt_features
    from remoe_cli.profile.record import ModelRef

    folder = tmp_path_factory.mktemp("profile")
    base = synthetic_profile(folder / "base", layers=LAYERS, experts=EXPERTS, prompts=PROMPTS)
    random = np.random.default_rng(1)
    liking = np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7], [0.05, 0.45, 0.45, 0.05]])
    counts = np.stack([random.multinomial(80, liking[i % 3], size=LAYERS) for i in range(PROMPTS)]).astype(np.int32)
    checkpoint = find(str(model))
    arrays = base.arrays | {"prefill_counts": counts} | prompt_features(checkpoint, texts(), None)
    reference = ModelRef(path=checkpoint.name, revision=checkpoint.revision)
    return write_profile(folder / "profile", base.record.model_copy(update={"model": reference}), arrays)


@pytest.fixture
def copied(made: Profile, tmp_path: Path) -> Profile:
    shutil.copytree(made.path, tmp_path / "copy")
    return read_profile(tmp_path / "copy")


def test_the_views_are_the_phases_and_both_together(made: Profile) -> None:
    views = histories(made, features_of(made))
    assert list(views) == ["request", "prefill", "decode"]
    both = made.arrays["prefill_counts"] + made.arrays["decode_counts"]
    for view, counts in (("request", both), *((p, made.arrays[f"{p}_counts"]) for p in ("prefill", "decode"))):
        history = views[view]  # type: ignore[index]
        assert np.allclose(history.frequencies * counts.sum(axis=2, keepdims=True), counts)
        assert history.selections.tolist() == counts.sum(axis=2)[:, 0].tolist()


def test_prompts_without_routing_in_a_phase_are_left_out_of_it(copied: Profile) -> None:
    arrays = copied.arrays | {
        "decode_counts": copied.arrays["decode_counts"].copy(),
        "decode_tokens": copied.arrays["decode_tokens"].copy(),
    }
    arrays["decode_counts"][5], arrays["decode_tokens"][5] = 0, 0
    views = histories(Profile(copied.path, copied.record, arrays), features_of(copied))
    assert [len(views[v]) for v in ("request", "prefill", "decode")] == [PROMPTS, PROMPTS, PROMPTS - 1]
    assert np.array_equal(views["decode"].prompts.vectors, np.delete(copied.arrays["prompt_vectors"], 5, axis=0))


def test_layers_without_routing_are_left_out(copied: Profile) -> None:
    record = copied.record.model_copy(update={"routing": RoutingRef(layers=copied.record.spec.moe_layers[:1])})
    assert histories(Profile(copied.path, record, copied.arrays), features_of(copied))["request"].frequencies.shape == (PROMPTS, 1, EXPERTS)


def test_the_default_is_the_winner_on_the_validation_split(copied: Profile) -> None:
    record = train(copied)
    assert record is not None
    history = histories(copied, features_of(copied))["request"]
    fold = folds(PROMPTS, 5)[0]
    known, test = history.take(np.setdiff1d(np.arange(PROMPTS), fold)), history.take(fold)
    for name in CANDIDATES:
        predicted = PREDICTORS[name](known, 0).predict(test.prompts)
        assert record.validation_bits[name] == pytest.approx(jensen_shannon(predicted, test.frequencies).mean())
    assert record.default == min(record.validation_bits, key=lambda name: record.validation_bits[name])
    assert (record.validation_prompts, record.prompts) == (12, PROMPTS)


@pytest.mark.parametrize("winner", CANDIDATES)
def test_the_saved_predictor_predicts_as_a_new_one(copied: Profile, winner: str) -> None:
    train(copied)
    file = copied.path / "predictor.json"
    artifacts.write_json(file, artifacts.read_json(file, PredictorRecord).model_copy(update={"default": winner}))
    history = histories(copied, features_of(copied))["request"]
    new = features_from(history.prompts.table, texts(4), None)
    expected = PREDICTORS[winner](history, 0).predict(new)
    found = trained(copied, history)
    low, high = found.interval(new)
    assert np.allclose(found.predict(new), expected, atol=1e-5)
    assert (low <= found.predict(new)).all() and (found.predict(new) <= high).all()


def test_a_predictor_of_another_profile_is_not_used(copied: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    train(copied)
    history = histories(copied, features_of(copied))["request"]
    fits = []
    fit = ridge.fit
    monkeypatch.setattr(ridge, "fit", lambda *arguments: (fits.append(1), fit(*arguments))[1])
    trained(copied, history)
    assert not fits
    changed = write_profile(
        copied.path,
        copied.record.model_copy(update={"arrays_sha256": "x"}),
        copied.arrays | {"prompt_tokens": copied.arrays["prompt_tokens"] + 1},
    )
    trained(changed, history)
    assert fits


def test_a_profile_without_vectors_carries_no_predictor(copied: Profile, model: Path) -> None:
    nothing = np.zeros(0, dtype=np.int32)
    none = {"prompt_vectors": np.zeros((PROMPTS, 0), dtype=np.float32), "bag_tokens": nothing, "bag_counts": nothing}
    bare = write_profile(copied.path, copied.record, copied.arrays | none | {"bag_sizes": np.zeros(PROMPTS, dtype=np.int32)})
    train(copied)
    assert train(bare) is None
    assert not (copied.path / "predictor.json").exists()
    with pytest.raises(UsageError, match="holds no prompt vectors"):
        features_of(bare)
    without_bags = {name: array for name, array in copied.arrays.items() if not name.startswith("bag_")}
    assert train(Profile(copied.path, copied.record, without_bags)) is None
    with pytest.raises(UsageError, match="made without prompt texts"):
        features_of(Profile(copied.path, copied.record, without_bags))
    with pytest.raises(UsageError, match="need the texts of the profile's 60 prompts"):
        features_of(bare, str(model), PromptSet("memory", "prompt", texts(59)))
    found = features_of(bare, str(model), PromptSet("memory", "prompt", texts()))
    assert np.array_equal(found.vectors, copied.arrays["prompt_vectors"])
    assert np.array_equal(found.bags.tokens, copied.arrays["bag_tokens"])


def remoe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr("sys.argv", ["remoe", *arguments, "--json"])
    code = app.run()
    return code, json.loads(capsys.readouterr().out)


def test_predictions_are_written(copied: Profile, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    train(copied)
    (tmp_path / "new.txt").write_text("\n".join(texts(6)))
    out = tmp_path / "predicted.safetensors"
    code, document = remoe(capsys, monkeypatch, "predict", str(copied.path), "--data", str(tmp_path / "new.txt"), "-o", str(out))
    assert code == 0
    arrays = artifacts.read_arrays(out)
    assert {name: a.shape for name, a in arrays.items()} == dict.fromkeys(("activation", "lower", "upper"), (6, LAYERS, EXPERTS))
    assert np.allclose(arrays["activation"].sum(axis=2), 1, atol=1e-5)
    assert (arrays["lower"] <= arrays["activation"]).all() and (arrays["activation"] <= arrays["upper"]).all()
    # Topics 0, 1, 2, 0, 1, 2 like expert 0, 3, and 1 or 2 best.
    best = arrays["activation"][:, 0].argmax(axis=1).tolist()
    assert [best[i] for i in (0, 1, 3, 4)] == [0, 3, 0, 3] and {best[2], best[5]} <= {1, 2}
    assert document["prompts"] == 6 and document["path"] == str(out)
    assert document["most_used"][0][0]["expert"] == 0


def test_evaluation_on_the_command_line(copied: Profile, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    plot = tmp_path / "scores.png"
    code, document = remoe(capsys, monkeypatch, "predict", str(copied.path), "--evaluate", "--folds", "3", "--plot", str(plot))
    assert code == 0
    assert [one["view"] for one in document["evaluations"]] == ["request", "prefill", "decode"]
    scores = document["evaluations"][1]["predictors"]
    assert list(scores) == list(PREDICTORS)
    assert scores["ridge"]["jsd_bits"] < scores["DOP"]["jsd_bits"]
    assert len(scores["SPS"]["folds"]) == 3
    assert document["default"] in CANDIDATES
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give one of --prompt TEXT"),
        (("--prompt", "x", "--evaluate"), "Give one of --prompt TEXT"),
        (("--prompt", "x", "--fate"), "belong to --evaluate"),
        (("--evaluate", "--folds", "40"), "too few for 40 folds"),
        (("--prompt", "w1", "--vectors-from", "MODEL"), "need the texts"),
    ],
)
def test_what_cannot_be_predicted_is_said(
    copied: Profile, model: Path, arguments: tuple[str, ...], message: str, capsys: Any, monkeypatch: Any
) -> None:
    words = [str(model) if a == "MODEL" else a for a in arguments]
    code, document = remoe(capsys, monkeypatch, "predict", str(copied.path), *words)
    assert code == 2
    assert message in document["error"]["message"]

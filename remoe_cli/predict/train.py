"""The predictor in a profile: chosen on the profile's prompts, fitted to all of them, and saved.

predictor.json          which predictor was best on held-out prompts, and the scores of all
predictor.safetensors   `tree.*` (SPS), `neighbours.*` and `ridge.*`; vectors and counts stay in the profile
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from remoe_cli import artifacts, owned
from remoe_cli.errors import ArtifactError
from remoe_cli.predict import baselines, neighbours, ridge, tree
from remoe_cli.predict.divergence import jensen_shannon
from remoe_cli.predict.evaluate import OURS, PREDICTORS, Predictor, folds
from remoe_cli.predict.history import Floats, History, PromptFeatures, features_of, has_features, histories
from remoe_cli.predict.record import PredictorRecord as PredictorRecord
from remoe_cli.predict.record import files, read_record
from remoe_cli.profile.record import Profile

CANDIDATES = ("DOP", "SPS", "neighbours", OURS)
_VALIDATION = 5  # one prompt in so many is held out
_LEAST = 10  # prompts; with fewer none is held out, and DOP is chosen
_SEED = 0


class _Stored(Protocol):
    def to_arrays(self) -> dict[str, npt.NDArray[Any]]: ...


@dataclass(frozen=True)
class Trained:
    """A predictor, ready to use.

    `name` says which one predicts; the interval is always that of ridge regression.
    """

    name: str
    record: PredictorRecord
    predictor: Predictor
    fitted: ridge.Ridge

    def predict(self, prompts: PromptFeatures) -> Floats:
        """Predict the frequencies of Q prompts, [Q, L, E]; rows sum to 1."""
        return self.predictor.predict(prompts)

    def interval(self, prompts: PromptFeatures) -> tuple[Floats, Floats]:
        """Predict the ends of each frequency's interval, two [Q, L, E].

        Another predictor than ridge regression may predict a frequency beside it; the interval then reaches as far as that.
        """
        (low, high), predicted = self.fitted.interval(prompts), self.predict(prompts)
        return np.minimum(low, predicted), np.maximum(high, predicted)


def train(profile: Profile) -> PredictorRecord | None:
    """Choose, fit and save the predictor of a profile.

    A profile without features of its prompts, or with routing of fewer than two prompts, gets none: None is returned.
    """
    forget(profile.path)
    if not has_features(profile):
        return None
    history = histories(profile, features_of(profile))["request"]
    if len(history) < 2:
        return None
    record, arrays = _fit(profile, history)
    document, file = files(profile.path)
    artifacts.write_arrays(file, arrays, "predictor")
    record = record.model_copy(update={"arrays_sha256": artifacts.sha256_file(file)})
    artifacts.write_json(document, record)
    return record


def trained(profile: Profile, history: History, name: str | None = None) -> Trained:
    """Get the predictor over the profile's `request` history: the best one, or the candidate `name`.

    It is the saved one if that belongs to this profile and these vectors, else a new one, which is not saved.
    """
    saved = _read(profile) if history.prompts.vectors.shape == profile.arrays["prompt_vectors"].shape else None
    record, arrays = saved or _fit(profile, history)
    ready, chosen = restored(arrays, history), name or record.default
    fitted = ready[OURS]()
    assert isinstance(fitted, ridge.Ridge)
    return Trained(chosen, record, ready[chosen](), fitted)


def restored(arrays: Mapping[str, npt.NDArray[Any]], history: History) -> dict[str, Callable[[], Predictor]]:
    """Restore the candidates over the history that they were fitted to.

    Raises: ArtifactError when arrays are missing, or do not fit each other or the history.
    """
    fitted = ridge.Ridge.from_arrays(_with_prefix(arrays, "ridge"))
    if (fitted.mean.shape, fitted.landmarks.shape[1]) != (history.frequencies.shape[1:], history.prompts.vectors.shape[1]):
        raise ArtifactError("The stored predictor is of a model with other layers, experts or embeddings.", "Make the profile again.")
    grown = tree.from_arrays(_with_prefix(arrays, "tree"), history.prompts.vectors)
    nearest = neighbours.from_arrays(_with_prefix(arrays, "neighbours"), history.prompts.vectors)
    return {
        OURS: lambda: fitted,
        "DOP": lambda: baselines.history_mean(history, _SEED),
        "SPS": lambda: baselines.over_tree(history, grown),
        "neighbours": lambda: baselines.tuned_over(history, nearest, _SEED),
    }


def forget(path: Path) -> None:
    """Remove the predictor of a profile that is about to change."""
    document, file = files(path)
    owned.delete_file(file, artifacts.arrays_beside(document, "predictor"))
    owned.delete_file(document, artifacts.made_as(PredictorRecord))


def _read(profile: Profile) -> tuple[PredictorRecord, dict[str, npt.NDArray[Any]]] | None:
    _, file = files(profile.path)
    record = read_record(profile.path, profile.sha256)
    if record is None or not file.is_file() or artifacts.sha256_file(file) != record.arrays_sha256:
        return None
    return record, artifacts.read_arrays(file)


def _fit(profile: Profile, history: History) -> tuple[PredictorRecord, dict[str, npt.NDArray[Any]]]:
    scores, held_out = _validate(history)
    vectors = history.prompts.vectors
    stored: dict[str, _Stored] = {
        "tree": tree.build(vectors, seed=_SEED),
        "neighbours": neighbours.build(vectors),
        "ridge": ridge.fit(history, _SEED),
    }
    arrays = {f"{prefix}.{name}": array for prefix, made in stored.items() for name, array in made.to_arrays().items()}
    record = PredictorRecord(
        profile_sha256=profile.sha256,
        arrays_sha256="",
        default=min(scores, key=lambda name: scores[name]) if scores else "DOP",
        validation_bits=scores,
        validation_prompts=held_out,
        prompts=len(history),
    )
    return record, arrays


def _validate(history: History) -> tuple[dict[str, float], int]:
    """Fit the candidates without one prompt in five, and score them on those."""
    if len(history) < _LEAST:
        return {}, 0
    fold = folds(len(history), _VALIDATION, _SEED)[0]
    test, known = history.take(fold), history.take(np.setdiff1d(np.arange(len(history)), fold))
    scores = {
        name: float(jensen_shannon(PREDICTORS[name](known, _SEED).predict(test.prompts), test.frequencies).mean()) for name in CANDIDATES
    }
    return scores, len(fold)


def _with_prefix(arrays: Mapping[str, npt.NDArray[Any]], prefix: str) -> dict[str, npt.NDArray[Any]]:
    return {name.partition(".")[2]: array for name, array in arrays.items() if name.startswith(prefix + ".")}

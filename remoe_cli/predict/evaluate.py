"""Scoring predictors on held-out prompts: k folds, with each predictor fitted on the others.

Every figure is a mean over prompts, with the standard error of that mean. Beside the divergence there is what it means for a plan (the
fraction of expert choices that are remote if half of each layer's experts are, the least used by prediction), the times, the noise floor
and the coverage of the interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from remoe_cli import interrupts
from remoe_cli.artifacts import Part
from remoe_cli.errors import UsageError
from remoe_cli.predict import baselines, ridge
from remoe_cli.predict.divergence import jensen_shannon, noise_floor, remote_hits
from remoe_cli.predict.fate import Fate
from remoe_cli.predict.history import Floats, History, Indices, PromptFeatures, View
from remoe_cli.predict.pairs import Similarity, similarity_of

REMOTE_SHARE = 0.5  # of each layer's experts
OURS = "ridge"


class Predictor(Protocol):
    """What every fitted predictor does."""

    def predict(self, prompts: PromptFeatures) -> Floats:
        """Predict how often each of Q prompts uses each expert, [Q, L, E]; rows sum to 1."""
        ...


Fit = Callable[[History, int], Predictor]
PREDICTORS: Mapping[str, Fit] = {
    "EF": baselines.equal_frequency,
    "DOP": baselines.history_mean,
    "VarED": baselines.var_ed,
    "SPS": baselines.sps,
    "VarPAM": baselines.var_pam,
    "BF": baselines.brute_force,
    "neighbours": baselines.tuned,
    OURS: ridge.fit,
}


class Score(Part):
    """The score of one predictor.

    jsd_bits           mean Jensen-Shannon divergence; `folds` has it for each fold
    remote_hit_share   fraction of expert choices that are remote (see `divergence.remote_hits`)
    build_s            time to fit it
    search_ms          time to predict one prompt
    """

    jsd_bits: float
    standard_error: float
    folds: tuple[float, ...]
    remote_hit_share: float
    build_s: float
    search_ms: float


class Evaluation(Part):
    """The scores of all predictors on one view of a profile.

    oracle_remote_hit_share   the remote_hit_share of a plan that knows each prompt's own frequencies
    interval_coverage         fraction of frequencies inside their interval; interval_nominal is its goal
    """

    view: View
    prompts: int
    predictors: dict[str, Score]
    noise_floor_bits: float
    oracle_remote_hit_share: float
    interval_coverage: float
    interval_nominal: float


def folds(prompts: int, k: int, seed: int = 0) -> list[Indices]:
    """List the held-out prompts of each fold, ascending."""
    return [np.sort(fold) for fold in np.array_split(np.random.default_rng(seed).permutation(prompts), k)]


def evaluate(
    history: History, view: View, *, k: int = 5, seed: int = 0, fate: Fate | None = None, progress: Callable[[int, int], None]
) -> Evaluation:
    """Score every predictor on one view; `progress(done, total)` counts predictors.

    Raises: UsageError when there are fewer than two prompts for each fold.
    """
    if len(history) < 2 * k:
        raise UsageError(
            f"{len(history)} prompts with {view} routing are too few for {k} folds.",
            f"Profile at least {2 * k} prompts, or give fewer --folds.",
        )
    held_out = folds(len(history), k, seed)
    remote = round(REMOTE_SHARE * history.frequencies.shape[2])
    runs: dict[str, list[_Run]] = {}
    covered = []
    for done, (name, fit) in enumerate(_fits(fate)):
        for fold in held_out:
            interrupts.check()
            run, predictor = _run(fit, history, fold, remote, seed)
            runs.setdefault(name, []).append(run)
            if isinstance(predictor, ridge.Ridge):
                test = history.take(fold)
                low, high = predictor.interval(test.prompts)
                covered.append(float(((low <= test.frequencies) & (test.frequencies <= high)).mean()))
        progress(done + 1, len(PREDICTORS) + (fate is not None))
    return Evaluation(
        view=view,
        prompts=len(history),
        predictors={name: _score(found) for name, found in runs.items()},
        noise_floor_bits=float(noise_floor(history.frequencies, history.selections, seed).mean()),
        oracle_remote_hit_share=float(remote_hits(history.frequencies, history.frequencies, remote).mean()),
        interval_coverage=float(np.mean(covered)),
        interval_nominal=ridge.COVERAGE,
    )


def similarity(history: History, seed: int = 0) -> Similarity:
    """Compute the semantic and the activation similarity of random pairs of different prompts."""
    return similarity_of(history.prompts.vectors, history.frequencies, seed)


def _fits(fate: Fate | None) -> Iterator[tuple[str, Fit]]:
    yield from PREDICTORS.items()
    if fate is not None:
        yield "Fate", lambda history, seed: fate


@dataclass(frozen=True)
class _Run:
    divergence: Floats
    remote: Floats
    build_s: float
    search_s: float


def _run(fit: Fit, history: History, fold: Indices, remote: int, seed: int) -> tuple[_Run, Predictor]:
    test = history.take(fold)
    known = history.take(np.setdiff1d(np.arange(len(history)), fold))
    start = time.perf_counter()
    predictor = fit(known, seed)
    built = time.perf_counter()
    predicted = predictor.predict(test.prompts)
    searched = time.perf_counter()
    divergence = jensen_shannon(predicted, test.frequencies).mean(axis=1)
    return _Run(divergence, remote_hits(predicted, test.frequencies, remote), built - start, (searched - built) / len(fold)), predictor


def _score(runs: list[_Run]) -> Score:
    divergence = np.concatenate([run.divergence for run in runs])
    return Score(
        jsd_bits=float(divergence.mean()),
        standard_error=float(divergence.std(ddof=1) / len(divergence) ** 0.5),
        folds=tuple(float(run.divergence.mean()) for run in runs),
        remote_hit_share=float(np.concatenate([run.remote for run in runs]).mean()),
        build_s=float(np.median([run.build_s for run in runs])),
        search_ms=float(np.median([run.search_s for run in runs]) * 1000),
    )

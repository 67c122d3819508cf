"""The routing of prompts that have not run yet, predicted for a plan.

This module knows profiles and predictors, but no placements.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from remoe_cli.errors import UsageError
from remoe_cli.model.chat import as_text
from remoe_cli.plan.document import Method, PredictedRouting, Source
from remoe_cli.predict.history import features_from, features_of, histories
from remoe_cli.predict.mixture import mixture
from remoe_cli.predict.train import trained
from remoe_cli.profile.prompts import PromptSet
from remoe_cli.profile.record import Profile

_WEIGHTS = 10_000  # weights are whole numbers that sum to about this, and bits have three digits: so plans do not differ between machines


def predict_routing(profile: Profile, prompts: PromptSet, solver: Method = "exact") -> PredictedRouting:
    """Predict the routing of `prompts`, as a mixture of prompts that the profile recorded.

    The profile's default predictor predicts; for the paper's solver, the paper's. The order of the prompts makes no difference.

    Raises: UsageError for a profile without prompt vectors, or whose prompts have no routing to plan with, and what reading the embeddings
    of its model raises.
    """
    if not profile.arrays["prompt_vectors"].shape[1]:
        raise UsageError(
            f"The profile {profile.path} has no vectors of its prompts, so nothing can be predicted from it.",
            "Profile with --data (and --vectors-from, where the model's weights are not at hand), or leave --data out.",
        )
    known = features_of(profile)
    history = histories(profile, known)["request"]
    predictor = trained(profile, history, "SPS" if solver == "paper" else None)
    recorded = _usable(profile)
    if not len(recorded):
        raise UsageError(
            f"The profile {profile.path} has no prompt with routing of every layer and traced tokens.",
            "Profile again with more prompts and a larger --max-new-tokens.",
        )
    prompts = replace(prompts, texts=tuple(sorted(prompts.texts, key=lambda prompt: (as_text(prompt), repr(prompt)))))
    settings = profile.record.settings
    features = features_from(known.table, prompts.texts, settings.max_prompt_tokens if settings else None)
    counts = profile.arrays["prefill_counts"][recorded].astype(np.float64) + profile.arrays["decode_counts"][recorded]
    chosen, shares, left = mixture(predictor.predict(features).mean(axis=0), counts / counts.sum(axis=2, keepdims=True))
    weights = np.rint(shares * _WEIGHTS).astype(int)
    off = predictor.record.validation_bits.get(predictor.name)
    return PredictedRouting(
        prompts=Source(path=prompts.source, sha256=prompts.sha256),
        count=len(prompts.texts),
        predictor=predictor.name,
        validation_bits=None if off is None else _rounded(off),
        mixture_bits=_rounded(left),
        recorded=tuple(recorded[chosen][weights > 0].tolist()),
        weights=tuple(weights[weights > 0].tolist()),
    )


def _rounded(bits: float) -> float:
    return float(f"{bits:.3g}")


def _usable(profile: Profile) -> npt.NDArray[np.int64]:
    """Find the prompts that a plan can be made of: they have routing in every layer, and traced tokens."""
    prefill = (profile.counts("prefill").sum(axis=2) > 0).all(axis=1)
    traced = np.bincount(profile.arrays["trace_prompt"], minlength=len(prefill)) > 0
    return np.flatnonzero(prefill & traced)

"""The workload that a plan is for: requests of certain lengths and traffic, and the routing that the profile recorded.

Imported routing may lack a phase, single tokens or lengths. What then stands in for them is an assumption, which the plan states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.document import Lengths, PredictedRouting
from remoe_cli.plan.problem.hits import HitCounter, Pattern
from remoe_cli.plan.problem.traffic import Traffic, one_length
from remoe_cli.profile.record import Profile


@dataclass(frozen=True)
class Workload:
    """Requests: a prompt, one token from its prefill, then further tokens one by one.

    traffic            their lengths, and how often they come
    cold_share         share of requests that find the main function and the expert functions cold
    use                float64 [L, E], experts that a prompt token uses; each row sums to top_k (k_top s_lk)
    trace              int64 [T, L, k], expert ids of recorded decode tokens, -1 where a slot was skipped
    patterns           per layer the distinct sets of experts in the trace, int64 [P, k] ascending, and how many tokens used each, [P];
                       of a mixture of prompts the share of tokens
    assumptions        whole sentences on what the profile does not hold and what was put in its place
    """

    traffic: Traffic
    cold_share: float
    use: Floats
    trace: Ints
    patterns: tuple[Pattern, ...]
    assumptions: tuple[str, ...] = ()

    def resized(self, n_in: int, n_out: int) -> Workload:
        """The same routing for warm requests of one length; what was counted of the trace is kept."""
        return replace(self, traffic=one_length(n_in, n_out), cold_share=0.0)

    @property
    def lengths(self) -> tuple[Lengths, ...]:
        return self.traffic.lengths

    @property
    def requests_per_hour(self) -> float | None:
        return self.traffic.per_hour

    @property
    def n_in(self) -> float:
        """Mean prompt tokens (N_in)."""
        return sum(kind.share * kind.n_in for kind in self.lengths)

    @property
    def n_out(self) -> float:
        """Mean tokens generated after the first (N_out)."""
        return sum(kind.share * kind.n_out for kind in self.lengths)

    @property
    def longest(self) -> Lengths:
        """The request with most tokens in all: memory has to hold it."""
        return max(self.lengths, key=lambda kind: (kind.n_in + kind.n_out, kind.n_in))

    @property
    def prefill_tokens(self) -> Floats:
        """float64 [L, E]: expected prompt tokens of a mean request per expert (N_lk); rows sum to n_in * top_k."""
        return self.use * self.n_in

    @cached_property
    def hits(self) -> HitCounter:
        """Experts that one decode token hits, for any remote sets."""
        return HitCounter(self.patterns, self.ranks)

    @cached_property
    def decode_hits(self) -> Floats:
        """float64 [L, E]: share of decode tokens that use each expert."""
        slots = self.use.shape[1] + 1
        weighed = [
            np.bincount(sets.ravel() + 1, np.repeat(counts, sets.shape[1]), slots)[1:] / counts.sum() for sets, counts in self.patterns
        ]
        shares: Floats = np.stack(weighed)
        return shares

    @property
    def utility(self) -> Floats:
        """float64 [L, E]: expected tokens of one request through each expert (u_lk, method section 7)."""
        return self.prefill_tokens + self.n_out * self.decode_hits

    @cached_property
    def ranks(self) -> Ints:
        """int64 [L, E]: 0 for the least used expert of a layer; equal utilities by expert id."""
        ranks: Ints = np.argsort(np.argsort(self.utility, axis=1, kind="stable"), axis=1, kind="stable")
        return ranks


def from_profile(
    profile: Profile,
    n_in: int | None = None,
    n_out: int | None = None,
    traffic: Traffic | None = None,
    requests_per_hour: float | None = None,
    routing: PredictedRouting | None = None,
) -> Workload:
    """Make the workload of a profile, of warm requests. A length that is not given is the profile's median, at least 1.

    traffic             requests of several lengths, in place of `n_in` and `n_out`
    requests_per_hour   goes before what `traffic` says
    routing             a mixture of the profile's prompts: requests use experts as it does; by default, as all prompts together

    Raises: UsageError for a length below 1, for 0 requests an hour, or for lengths that are given twice; ArtifactError when the
    profile has no routing of prompts, of single tokens or of some layers.
    """
    arrays, spec, layers = profile.arrays, profile.record.spec, profile.record.routing.layers
    if layers is not None and len(layers) < len(spec.moe_layers):
        raise ArtifactError(
            f"The profile {profile.path} has routing of {len(layers)} of the model's {len(spec.moe_layers)} MoE layers, "
            "and a plan places the experts of all.",
            "Import routing of every MoE layer.",
        )
    if requests_per_hour == 0:
        raise UsageError("--requests-per-hour is 0: without requests there is nothing to plan.", "Give the traffic that you expect.")
    if traffic is not None and (n_in, n_out) != (None, None):
        raise UsageError("--requests and --n-in or --n-out both say how long requests are.", "Leave one of them out.")
    assumptions = tuple(_assumptions(profile, traffic is None and n_in is None, traffic is None and n_out is None))
    if traffic is None:
        traffic = one_length(_or_median(n_in, arrays["prompt_tokens"]), _or_median(n_out, arrays["decode_tokens"]))
    if requests_per_hour is not None:
        traffic = Traffic(traffic.lengths, requests_per_hour)
    counts = profile.counts("prefill").sum(axis=0, dtype=np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    trace = arrays["trace_ids"].astype(np.int64)
    if counts.size == 0 or (totals == 0).any() or len(trace) == 0:
        raise ArtifactError(
            f"The profile {profile.path} recorded no routing of {'decode tokens' if counts.size and (totals > 0).all() else 'prompts'}.",
            "Profile again with more prompts and a larger --max-new-tokens.",
        )
    use, weights = counts / totals * spec.top_k, None
    if routing is not None:
        use, trace, weights = _mixed(profile, trace, routing)
        assumptions += (_predicted(routing),)
    return Workload(traffic, 0.0, use, trace, patterns_of(trace, use.shape[1], weights), assumptions)


def _mixed(profile: Profile, trace: Ints, routing: PredictedRouting) -> tuple[Floats, Ints, Floats]:
    """Of a mixture of prompts: the experts that a prompt token uses [L, E], the traced tokens [T, L, k], and their weights [T]."""
    recorded, weights = np.array(routing.recorded), np.array(routing.weights, dtype=np.float64)
    counts = profile.counts("prefill")[recorded].astype(np.float64)
    use = np.tensordot(weights, counts / counts.sum(axis=2, keepdims=True), axes=1) / weights.sum() * profile.record.spec.top_k
    owner = profile.arrays["trace_prompt"]
    mixed = np.flatnonzero(np.isin(owner, recorded))
    at, tokens = np.searchsorted(recorded, owner[mixed]), np.bincount(owner)[recorded]
    return use, trace[mixed], (weights / tokens)[at]


def _predicted(routing: PredictedRouting) -> str:
    off = "" if routing.validation_bits is None else f", {routing.validation_bits:.3f} bits off on held-out prompts"
    return (
        f"Requests are taken to route as {routing.predictor}{off}, predicts of the {routing.count} prompts of {routing.prompts.path}: "
        f"as a mixture of {len(routing.recorded)} recorded prompts does, {routing.mixture_bits:g} bits from the prediction."
    )


def patterns_of(trace: Ints, experts: int, weights: Floats | None = None) -> tuple[Pattern, ...]:
    """Per layer the distinct sets of experts [P, k] of a trace [T, L, k], and how many tokens used each [P], or their weights' sum."""
    return tuple(_distinct(np.sort(trace[:, layer], axis=1), experts, weights) for layer in range(trace.shape[1]))


def _distinct(rows: Ints, experts: int, weights: Floats | None) -> Pattern:
    """Distinct rows, ascending; as one number each where that fits 63 bits, for sorting rows as such takes many times as long."""
    k = rows.shape[1]
    if (experts + 1) ** k >= 2**63:
        distinct, which = np.unique(rows, axis=0, return_inverse=True)
        return distinct, np.bincount(which.ravel(), weights)
    base = (experts + 1) ** np.arange(k - 1, -1, -1, dtype=np.int64)
    codes, which = np.unique((rows + 1) @ base, return_inverse=True)
    return codes[:, None] // base % (experts + 1) - 1, np.bincount(which, weights)


def _or_median(tokens: int | None, recorded: npt.NDArray[np.int32]) -> int:
    return tokens if tokens is not None else max(1, round(float(np.median(recorded))))


def _assumptions(profile: Profile, default_in: bool, default_out: bool) -> Iterator[str]:
    """What stands in for things that the profile lacks; nothing for a recorded profile."""
    routing, arrays = profile.record.routing, profile.arrays
    if "prefill" not in routing.phases:
        yield "The profile has no separate routing of prompts: their tokens are taken to use experts as its generated tokens do."
    if "decode" not in routing.phases:
        yield "The profile has no separate routing of generated tokens: they are taken to use experts as its other tokens do."
    if routing.trace == "drawn":
        yield (
            "Experts of single tokens were drawn from the profile's counts, as if a token chose them independently of each other; "
            "with real tokens the times of remote calls differ."
        )
    lacking = [
        name
        for name, default, tokens in (("prompts", default_in, "prompt_tokens"), ("answers", default_out, "decode_tokens"))
        if default and routing.source == "imported" and (routing.row != "prompt" or not arrays[tokens].any())
    ]
    if lacking:
        yield f"The profile does not know the lengths of {' and '.join(lacking)} (its rows are: {routing.row}); give --n-in and --n-out."

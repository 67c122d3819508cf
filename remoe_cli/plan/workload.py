"""The workload that a plan is for: one request of typical length, and the routing that the profile recorded.

Imported routing may lack a phase, single tokens or lengths. What then stands in for them is an assumption, which the plan states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.profile.record import Profile

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

ENUMERATED_EXPERTS = 8  # up to here all 2**E remote sets of a layer are weighed


@dataclass(frozen=True)
class Workload:
    """One request: n_in prompt tokens, one token from the prefill, then n_out tokens generated one by one.

    prefill_tokens  float64 [L, E], expected prompt tokens per expert (N_lk); each row sums to n_in * top_k
    trace           int64 [T, L, k], expert ids of recorded decode tokens, -1 where a slot was skipped
    patterns        per layer the distinct sets of experts in the trace, int64 [P, k] ascending, and how many tokens used each, [P]
    assumptions     whole sentences on what the profile does not hold and what was put in its place
    """

    n_in: int
    n_out: int
    prefill_tokens: Floats
    trace: Ints
    patterns: tuple[tuple[Ints, Ints], ...]
    assumptions: tuple[str, ...] = ()

    def resized(self, n_in: int, n_out: int) -> Workload:
        """The same routing for a request of other lengths; what was counted of the trace is kept."""
        return replace(self, n_in=n_in, n_out=n_out, prefill_tokens=self.prefill_tokens * (n_in / self.n_in))

    @property
    def decode_hits(self) -> Floats:
        """float64 [L, E]: share of decode tokens that use each expert."""
        tokens, layers, _ = self.trace.shape
        experts = self.prefill_tokens.shape[1]
        hits = np.stack([np.bincount(self.trace[:, layer].ravel() + 1, minlength=experts + 1)[1:] for layer in range(layers)])
        shares: Floats = hits / tokens
        return shares

    @property
    def utility(self) -> Floats:
        """float64 [L, E]: expected tokens of one request through each expert (u_lk, method section 7)."""
        return self.prefill_tokens + self.n_out * self.decode_hits


def from_profile(profile: Profile, n_in: int | None = None, n_out: int | None = None) -> Workload:
    """The workload of a profile; lengths default to the profile's own medians, at least 1.

    Raises UsageError for a length below 1, and ArtifactError when the profile has no routing of prompts, of single tokens or of
    some layers.
    """
    arrays, spec, routing = profile.arrays, profile.record.spec, profile.record.routing
    if min(value for value in (n_in, n_out, 1) if value is not None) < 1:
        raise UsageError("The workload needs at least 1 prompt token and 1 generated token.", "Give lengths of 1 or more.")
    if routing.layers is not None and len(routing.layers) < len(spec.moe_layers):
        raise ArtifactError(
            f"The profile {profile.path} has routing of {len(routing.layers)} of the model's {len(spec.moe_layers)} MoE layers, "
            "and a plan places the experts of all.",
            "Import routing of every MoE layer.",
        )
    counts = profile.counts("prefill").sum(axis=0, dtype=np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    trace = arrays["trace_ids"].astype(np.int64)
    if counts.size == 0 or (totals == 0).any() or len(trace) == 0:
        raise ArtifactError(
            f"The profile {profile.path} recorded no routing of {'decode tokens' if counts.size and (totals > 0).all() else 'prompts'}.",
            "Profile again with more prompts and a larger --max-new-tokens.",
        )
    assumptions = tuple(_assumptions(profile, n_in is None, n_out is None))
    n_in = n_in if n_in is not None else max(1, round(float(np.median(arrays["prompt_tokens"]))))
    n_out = n_out if n_out is not None else max(1, round(float(np.median(arrays["decode_tokens"]))))
    patterns = tuple(np.unique(np.sort(trace[:, i], axis=1), axis=0, return_counts=True) for i in range(trace.shape[1]))
    return Workload(n_in, n_out, counts / totals * (n_in * spec.top_k), trace, patterns, assumptions)


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
        for name, wanted, tokens in (("prompts", default_in, "prompt_tokens"), ("answers", default_out, "decode_tokens"))
        if wanted and routing.source == "imported" and (routing.row != "prompt" or not arrays[tokens].any())
    ]
    if lacking:
        yield f"The profile does not know the lengths of {' and '.join(lacking)} (its rows are: {routing.row}); give --n-in and --n-out."


def candidate_sets(workload: Workload) -> tuple[Bools, ...]:
    """Remote sets that the exact planner weighs, per layer bool [S, E], by rising size.

    All subsets up to 8 experts a layer; above, the prefixes of the utility order, which is optimal only among such
    plans (planning study, section 1: measured loss 0 to 0.27% at full size).
    """
    experts = workload.prefill_tokens.shape[1]
    if experts <= ENUMERATED_EXPERTS:
        members = (np.arange(2**experts)[:, None] >> np.arange(experts)) & 1 == 1
        return (members[np.argsort(members.sum(axis=1), kind="stable")],) * len(workload.prefill_tokens)
    return tuple(np.arange(experts + 1)[:, None] > rank for rank in utility_ranks(workload))


def utility_ranks(workload: Workload) -> Ints:
    """int64 [L, E]: 0 for the least used expert of a layer; equal utilities by expert id."""
    ranks: Ints = np.argsort(np.argsort(workload.utility, axis=1, kind="stable"), axis=1, kind="stable")
    return ranks

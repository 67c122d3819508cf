"""The workload that a plan is for: lengths and traffic of requests, and how they use experts.

Imported routing may lack a phase, single tokens or lengths. Something else then takes their place: an assumption, which the plan states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from remoe_cli.errors import ArtifactError, InfeasibleError, UsageError
from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.document import Lengths, PredictedRouting, Waking
from remoe_cli.plan.problem.batches import Consecutive, Rows, drafted_rows, drawn_rows
from remoe_cli.plan.problem.drafting import NO_DRAFTS, Depth, Drafting, drafting_of
from remoe_cli.plan.problem.hits import HitCounter, Pattern
from remoe_cli.plan.problem.sizes import Size
from remoe_cli.plan.problem.traffic import Traffic, one_length
from remoe_cli.plan.wording import request_tokens
from remoe_cli.profile.record import Profile


@dataclass(frozen=True)
class Workload:
    """Requests, and the experts that their tokens use.

    A request is a prompt, a first token from its prefill, and further tokens one by one.

    traffic            their lengths, and how often they come
    cold_share         share of requests that find the main function and the expert functions cold
    waking             how often an instance that scales to zero wakes; None without one, or where the traffic is unknown
    use                share of prompt tokens that use each expert (k_top s_lk)
    trace              expert ids of recorded decode tokens, -1 where a slot was skipped
    patterns           per layer the distinct sets of experts in the trace, and how many tokens used each, or the weight of those tokens
    assumptions        for people: sentences on what the profile lacks and what takes its place
    also_held          requests beside the longest ones for which solvers hold the limits
    also_priced        prompt lengths beside those of the kinds, for which prefill is computed
    drafts             what drafts of each length make of decode; empty where the profile does not know
    consecutive        the tokens of the trace in their order; None where they do not follow each other

    Shapes: `use` float64 [L, E], each row sums to top_k; `trace` int64 [T, L, k]; of `patterns` int64 [P, k], ids ascending, and [P].
    """

    traffic: Traffic
    cold_share: float
    use: Floats
    trace: Ints
    patterns: tuple[Pattern, ...]
    assumptions: tuple[str, ...] = ()
    also_held: tuple[Size, ...] = ()
    also_priced: tuple[int, ...] = ()
    waking: Waking | None = None
    drafts: Mapping[Depth, Drafting] = field(default_factory=dict)
    consecutive: Consecutive | None = None

    def resized(self, n_in: int, n_out: int) -> Workload:
        """Change the requests to warm ones of one length; the routing stays.

        An answer may end with its first token: `n_out` is 0 then.
        """
        traffic = Traffic((Lengths(share=1.0, n_in=n_in, n_out=n_out),))
        return replace(self, traffic=traffic, cold_share=0.0, also_held=(), also_priced=(), waking=None)

    @property
    def lengths(self) -> tuple[Lengths, ...]:
        """The kinds of requests; their shares sum to 1."""
        return self.traffic.lengths

    @property
    def requests_per_hour(self) -> float | None:
        """Requests an hour; None where unknown."""
        return self.traffic.per_hour

    @property
    def n_in(self) -> float:
        """Mean prompt tokens (N_in)."""
        return sum(kind.share * kind.n_in for kind in self.lengths)

    @property
    def n_out(self) -> float:
        """Mean tokens generated after the first (N_out)."""
        return sum(kind.share * kind.n_out for kind in self.lengths)

    @cached_property
    def front(self) -> tuple[Size, ...]:
        """The longest requests: no other one is at least as long in both lengths.

        A limit that holds for them holds for all.
        """
        return self.traffic.sizes.front

    @property
    def most_in(self) -> int:
        """Prompt tokens of the longest prompt."""
        return self.front[-1].n_in

    @property
    def most_out(self) -> int:
        """Tokens after the first of the longest answer."""
        return self.front[0].n_out

    @cached_property
    def most_tokens(self) -> Size:
        """The request with most tokens in all: memory has to hold it."""
        return max(self.front, key=lambda size: (size.tokens, size.n_in))

    @cached_property
    def held(self) -> tuple[Size, ...]:
        """The requests for which solvers hold the limits on time and payload.

        `first_broken` (cost/requests.py) then looks at every request; one that breaks a limit is added.
        """
        return tuple(dict.fromkeys((*self.traffic.sizes.ends, *self.also_held)))

    @cached_property
    def prompts(self) -> tuple[int, ...]:
        """The prompt lengths for which prefill is computed.

        Those of the kinds come first, in their order.
        """
        of_kinds = [kind.n_in for kind in self.lengths]
        others = dict.fromkeys((*(size.n_in for size in self.held), *self.also_priced))
        return (*of_kinds, *(n_in for n_in in others if n_in not in of_kinds))

    @property
    def prefill_tokens(self) -> Floats:
        """Expected prompt tokens of a mean request for each expert (N_lk).

        Shapes: float64 [L, E]; each row sums to n_in * top_k.
        """
        return self.use * self.n_in

    @cached_property
    def hits(self) -> HitCounter:
        """The counter of experts that one decode token hits, for any remote sets."""
        # Counting goes through the first experts of all sets, then through the second ones, and so on: so they lie in memory.
        return HitCounter(tuple((np.asfortranarray(sets), counts) for sets, counts in self.patterns), self.ranks)

    @cached_property
    def _drawn(self) -> dict[tuple[int, int, Drafting], Rows]:
        return {}

    def step_rows(self, layer: int, requests: int, drafting: Drafting = NO_DRAFTS) -> Rows:
        """Count the rows of each expert of a layer in drawn decode steps of so many requests.

        Shapes: int16 [E, M].
        """
        if (key := (layer, requests, drafting)) not in self._drawn:
            pattern, experts = self.patterns[layer], self.use.shape[1]
            self._drawn[key] = (
                drawn_rows(pattern, experts, requests)
                if drafting is NO_DRAFTS
                else drafted_rows(pattern, self.consecutive, layer, experts, requests, drafting.rows)
            )
        return self._drawn[key]

    @cached_property
    def decode_hits(self) -> Floats:
        """Share of decode tokens that use each expert.

        Shapes: float64 [L, E].
        """
        slots = self.use.shape[1] + 1
        weighed = [
            np.bincount(sets.ravel() + 1, np.repeat(counts, sets.shape[1]), slots)[1:] / counts.sum() for sets, counts in self.patterns
        ]
        shares: Floats = np.stack(weighed)
        return shares

    @property
    def utility(self) -> Floats:
        """Expected tokens of one request through each expert (u_lk).

        Shapes: float64 [L, E].
        Source: method.md, section 7.
        """
        return self.prefill_tokens + self.n_out * self.decode_hits

    @cached_property
    def ranks(self) -> Ints:
        """Place of each expert in its layer's order of utility: 0 for the least used.

        Of equals, the lower id goes first.

        Shapes: int64 [L, E].
        """
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
    """Make the workload of a profile, of warm requests.

    n_in, n_out         tokens; by default the profile's medians, at least 1
    traffic             requests of several lengths, in place of `n_in` and `n_out`
    requests_per_hour   goes before what `traffic` says
    routing             a mixture of the profile's prompts: requests use experts as it does; by default, as all prompts together

    Raises: UsageError for a length below 1, for 0 requests an hour, or for lengths that are given twice; InfeasibleError for requests
    that are longer than the model's context; ArtifactError when the
    profile has no routing of prompts, of single tokens or of some layers.
    """
    arrays, spec, layers = profile.arrays, profile.record.spec, profile.record.routing.layers
    if layers is not None and len(layers) < len(spec.moe_layers):
        raise ArtifactError(
            f"The profile {profile.path} has routing of {len(layers)} of the model's {len(spec.moe_layers)} MoE layers, "
            "but a plan places the experts of all.",
            "Import routing of every MoE layer.",
        )
    if requests_per_hour == 0:
        raise UsageError("--requests-per-hour is 0: without requests there is nothing to plan.", "Give the traffic that you expect.")
    if traffic is not None and (n_in, n_out) != (None, None):
        raise UsageError("--requests and --n-in or --n-out both say how long requests are.", "Leave one of them out.")
    assumptions = tuple(_assumptions(profile, traffic is None and n_in is None, traffic is None and n_out is None))
    if traffic is not None:
        assumptions += traffic.notes
    else:
        traffic = one_length(_or_median(n_in, arrays["prompt_tokens"]), _or_median(n_out, arrays["decode_tokens"]))
    _refuse_beyond_context(spec.context_tokens, traffic)
    if requests_per_hour is not None:
        traffic = replace(traffic, per_hour=requests_per_hour, gaps_s=())
    counts = profile.counts("prefill").sum(axis=0, dtype=np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    trace = arrays["trace_ids"].astype(np.int64)
    if counts.size == 0 or (totals == 0).any() or len(trace) == 0:
        raise ArtifactError(
            f"The profile {profile.path} recorded no routing of {'decode tokens' if counts.size and (totals > 0).all() else 'prompts'}.",
            "Profile again with more prompts and a larger --max-new-tokens.",
        )
    use, weights = counts / totals * spec.top_k, None
    follow, drafts = _follow(profile), drafting_of(profile)
    if routing is not None:
        use, trace, weights = _mixed(profile, trace, routing)
        assumptions += (_predicted(routing),)
        drafts = drafting_of(profile, np.array(routing.recorded), np.array(routing.weights, dtype=np.float64))
    consecutive = Consecutive(trace, weights) if follow else None
    patterns = patterns_of(trace, use.shape[1], weights)
    return Workload(traffic, 0.0, use, trace, patterns, assumptions, drafts=drafts, consecutive=consecutive)


def _follow(profile: Profile) -> bool:
    """Tell whether the traced tokens of each prompt are its first decode tokens, one after the other."""
    routing, owner, tokens = profile.record.routing, profile.arrays["trace_prompt"], profile.arrays["decode_tokens"]
    counts = np.bincount(owner, minlength=len(tokens))
    whole = np.array_equal(counts, np.minimum(tokens, counts.max(initial=0)))
    return routing.source == "recorded" and routing.trace == "decode" and whole and bool((np.diff(owner) >= 0).all())


def _refuse_beyond_context(context: int | None, traffic: Traffic) -> None:
    """Refuse requests that have more tokens than the model has positions; an answer has one token beside the further ones."""
    sizes = traffic.sizes
    needed = sizes.n_in + sizes.n_out + 1
    if context is None or max(int(needed.max()), max(size.tokens + 1 for size in sizes.front)) <= context:
        return
    at, fits = int(needed.argmax()), float(sizes.share[needed <= context].sum() / sizes.share.sum())
    cover = math.floor(fits * (traffic.served.share if traffic.served else 1.0) * 1000) / 1000
    raise InfeasibleError(
        f"The model has {context:,} positions, and a request of {request_tokens(sizes.n_in[at], sizes.n_out[at])} needs {needed[at]:,}.",
        f"Leave the longest requests out with --cover {cover:g}." if traffic.served and cover > 0 else "Plan for shorter requests.",
    )


def _mixed(profile: Profile, trace: Ints, routing: PredictedRouting) -> tuple[Floats, Ints, Floats]:
    """Mix the routing of prompts by weight.

    Shapes: experts that a prompt token uses [L, E], traced tokens [T, L, k], weights of those [T].
    """
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
        f"The plan assumes the routing that {routing.predictor}{off}, predicts for the {routing.count} prompts of {routing.prompts.path}: "
        f"that of a mixture of {len(routing.recorded)} recorded prompts, {routing.mixture_bits:g} bits from the prediction."
    )


def patterns_of(trace: Ints, experts: int, weights: Floats | None = None) -> tuple[Pattern, ...]:
    """List the distinct sets of experts of each layer in a trace, with the tokens, or the weight, of each.

    Shapes: `trace` [T, L, k], `weights` [T]; sets [P, k], counts [P].
    """
    return tuple(_distinct(np.sort(trace[:, layer], axis=1), experts, weights) for layer in range(trace.shape[1]))


def _distinct(rows: Ints, experts: int, weights: Floats | None) -> Pattern:
    """Find distinct rows, ascending.

    A row is coded as one number where 63 bits hold it: sorting rows as such takes many times as long.
    """
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
    """Say in sentences what takes the place of things that the profile lacks."""
    routing, arrays = profile.record.routing, profile.arrays
    if "prefill" not in routing.phases:
        yield "The profile has no separate routing of prompts: the plan assumes that prompt tokens use experts as generated tokens do."
    if "decode" not in routing.phases:
        yield "The profile has no separate routing of generated tokens: the plan assumes that they use experts as its other tokens do."
    if routing.trace == "drawn":
        yield (
            "The experts of single tokens were drawn from the profile's counts, as if a token chose each of them independently. "
            "With real tokens, remote calls take another time."
        )
    lacking = [
        name
        for name, default, tokens in (("prompts", default_in, "prompt_tokens"), ("answers", default_out, "decode_tokens"))
        if default and routing.source == "imported" and (routing.row != "prompt" or not arrays[tokens].any())
    ]
    if lacking:
        yield f"The profile does not know the lengths of {' and '.join(lacking)} (its rows are: {routing.row}); give --n-in and --n-out."

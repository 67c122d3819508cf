"""What the verifier prices a plan with, and the routing that it counts again."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import Lengths, Plan, PredictedRouting
from remoe_cli.profile.record import Profile

Passes = tuple[float, tuple[float, ...]]  # decode passes for each token, and the share of them that has 1, 2, .. rows
ONE_BY_ONE: Passes = (1.0, (1.0,))
Hits = Mapping[tuple[int, int, tuple[int, ...]], float]  # tokens by experts that they hit on the CPU, on the GPU, and in each function
Placed = tuple[int, tuple[tuple[int, ...], ...], tuple[int, ...]]  # a layer, the experts of its functions, and those on the GPU


@dataclass(frozen=True)
class Layer:
    """The routing of one layer.

    use       share of prompt tokens that use each expert
    choices   how many recorded tokens, or which share of them, chose each set
    """

    use: Sequence[float]
    choices: Mapping[tuple[int, ...], float]

    @cached_property
    def experts_per_token(self) -> float:
        """Mean experts of a recorded token."""
        return sum(len(choice) * tokens for choice, tokens in self.choices.items()) / sum(self.choices.values())


@dataclass(frozen=True)
class VerifierInputs:
    """Everything that is needed to price any placement for a plan's requests.

    tokens                      recorded ones that `layers` rest on
    passes                      decode passes of an answer with the plan's drafts
    assisted                    tokens that the plan's assistant drafts for a pass, and reads beside these
    order                       rows of the trace in their order, with the weight of each, if they follow each other in answers
    hits, steps                 keep what was counted for a layer and where its experts are, and steps of several tokens that were drawn
    call_factor, price_factor   factors on the warm overhead of an invocation, and on what expert functions cost
    even_share                  share of the tokens that are not routed as recorded (`evenly`)
    """

    plan: Plan
    profile: Profile
    catalog: Catalog
    layers: list[Layer]
    tokens: int
    passes: Passes = ONE_BY_ONE
    assisted: tuple[float, float] = (0.0, 0.0)
    order: tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]] | None = None
    hits: dict[Placed, Hits] = field(default_factory=dict)
    steps: dict[tuple[int, int], npt.NDArray[np.int64]] = field(default_factory=dict)
    call_factor: float = 1.0
    price_factor: float = 1.0
    even_share: float = 0.0

    @property
    def most_rows(self) -> int:
        """Most rows of a request in a decode pass."""
        return len(self.passes[1])

    @property
    def has_drafts(self) -> bool:
        """Whether passes may have drafts."""
        return self.plan.speculate != "off"

    @property
    def kinds(self) -> Sequence[Lengths]:
        """The kinds of requests."""
        return self.plan.workload.lengths

    @property
    def longest(self) -> Sequence[tuple[int, int]]:
        """Prompt tokens and further tokens of the longest requests."""
        return self.plan.workload.front

    @property
    def n_out(self) -> float:
        """Mean tokens generated after the first."""
        return sum(kind.share * kind.n_out for kind in self.kinds)


def verifier_inputs(plan: Plan, profile: Profile, catalog: Catalog) -> VerifierInputs:
    """Gather what is needed to price a plan's requests."""
    routing = plan.workload.routing
    layers, tokens = pooled(profile) if routing is None else mixed(profile, routing)
    passes, assisted, order = passes_of(plan, profile, routing), assisted_of(plan, profile, routing), order_of(profile, routing)
    return VerifierInputs(plan, profile, catalog, layers, tokens, passes, assisted, order)


def share_of(routing: PredictedRouting | None) -> dict[int, float] | None:
    """List the share of each prompt of a mixture.

    None where all of the profile's prompts count by their tokens.
    """
    if routing is None:
        return None
    return {prompt: weight / sum(routing.weights) for prompt, weight in zip(routing.recorded, routing.weights, strict=True)}


def passes_of(plan: Plan, profile: Profile, routing: PredictedRouting | None) -> Passes:
    """Count the decode passes that the recorded answers would have had with the plan's drafts.

    `draft_passes` has drafts of chosen lengths first, then those of 1, 2, .. tokens.
    """
    if plan.speculate == "off" or "draft_passes" not in profile.arrays:
        return ONE_BY_ONE
    shares, by_rows, total = share_of(routing), defaultdict[int, float](float), 0.0
    for prompt, tokens in enumerate(profile.arrays["decode_tokens"].tolist()):
        part = 1.0 if shares is None else shares.get(prompt, 0.0) / max(tokens, 1)
        total += part * tokens
        kind = "draft_passes" if plan.assistant is None else "assisted_passes"
        counted = profile.arrays[kind][prompt, 0 if plan.speculate == "auto" else plan.speculate]
        for place in counted.nonzero()[0].tolist():
            by_rows[place] += part * int(counted[place])
    every = sum(by_rows.values())
    most = max(place for place, passes in by_rows.items() if passes)
    return every / total, tuple(by_rows[place] / every for place in range(most + 1))


def assisted_of(plan: Plan, profile: Profile, routing: PredictedRouting | None) -> tuple[float, float]:
    """Count what the plan's assistant drafts for a pass, and reads beside that, in the mean."""
    if plan.assistant is None or plan.speculate == "off":
        return 0.0, 0.0
    row, shares, sums = 0 if plan.speculate == "auto" else plan.speculate, share_of(routing), [0.0, 0.0, 0.0]
    for prompt, tokens in enumerate(profile.arrays["decode_tokens"].tolist()):
        part = 1.0 if shares is None else shares.get(prompt, 0.0) / max(tokens, 1)
        each = [*profile.arrays["assistant_tokens"][prompt, row].tolist(), int(profile.arrays["assisted_passes"][prompt, row].sum())]
        sums = [total + part * one for total, one in zip(sums, each, strict=True)]
    return sums[0] / sums[2], sums[1] / sums[2]


def order_of(profile: Profile, routing: PredictedRouting | None) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]] | None:
    """Find the traced tokens of the prompts, and the weight of each.

    None where those of a prompt are not its first ones in their order.
    """
    owners, shares = profile.arrays["trace_prompt"].tolist(), share_of(routing)
    traced, tokens = Counter(owners), profile.arrays["decode_tokens"].tolist()
    most = max(traced.values(), default=0)
    ordered = all(before <= after for before, after in pairwise(owners))
    whole = all(traced[prompt] == min(count, most) for prompt, count in enumerate(tokens))
    if not (ordered and whole) or (profile.record.routing.source, profile.record.routing.trace) != ("recorded", "decode"):
        return None
    rows = [row for row, prompt in enumerate(owners) if shares is None or prompt in shares]
    weights = [1.0 if shares is None else shares[owners[row]] / traced[owners[row]] for row in rows]
    return np.array(rows), np.array(weights)


def pooled(profile: Profile) -> tuple[list[Layer], int]:
    """Count the layers' routing over all recorded prompts together, and their recorded tokens."""
    counts, trace, top_k = profile.counts("prefill"), profile.arrays["trace_ids"], profile.record.spec.top_k
    layers = []
    for index in range(len(profile.record.spec.moe_layers)):
        totals = [int(total) for total in counts[:, index].sum(axis=0).tolist()]
        tokens = Counter(map(tuple, np.sort(trace[:, index], axis=1).tolist()))
        choices = {token[token.count(-1) :]: count for token, count in tokens.items()}
        layers.append(Layer([top_k * total / sum(totals) for total in totals], choices))
    return layers, len(trace)


def mixed(profile: Profile, routing: PredictedRouting) -> tuple[list[Layer], int]:
    """Count the same for a mixture of prompts: each counts by its share, however long it is."""
    counts, trace, spec = profile.counts("prefill"), profile.arrays["trace_ids"], profile.record.spec
    share = share_of(routing) or {}
    owners = profile.arrays["trace_prompt"].tolist()
    traced = Counter(prompt for prompt in owners if prompt in share)
    layers = []
    for index in range(len(spec.moe_layers)):
        use, choices = [0.0] * spec.experts_per_layer, defaultdict[tuple[int, ...], float](float)
        for prompt, part in share.items():
            chosen = counts[prompt, index].tolist()
            for expert, times in enumerate(chosen):
                use[expert] += spec.top_k * part * times / sum(chosen)
        for token, prompt in zip(trace[:, index].tolist(), owners, strict=True):
            if prompt in share:
                choices[tuple(sorted(e for e in token if e >= 0))] += share[prompt] / traced[prompt]
        layers.append(Layer(use, choices))
    return layers, traced.total()


def as_profiled(inputs: VerifierInputs) -> VerifierInputs:
    """Route requests as all of the profile's prompts together."""
    profile = inputs.profile
    layers, passes, assisted = pooled(profile)[0], passes_of(inputs.plan, profile, None), assisted_of(inputs.plan, profile, None)
    return replace(inputs, layers=layers, passes=passes, assisted=assisted, order=order_of(profile, None), hits={}, steps={})


def evenly(inputs: VerifierInputs, share: float) -> VerifierInputs:
    """Route that share of the tokens to k neighbouring experts, starting from each one alike."""
    k = inputs.profile.record.spec.top_k
    layers = [replace(layer, use=[(1 - share) * use + share * k / len(layer.use) for use in layer.use]) for layer in inputs.layers]
    return replace(inputs, layers=layers, even_share=share, steps={})

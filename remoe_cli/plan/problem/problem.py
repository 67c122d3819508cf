"""What the cost of a placement depends on (`Problem`), and the placement itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from remoe_cli.model.spec import AssistantSpec, MoeSpec
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import LayerPlan, MainSpec, TtftAt
from remoe_cli.plan.problem.batches import Rows
from remoe_cli.plan.problem.drafting import NO_DRAFTS, Assisted, Depth, Drafting
from remoe_cli.plan.problem.workload import Workload
from remoe_cli.profile.latency_record import Latency

MB = 2**20
GB_MB = 1024
Invocations = Literal["per-layer", "per-expert"]


@dataclass(frozen=True)
class Problem:
    """Everything that the cost of a placement depends on, besides the placement.

    latency       the profile's times: of expert functions, and of main specs that are not in `described`
    described     times of main specs by name, where they are not the profile's own
    gpu_experts   whether experts may be on the main function's GPU; a plan without them shows what they are worth
    ttft_at       the request whose TTFT is held against the target; None: the mean is
    invocations   per-layer: one call for all experts that a token hits in a function; per-expert: one call after another for each
    concurrency   requests that each instance of the main function serves at once, as far as the platform lets it (`at_main`)
    speculate     how many draft tokens a decode pass may have, and who makes them
    depths        what the planner may choose for that; empty where it is given
    assistant     sizes of the model that may make them; None where there is none

    Source: per-expert calls are equation 5 of method.md, section 3.
    """

    spec: MoeSpec
    latency: Latency
    catalog: Catalog
    workload: Workload
    described: Mapping[str, Latency] = field(default_factory=dict)
    invocations: Invocations = "per-layer"
    gpu_experts: bool = True
    ttft_at: TtftAt | None = None
    concurrency: int = 1
    speculate: Depth = "off"
    depths: tuple[Depth, ...] = ()
    assistant: AssistantSpec | None = None

    def with_drafts(self, speculate: Depth) -> Problem:
        """Look at the problem with drafts of one length."""
        return replace(self, speculate=speculate, depths=())

    @property
    def drafting(self) -> Drafting:
        """What drafts make of decode."""
        return NO_DRAFTS if self.speculate == "off" else self.workload.drafts[self.speculate]

    @property
    def loaded_assistant(self) -> AssistantSpec | None:
        """The assistant that the main function holds; None where it makes no drafts."""
        return self.assistant if isinstance(self.speculate, Assisted) else None

    @property
    def is_one_token(self) -> bool:
        """Whether a decode step has one token: then its hits are known exactly, and no steps are drawn."""
        return self.concurrency == 1 and self.speculate == "off"

    @cached_property
    def request_bytes(self) -> int:
        """Memory of the KV cache and the hidden states of the request with most tokens."""
        tokens = self.workload.most_tokens.tokens
        return self.spec.kv_cache_bytes(tokens) + self.spec.hidden_state_bytes * tokens

    @property
    def step_tokens(self) -> int:
        """Most tokens of a decode step, of all requests together."""
        return self.concurrency * self.drafting.most_rows

    def step_rows(self, layer: int) -> Rows:
        """Count the rows of each expert of a layer in drawn decode steps.

        Shapes: int16 [E, M].
        """
        return self.workload.step_rows(layer, self.concurrency, self.drafting)

    def at_main(self, main: MainSpec) -> Problem:
        """Look at the problem of one main spec.

        Each instance of it serves as many requests at once as the platform lets it.
        """
        most = self.catalog.main.concurrency_of(main)
        return self if most is None or most >= self.concurrency else replace(self, concurrency=most)

    @property
    def parts(self) -> tuple[Problem, ...]:
        """The same problem in parts, mostly in one.

        All main functions of a part serve equally many requests at once, with drafts of the same length.
        """
        return tuple(part for speculate in self.depths or (self.speculate,) for part in self.with_drafts(speculate)._parts)

    @property
    def _parts(self) -> tuple[Problem, ...]:
        many = {self.at_main(spec).concurrency for spec in self.menu}
        if many == {self.concurrency}:
            return (self,)
        menus = {number: tuple(spec for spec in self.menu if self.at_main(spec).concurrency == number) for number in sorted(many)}
        return tuple(
            replace(
                self,
                concurrency=number,
                catalog=self.catalog.model_copy(update={"main": self.catalog.main.model_copy(update={"menu": menu})}),
            )
            for number, menu in menus.items()
        )

    @property
    def ttft_prompts(self) -> tuple[tuple[float, int], ...]:
        """The prompts, with their weights, whose TTFT is held against the target."""
        if self.ttft_at is not None:
            return ((1.0, self.ttft_at.n_in),)
        return tuple((kind.share, kind.n_in) for kind in self.workload.lengths)

    @property
    def ttft_cold_share(self) -> float:
        """How much of a cold start is in that TTFT."""
        return self.workload.cold_share if self.ttft_at is None else float(self.ttft_at.cold)

    @property
    def menu(self) -> tuple[MainSpec, ...]:
        """The main specs on which a request has a price.

        What a request costs on a rented instance depends on how many requests come. Where that is unknown, the menu has only what is paid
        by use, if there is any.
        """
        whole = self.catalog.main.menu
        by_use = tuple(spec for spec in whole if spec.usd_per_hour is None)
        return whole if self.workload.requests_per_hour is not None else by_use or whole

    def latency_of(self, main: MainSpec) -> Latency:
        """Look up the times of a main spec."""
        return self.described.get(main.name, self.latency)


@dataclass(frozen=True)
class Main:
    """A main function as it is bought: paid by use, or several rented instances that share the requests."""

    spec: MainSpec
    instances: int = 1


@dataclass(frozen=True)
class Placement:
    """Where everything runs: the main function, and the expert functions of each MoE layer."""

    main: MainSpec
    layers: tuple[LayerPlan, ...]
    instances: int = 1

    @property
    def bought(self) -> Main:
        """The main function with its instances."""
        return Main(self.main, self.instances)


def local_layers(problem: Problem) -> tuple[LayerPlan, ...]:
    """List the layers of a placement without remote experts."""
    return tuple(LayerPlan(layer=layer, remote=(), memory_mb=0, replicas=0) for layer in problem.spec.moe_layers)

"""What a placement's cost depends on: the model, its times, the catalog, the workload; and the placement itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from remoe_cli.model.spec import MoeSpec
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import LayerPlan, MainSpec
from remoe_cli.plan.problem.workload import Workload
from remoe_cli.profile.latency_record import Latency

MB = 2**20
GB_MB = 1024
Invocations = Literal["per-layer", "per-expert"]


@dataclass(frozen=True)
class Problem:
    """All that a placement's cost depends on, besides the placement.

    latency       the profile's: times of the expert functions, and of main specs that are not in `described`
    described     times of main specs by name, where they are not the profile's own
    invocations   one call for all experts that a token hits in a function, or one after another for each (the paper's equation 5)
    """

    spec: MoeSpec
    latency: Latency
    catalog: Catalog
    workload: Workload
    described: Mapping[str, Latency] = field(default_factory=dict)
    invocations: Invocations = "per-layer"

    def latency_of(self, main: MainSpec) -> Latency:
        return self.described.get(main.name, self.latency)


@dataclass(frozen=True)
class Main:
    """A main function as bought: one of pay-per-use, or so many instances among which requests are spread."""

    spec: MainSpec
    instances: int = 1


@dataclass(frozen=True)
class Placement:
    main: MainSpec
    layers: tuple[LayerPlan, ...]
    instances: int = 1

    @property
    def bought(self) -> Main:
        return Main(self.main, self.instances)


def local_layers(problem: Problem) -> tuple[LayerPlan, ...]:
    return tuple(LayerPlan(layer=layer, remote=(), memory_mb=0, replicas=0) for layer in problem.spec.moe_layers)

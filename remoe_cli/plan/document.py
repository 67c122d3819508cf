"""The plan: which experts go remote, on what memory, and what that costs. One readable JSON file in plans/."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from remoe_cli.artifacts import Document


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MainSpec(_Part):
    """One row of the catalog's menu for the main function. Without `vcpus` it runs at the speed that the profile measured."""

    name: str
    memory_mb: int
    vcpus: float | None = None


class LayerPlan(_Part):
    """One MoE layer. `layer` is its index among all hidden layers; an empty `remote` has memory 0 and no replicas."""

    layer: int
    remote: tuple[int, ...]
    memory_mb: int
    replicas: int


class Outcome(_Part):
    """What a placement costs and how fast it is, as predicted."""

    cost_usd_per_request: float
    ttft_s: float
    tpot_s: float


class WorkloadRef(_Part):
    """One request: n_in prompt tokens, then n_out generated tokens after the first."""

    n_in: int
    n_out: int


class Targets(_Part):
    ttft_s: float | None = None
    tpot_s: float | None = None


class Source(_Part):
    """The file that this plan was made from."""

    path: str
    sha256: str


class Plan(Document):
    """`gap` is (cost - lower bound) / cost for the stated objective; a forced placement has neither bound nor gap of its own,
    so it carries those of the exact plan it is compared with (negative gap never happens: the exact plan is never dearer)."""

    schema_version: str = "remoe.plan/1"
    profile: Source
    catalog: Source
    workload: WorkloadRef
    targets: Targets
    objective: Literal["cost"]
    placement: Literal["exact", "forced"]
    cost_usd_per_request: float
    ttft_s: float
    tpot_s: float
    lower_bound_usd: float
    gap: float
    status: Literal["optimal", "within-gap", "time-limit", "forced"]
    verdict: Literal["recommended", "not recommended", "insufficient evidence"]
    reason: str
    main: MainSpec
    layers: tuple[LayerPlan, ...]
    baselines: dict[str, Outcome]

    @property
    def outcome(self) -> Outcome:
        return Outcome(cost_usd_per_request=self.cost_usd_per_request, ttft_s=self.ttft_s, tpot_s=self.tpot_s)

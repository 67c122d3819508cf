"""The plan: which experts go remote, on what memory, and what that costs. One readable JSON file in plans/."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from remoe_cli.artifacts import Document


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MainSpec(_Part):
    """One row of the catalog's menu for the main function.

    memory_mb       CPU memory, which holds local experts
    vcpus           without it, the speed that the profile measured
    gpu_memory_mb   of a GPU that comes with it and holds the rest of the model; None where there is none, or is bought by the GB-second
    usd_per_hour    of an instance that is rented, busy or not; without it, memory is paid by the second of use
    hardware        description of its speed (profile/hardware), for a profile that was not measured on such a machine
    """

    name: str
    memory_mb: int
    vcpus: float | None = None
    gpu_memory_mb: int | None = None
    usd_per_hour: float | None = None
    hardware: str | None = None


class LayerPlan(_Part):
    """One MoE layer. `layer` is its index among all hidden layers; an empty `remote` has memory 0 and no replicas.

    functions   the remote experts of each of several functions of `memory_mb`, where one does not hold them all; else empty
    replicas    instances that share out the experts of a prompt; 1 where there are several functions
    """

    layer: int
    remote: tuple[int, ...]
    memory_mb: int
    replicas: int
    functions: tuple[tuple[int, ...], ...] = ()

    @property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """The experts of each function, whether one or several; none for an empty `remote`."""
        return self.functions or ((self.remote,) if self.remote else ())


class Outcome(_Part):
    """What a placement costs and how fast it is, as predicted."""

    cost_usd_per_request: float
    ttft_s: float
    tpot_s: float


class Lengths(_Part):
    """A kind of request: its share of all, its prompt tokens, and the tokens that are generated after the first."""

    share: float
    n_in: int
    n_out: int


class WorkloadRef(_Part):
    """The requests that a plan is for. Lengths are means over `kinds`, which are left out where there is one.

    requests_per_hour   None where the traffic is unknown: then nothing idle is priced
    cold_share          share of requests that find everything cold
    """

    n_in: float
    n_out: float
    kinds: tuple[Lengths, ...] = ()
    requests_per_hour: float | None = None
    cold_share: float = 0.0

    @property
    def lengths(self) -> tuple[Lengths, ...]:
        return self.kinds or (Lengths(share=1.0, n_in=round(self.n_in), n_out=round(self.n_out)),)


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

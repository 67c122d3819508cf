"""Parts of the plan file: where the experts of each layer are, and what that costs and takes."""

from __future__ import annotations

from pydantic import Field, model_validator

from remoe_cli.artifacts import MOST_LAYERS, Experts, LayerIndex, Megabytes, Part, Replicas, is_empty, is_none
from remoe_cli.lambda_limits import MAX_TIMEOUT_S
from remoe_cli.plan.mains import MainKind


class LayerPlan(Part):
    """Where the experts of one MoE layer are, and its expert functions.

    Experts that are neither remote nor on the GPU are in the main function's CPU memory. A layer without remote experts has memory 0 and no
    replicas.

    layer       its index among all hidden layers
    remote      ids of the remote experts, ascending
    gpu         ids of the experts on the main function's GPU, ascending; none of them is remote
    functions   the experts of each function, where there are several; else empty
    replicas    instances that share the experts of a prompt; 1 where there are several functions
    timeout_s   after which the platform ends an invocation: the longest call of the plan's requests, with room; 0 without experts. By
                default the longest that there is
    """

    layer: LayerIndex
    remote: Experts
    memory_mb: Megabytes
    replicas: Replicas
    functions: tuple[Experts, ...] = ()
    timeout_s: int = MAX_TIMEOUT_S
    gpu: Experts = Field(default=(), exclude_if=is_empty)

    @model_validator(mode="after")
    def _each_expert_is_in_one_place(self) -> LayerPlan:
        if both := sorted(set(self.remote) & set(self.gpu)):
            raise ValueError(f"expert {both[0]} of layer {self.layer} is both remote and on the GPU")
        return self

    @property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """List the experts of each function, whether there is one or several; empty without remote experts."""
        return self.functions or ((self.remote,) if self.remote else ())


class Outcome(Part):
    """Predicted cost and latency of a placement.

    cost_usd_per_request   USD
    ttft_s, tpot_s         seconds to the first token, and for each further token, in the mean
    ttft_percentile_s      seconds to the first token of the request that `Targets.ttft_at` names, where there is one
    """

    cost_usd_per_request: float
    ttft_s: float
    tpot_s: float
    ttft_percentile_s: float | None = Field(default=None, exclude_if=is_none)

    @property
    def held_ttft_s(self) -> float:
        """The TTFT that a target is held against: the mean, or that of a percentile."""
        return self.ttft_s if self.ttft_percentile_s is None else self.ttft_percentile_s


class KindOutcome(Outcome):
    """Predicted cost and latency of the best known plan with one kind of main function.

    spec, instances   the main function, and how many of it
    remote_experts    of all layers together
    cold_start_s      what a cold start adds to the TTFT of a request that finds nothing warm
    """

    kind: MainKind
    spec: str
    instances: int
    remote_experts: int
    cold_start_s: float


class Spread(Part):
    """What a share of the requests does not exceed, cold ones among them.

    share             of the requests
    ttft_s, total_s   seconds to the first token, and to the last one
    """

    share: float
    ttft_s: float
    total_s: float


class Unquantised(Outcome):
    """The best known plan for a copy that is not quantised, beside that for a quantised checkpoint.

    dtype             in which the copy stores its weights
    spec, instances   the main function, and how many of it
    layers            where its experts are
    cold_start_s      what a cold start adds to the TTFT of a request that finds nothing warm
    """

    dtype: str
    spec: str
    instances: int
    layers: tuple[LayerPlan, ...] = Field(max_length=MOST_LAYERS)
    cold_start_s: float

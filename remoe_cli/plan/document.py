"""The plan: which experts go remote, on what memory, and what that costs. One readable JSON file in plans/."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from remoe_cli.artifacts import Document, Part


class MainSpec(Part):
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


class LayerPlan(Part):
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


class Outcome(Part):
    """What a placement costs and how fast it is, as predicted."""

    cost_usd_per_request: float
    ttft_s: float
    tpot_s: float


class Lengths(Part):
    """A kind of request: its share of all, its prompt tokens, and the tokens that are generated after the first."""

    share: float
    n_in: int
    n_out: int


class Source(Part):
    """The file that this plan was made from."""

    path: str
    sha256: str


class PredictedRouting(Part):
    """Requests route as prompts are predicted to, which is as a mixture of prompts that the profile recorded.

    prompts           the file; its digest is over the texts, sorted
    count             of its prompts
    predictor         which one, and its mean divergence on held-out prompts of the profile; None where those were too few
    mixture_bits      divergence between the prediction and the mixture
    recorded          prompts of the profile, ascending from 0
    weights           relative to their sum, the shares of requests that route as each
    """

    prompts: Source
    count: int
    predictor: str
    validation_bits: float | None
    mixture_bits: float
    recorded: tuple[int, ...]
    weights: tuple[int, ...]


class WorkloadRef(Part):
    """The requests that a plan is for. Lengths are means over `kinds`, which are left out where there is one.

    requests_per_hour   None where the traffic is unknown: then nothing idle is priced
    cold_share          share of requests that find everything cold
    routing             left out where it is that of all of the profile's prompts together
    """

    n_in: float
    n_out: float
    kinds: tuple[Lengths, ...] = ()
    requests_per_hour: float | None = None
    cold_share: float = 0.0
    routing: PredictedRouting | None = Field(default=None, exclude_if=lambda routing: routing is None)

    @property
    def lengths(self) -> tuple[Lengths, ...]:
        return self.kinds or (Lengths(share=1.0, n_in=round(self.n_in), n_out=round(self.n_out)),)


class Targets(Part):
    """Limits that were asked for; `budget_usd` is a request's."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    budget_usd: float | None = None


class Baseline(Outcome):
    """Another way to run the model. `spec` is what it runs on, `meets` whether it meets the targets, `assumed` what it takes for granted;
    one that nobody can buy as it stands is `ideal` and does not decide the verdict."""

    spec: str
    meets: bool
    assumed: str = ""
    ideal: bool = False


class Shift(Outcome):
    """The plan under other circumstances: `what` changed, whether it still meets the targets, and what the best plan known for these
    circumstances would cost, where that was looked for."""

    what: str
    meets: bool
    best_usd: float | None = None


class PlannedModel(Part):
    """The model that was profiled, and what deploying it moves: bytes of one routed expert, and of everything else."""

    name: str
    revision: str
    experts_per_layer: int
    expert_bytes: int
    nonexpert_bytes: int


class Costs(Part):
    """What a request costs, by part: the main function, and the expert functions of each layer. The sum is the plan's cost."""

    main_usd: float
    layers_usd: tuple[float, ...]


class Turn(Part):
    """Where the choice between sending experts away and `against` turns: at `at` `what` (such as 1.7 times t_rem, 0.3 of the tokens routed
    evenly); None when it does not, within 1/64 to 64 times or 0 to all."""

    what: str
    against: str
    at: float | None


class Flip(Part):
    """Traffic at which a main function paid by use and an always-on instance cost the same, and what each is."""

    by_use: str
    instance: str
    requests_per_hour: float


Objective = Literal["cost", "tpot", "ttft"]
Method = Literal["exact", "scan", "paper", "forced", "given"]
Status = Literal["optimal", "within-gap", "time-limit", "forced", "heuristic", "given"]
Verdict = Literal["recommended", "not recommended", "insufficient evidence"]


class Plan(Document):
    """One placement, what it costs, how sure that is, and what else there is.

    placement       who chose it; `exact` is optimal among what `notes` say
    lower_bound_usd, lower_bound_s    no plan has less of the objective, in its unit; None of the other, and for what has no bound
    gap             (value - lower bound) / value of the objective. A forced placement carries the bound of the exact plan that it is
                    compared with; a scan, the paper's heuristic and a given placement have none
    notes           whole sentences: what was assumed, and what the numbers leave out
    missing         baselines that cannot be reckoned, and why
    """

    schema_version: str = "remoe.plan/3"
    profile: Source
    catalog: Source
    prices_of: str
    model: PlannedModel
    workload: WorkloadRef
    invocations: Literal["per-layer", "per-expert"] = "per-layer"
    targets: Targets
    objective: Objective
    placement: Method
    cost_usd_per_request: float
    ttft_s: float
    tpot_s: float
    lower_bound_usd: float | None
    lower_bound_s: float | None = None
    gap: float | None
    status: Status
    verdict: Verdict
    reason: str
    notes: tuple[str, ...]
    main: MainSpec
    instances: int = 1
    layers: tuple[LayerPlan, ...]
    costs: Costs
    baselines: dict[str, Baseline]
    missing: dict[str, str] = Field(default_factory=dict)
    robustness: tuple[Shift, ...] = ()
    turns: tuple[Turn, ...] = ()
    flip: Flip | None = None

    @property
    def outcome(self) -> Outcome:
        return Outcome(cost_usd_per_request=self.cost_usd_per_request, ttft_s=self.ttft_s, tpot_s=self.tpot_s)

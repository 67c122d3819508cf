"""The plan file: which experts are remote, on what memory, and what that costs. JSON in plans/.

Programs read figures and enums. Sentences (`reason`, `notes`, `missing`, `assumed`) are for people: nothing compares them, so a plan stays
valid when they are worded in another way.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import Field

from remoe_cli import bounded
from remoe_cli.artifacts import (
    MOST_LAYERS,
    Concurrency,
    Document,
    Part,
    is_empty,
    is_none,
    is_one,
    parse_document,
)
from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.model.draft import Speculate, is_off
from remoe_cli.plan.asked import Lengths as Lengths
from remoe_cli.plan.asked import PlannedAssistant as PlannedAssistant
from remoe_cli.plan.asked import PlannedModel as PlannedModel
from remoe_cli.plan.asked import PredictedRouting as PredictedRouting
from remoe_cli.plan.asked import Served as Served
from remoe_cli.plan.asked import Source as Source
from remoe_cli.plan.asked import Targets as Targets
from remoe_cli.plan.asked import TtftAt as TtftAt
from remoe_cli.plan.asked import Waking as Waking
from remoe_cli.plan.asked import WorkloadRef as WorkloadRef
from remoe_cli.plan.mains import MainKind as MainKind
from remoe_cli.plan.mains import MainSpec as MainSpec
from remoe_cli.plan.placed import KindOutcome as KindOutcome
from remoe_cli.plan.placed import LayerPlan as LayerPlan
from remoe_cli.plan.placed import Outcome as Outcome
from remoe_cli.plan.placed import Spread as Spread
from remoe_cli.plan.placed import Unquantised as Unquantised


class BaselineName(StrEnum):
    """Another way to run the model.

    ALL_LOCAL  all experts in the main function, on the cheapest main spec that meets the targets
    MIX        the same on the smallest main spec that holds them
    CPU, GPU   the whole model in CPU memory, or in GPU memory
    STORED_CPU, STORED_GPU   the same of a quantised checkpoint, in the form in which it is stored; only where the profile has one
    FETCH      experts in CPU memory that are always on the GPU in time: an ideal that nobody can buy
    """

    ALL_LOCAL = "all-local"
    MIX = "mix"
    CPU = "cpu"
    GPU = "gpu"
    STORED_CPU = "cpu-as-stored"
    STORED_GPU = "gpu-as-stored"
    FETCH = "fetch"


GPU_BY_USE = "gpu-by-use"  # the `spec` of a baseline on GPU memory that is bought by the GB-second


class Baseline(Part):
    """Cost and latency of another way to run the model.

    cost_usd_per_request   USD; None where it is rented by the hour and the traffic is unknown: then no request has a price
    ttft_s, tpot_s         seconds to the first token, and for each further token
    ttft_percentile_s      as in `Outcome`
    cold_start_s           what a cold start adds to the TTFT of a request that finds nothing warm; in `ttft_s` with the share of these
    usd_per_hour           price of one instance, which is always on; None where it is paid by use
    spec                   name of the main spec or instance that it runs on, or GPU_BY_USE
    instances              how many of them
    meets                  whether it meets the targets, as far as they can be told
    assumed                for people: what it takes for granted
    ideal                  nobody can buy it as it stands, so it does not decide the verdict
    """

    cost_usd_per_request: float | None
    ttft_s: float
    tpot_s: float
    cold_start_s: float = 0.0
    ttft_percentile_s: float | None = Field(default=None, exclude_if=is_none)
    usd_per_hour: float | None = Field(default=None, exclude_if=is_none)
    spec: str
    instances: int = 1
    meets: bool
    assumed: str = ""
    ideal: bool = False

    @property
    def held_ttft_s(self) -> float:
        """The TTFT that a target is held against: the mean, or that of a percentile."""
        return self.ttft_s if self.ttft_percentile_s is None else self.ttft_percentile_s


class ScenarioKind(StrEnum):
    """What differs from what the plan was made for.

    CALL_OVERHEAD     the warm overhead of an invocation (t_rem), by a factor
    FUNCTION_PRICE    what expert functions cost, by a factor
    EVEN_ROUTING      a share of the tokens is routed to all experts evenly, instead of as recorded
    PROFILE_ROUTING   requests route as all of the profile's prompts together, instead of as predicted
    HELD_OUT_PROMPTS  the plan is made from every other prompt of the profile and judged on the rest
    """

    CALL_OVERHEAD = "call-overhead"
    FUNCTION_PRICE = "function-price"
    EVEN_ROUTING = "even-routing"
    PROFILE_ROUTING = "profile-routing"
    HELD_OUT_PROMPTS = "held-out-prompts"


class Scenario(Outcome):
    """Cost and latency of the plan where something differs from what it was made for.

    value             the factor of CALL_OVERHEAD and FUNCTION_PRICE, the share of EVEN_ROUTING; None for the others
    planned_prompts, judged_prompts    how many prompts HELD_OUT_PROMPTS planned and judged on; None for the others
    meets             whether the plan still meets the targets
    best_usd          what the best known plan for the scenario costs; None where none was looked for
    """

    kind: ScenarioKind
    value: float | None = Field(default=None, exclude_if=is_none)
    planned_prompts: int | None = Field(default=None, exclude_if=is_none)
    judged_prompts: int | None = Field(default=None, exclude_if=is_none)
    meets: bool
    best_usd: float | None = None


class Costs(Part):
    """Cost of a request by part: the main function, and the expert functions of each layer.

    The sum is the plan's cost.
    """

    main_usd: float
    layers_usd: tuple[float, ...]


WIDEST_FACTOR = 64  # break-evens are looked for between this factor and its inverse


class BreakEven(Part):
    """Break-even between remote experts and the baseline `against`: where both cost the same.

    parameter   CALL_OVERHEAD, FUNCTION_PRICE or EVEN_ROUTING
    at          the factor, or the share of the tokens; None where there is none up to WIDEST_FACTOR, or from none of the tokens to all
    """

    parameter: ScenarioKind
    against: BaselineName
    at: float | None


class BreakEvenTraffic(Part):
    """Traffic above which an instance that is always on costs less than a main function paid by use.

    by_use         name of the main function that is paid by use; the plan's own where the traffic is unknown
    instance       name of the instance
    against        what runs on it; None where it has remote experts too
    usd_per_hour   price of the instance
    ttft_s, tpot_s    seconds to the first token on it, and for each further token
    alone_per_hour    the same traffic where requests are served one at a time; None where they are, or where an instance is never
                      cheaper then
    """

    by_use: str
    instance: str
    against: BaselineName | None
    usd_per_hour: float
    ttft_s: float
    tpot_s: float
    requests_per_hour: float
    alone_per_hour: float | None = Field(default=None, exclude_if=is_none)


class Basis(StrEnum):
    """Why the verdict is what it is. `Plan.reason` says it in a sentence.

    TOO_FEW_TOKENS            the profile traced too few tokens to tell how often experts are used
    MISSES_TARGET             the plan misses a target
    NOTHING_ELSE_FITS         no main function holds all experts, and no other baseline can be bought and meets the targets
    OTHERS_MISS_TARGETS       all experts local can be bought, but no baseline meets the targets
    CHEAPER                   the plan costs less than every baseline that can be bought and meets the targets
    DEPENDS_ON_TRAFFIC        the same of what is paid by use; the traffic is unknown, and above some an instance is cheaper
    DEARER_THAN_WHOLE_MODEL   the whole model on CPUs or a GPU costs less, or as good as the same
    DEARER_THAN_ALL_LOCAL     all experts local costs less than this plan with remote experts, or as good as the same
    ALL_LOCAL_IS_CHEAPEST     the plan has no remote experts
    """

    TOO_FEW_TOKENS = "too-few-tokens"
    MISSES_TARGET = "misses-target"
    NOTHING_ELSE_FITS = "nothing-else-fits"
    OTHERS_MISS_TARGETS = "others-miss-targets"
    CHEAPER = "cheaper"
    DEPENDS_ON_TRAFFIC = "depends-on-traffic"
    DEARER_THAN_WHOLE_MODEL = "dearer-than-whole-model"
    DEARER_THAN_ALL_LOCAL = "dearer-than-all-local"
    ALL_LOCAL_IS_CHEAPEST = "all-local-is-cheapest"


Objective = Literal["cost", "tpot", "ttft"]
Method = Literal["exact", "scan", "paper", "forced", "given"]
Status = Literal["optimal", "within-gap", "time-limit", "forced", "heuristic", "given"]
Verdict = Literal["recommended", "not-recommended", "insufficient-evidence", "depends-on-traffic"]


class Plan(Document):
    """A placement of the experts, its cost and latency, its verdict, and what else could run the model.

    prices_of       date of the oldest price
    method          how the placement was chosen; `exact` is optimal among the plans that `notes` name
    lower_bound_usd, lower_bound_s    no plan has a smaller value of the objective; one of both is set, in the objective's unit. A forced
                    placement has the bound of the exact plan; a scan, the paper's heuristic and a given placement have none
    gap             (value - lower bound) / value
    spread          TTFT and whole time of the requests, by shares of them
    basis, reason   why the verdict is what it is, for programs and for people
    notes           for people: what was assumed, and what the figures leave out
    cold_start_s    what a cold start adds to the TTFT of a request that finds nothing warm; `ttft_s` has it with `workload.cold_share`
    instances       of the main function; more than 1 only where it is rented and the traffic is known
    concurrency     requests that each instance serves at once: as many as `workload` asks for, if the platform lets it
    speculate       draft tokens that a decode pass may have: a number, or auto for as many as the main function finds to pay
    assistant       the model that drafts where nothing is found in the text; None where the plan has none
    missing         for people: why a baseline cannot be priced
    kinds           the best known plan with each kind of main function, where one of them scales to zero and the traffic is known
    unquantised     the best known plan for a copy that is not quantised, beside a plan of the planner's own for a quantised checkpoint
    """

    schema_version: str = "remoe.plan/5"
    profile: Source
    catalog: Source
    prices_of: str
    model: PlannedModel
    workload: WorkloadRef
    invocations: Literal["per-layer", "per-expert"] = "per-layer"
    targets: Targets
    objective: Objective
    method: Method
    cost_usd_per_request: float
    ttft_s: float
    tpot_s: float
    ttft_percentile_s: float | None = Field(default=None, exclude_if=is_none)
    spread: tuple[Spread, ...] = ()
    cold_start_s: float = 0.0
    lower_bound_usd: float | None
    lower_bound_s: float | None = None
    gap: float | None
    status: Status
    verdict: Verdict
    basis: Basis
    reason: str
    notes: tuple[str, ...]
    main: MainSpec
    instances: int = 1
    concurrency: Concurrency = Field(default=1, exclude_if=is_one)
    speculate: Speculate = Field(default="off", exclude_if=is_off)
    assistant: PlannedAssistant | None = Field(default=None, exclude_if=is_none)
    layers: tuple[LayerPlan, ...] = Field(max_length=MOST_LAYERS)
    costs: Costs
    baselines: dict[BaselineName, Baseline]
    missing: dict[BaselineName, str] = Field(default_factory=dict)
    scenarios: tuple[Scenario, ...] = ()
    break_evens: tuple[BreakEven, ...] = ()
    break_even_traffic: BreakEvenTraffic | None = None
    kinds: tuple[KindOutcome, ...] = Field(default=(), exclude_if=is_empty)
    unquantised: Unquantised | None = Field(default=None, exclude_if=is_none)

    @property
    def remote_share(self) -> float:
        """The share of all experts that are remote."""
        return sum(len(layer.remote) for layer in self.layers) / max(1, self.model.experts_per_layer * len(self.layers))

    @property
    def outcome(self) -> Outcome:
        """The plan's own cost and latency."""
        return Outcome(
            cost_usd_per_request=self.cost_usd_per_request,
            ttft_s=self.ttft_s,
            tpot_s=self.tpot_s,
            ttft_percentile_s=self.ttft_percentile_s,
        )


_HINT = "Give the .json file that 'remoe plan' wrote."


def read_plan(path: Path) -> Plan:
    """Read the plan of a path that the user named.

    Raises: UsageError for what is no plan at all, ArtifactError for a plan that is damaged or of another schema.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a plan.", _HINT)
    try:
        content = bounded.read_bytes(path, bounded.DOCUMENT)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"There is no file {path}.", "Check the path, or make a plan with 'remoe plan PROFILE -o FILE'.") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.", _HINT) from None
    if b'"remoe.plan/' not in content:
        raise UsageError(f"{path} is not a plan{'' if _is_json(content) else ' (it is not JSON)'}.", _HINT)
    return parse_document(content, Plan, str(path))


def _is_json(content: bytes) -> bool:
    try:
        bounded.parse_json(content)
    except ValueError:
        return False
    return True

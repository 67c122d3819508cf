"""Parts of the plan file: what a plan was asked for.

These are its model, its requests, where their routing comes from, and its targets.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from remoe_cli.artifacts import Concurrency, Part, is_none, is_one
from remoe_cli.model.draft import Speculate, is_off


class PlannedModel(Part):
    """The profiled model: bytes of one routed expert, and of everything that is no routed expert.

    `read_...` are the same as they are stored and read, where that is quantised. `packed` says whether expert functions compute from the
    stored bytes. `experts` and `fetched_bytes` are the form in which expert functions have experts, and one in that form, where they are
    quantised on request.
    """

    name: str
    revision: str
    experts_per_layer: int
    expert_bytes: int
    nonexpert_bytes: int
    read_expert_bytes: int | None = Field(default=None, exclude_if=is_none)
    read_nonexpert_bytes: int | None = Field(default=None, exclude_if=is_none)
    packed: bool = Field(default=False, exclude_if=lambda packed: not packed)

    experts: Literal["int8", "int4"] | None = Field(default=None, exclude_if=is_none)
    fetched_bytes: int | None = Field(default=None, exclude_if=is_none)

    @property
    def expert_form(self) -> str:
        """In which form expert functions compute: `packed` or `ready` (function/ready.py)."""
        return "packed" if self.packed else "ready"

    @property
    def fetched_expert_bytes(self) -> int:
        """What an expert function fetches of one routed expert."""
        return self.fetched_bytes or self.main_expert_bytes

    @property
    def main_expert_bytes(self) -> int:
        """What the main function fetches of one routed expert: as it is stored."""
        return self.read_expert_bytes or self.expert_bytes

    @property
    def fetched_nonexpert_bytes(self) -> int:
        """What is fetched of everything else."""
        return self.read_nonexpert_bytes or self.nonexpert_bytes


class PlannedAssistant(Part):
    """The model that drafts tokens beside the planned one, and the bytes of its weights."""

    name: str
    revision: str
    bytes: int


class Lengths(Part):
    """One kind of request.

    share   of all requests
    n_in    prompt tokens
    n_out   tokens that are generated after the first
    """

    share: float
    n_in: int
    n_out: int


class Source(Part):
    """A file that the plan was made from, and its digest."""

    path: str
    sha256: str


class PredictedRouting(Part):
    """Routing that is predicted for a file of prompts, as a mixture of prompts that the profile recorded.

    prompts           the file; its digest is over the sorted texts
    count             prompts in the file
    predictor         name of the predictor
    validation_bits   its mean divergence on held-out prompts of the profile; None where the profile has too few prompts
    mixture_bits      divergence between the prediction and the mixture
    recorded          prompts of the profile that are mixed, ascending from 0
    weights           weight of each; divided by their sum, the share of requests that route as it does
    """

    prompts: Source
    count: int
    predictor: str
    validation_bits: float | None
    mixture_bits: float
    recorded: tuple[int, ...]
    weights: tuple[int, ...]


class Served(Part):
    """Which requests the deployment answers: those that are longer in any way are refused.

    cover    share of the file's requests that was asked for
    share    share that is answered
    tokens   most tokens of a request, prompt and answer together
    n_in, n_out   most prompt tokens, and most tokens after the first
    """

    cover: float
    share: float
    tokens: int
    n_in: int
    n_out: int


class Waking(Part):
    """What the traffic makes of an instance that scales to zero.

    wake_share   share of the requests that find no instance, and wake one
    up_share     share of the time that an instance is up, or waking, and so is paid for
    """

    wake_share: float
    up_share: float


class WorkloadRef(Part):
    """The requests that a plan is for.

    n_in, n_out         mean prompt tokens, and mean tokens generated after the first
    kinds               kinds of requests of different lengths, by which means are taken; empty where all have one length
    longest             prompt tokens and further tokens of every request that no other one equals or exceeds in both, by rising prompts:
                        hard limits hold for these, and so for all. Empty where all have one length
    served              which requests of a file the plan is for; None where lengths were given otherwise
    requests_per_hour   None where the traffic is unknown: then idle hours are not priced
    cold_share          share of requests that find everything cold
    routing             None: requests use experts as all of the profile's prompts together do
    waking              None where the catalog has no instance that scales to zero, or the traffic is unknown
    concurrency         requests that each instance of the main function shall serve at once; `Plan.concurrency` says how many it does
    speculate           draft tokens that a decode pass shall have at most; auto: as many as the planner chose, `Plan.speculate`
    """

    n_in: float
    n_out: float
    kinds: tuple[Lengths, ...] = ()
    longest: tuple[tuple[int, int], ...] = ()
    served: Served | None = None
    requests_per_hour: float | None = None
    cold_share: float = 0.0
    routing: PredictedRouting | None = Field(default=None, exclude_if=is_none)
    waking: Waking | None = Field(default=None, exclude_if=is_none)
    concurrency: Concurrency = Field(default=1, exclude_if=is_one)
    speculate: Speculate = Field(default="off", exclude_if=is_off)

    @property
    def lengths(self) -> tuple[Lengths, ...]:
        """List the kinds of requests, also where there is only one."""
        return self.kinds or (Lengths(share=1.0, n_in=round(self.n_in), n_out=round(self.n_out)),)

    @property
    def front(self) -> tuple[tuple[int, int], ...]:
        """List the longest requests, also where all have one length."""
        return self.longest or ((round(self.n_in), round(self.n_out)),)


class TtftAt(Part):
    """The request whose TTFT decides: if it is in time, as many requests are as a percentile asks for.

    n_in   its prompt tokens
    cold   whether it finds all cold. It need not, where the warm requests alone are as many
    """

    n_in: int
    cold: bool


class Targets(Part):
    """Upper limits that were asked for; `budget_usd` is for one request.

    ttft_percentile   per cent of the requests whose TTFT keeps the target; None: the mean keeps it
    ttft_at           the request that decides whether they do
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    budget_usd: float | None = None
    ttft_percentile: float | None = Field(default=None, exclude_if=is_none)
    ttft_at: TtftAt | None = Field(default=None, exclude_if=is_none)

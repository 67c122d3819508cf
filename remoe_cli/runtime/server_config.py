"""server.json: what a main function serves and calls, and the prices of its receipts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from remoe_cli import artifacts
from remoe_cli.errors import LongRequestError
from remoe_cli.model.draft import Speculate, is_off
from remoe_cli.model.spec import MoeSpec
from remoe_cli.plan.document import Served
from remoe_cli.profile.record import ModelRef
from remoe_cli.runtime.expected_cost import PlannedCosts, Predictor, predictor
from remoe_cli.runtime.receipt import Prices


class ServedFunction(artifacts.Part):
    """An expert function of hidden layer `layer`, which may have several (runtime/dispatch.py).

    timeout_s                 after which it is ended
    shard                     where its experts are, below the place of all shards
    head_bytes, head_sha256   of the shard's head (function/weights.py)
    form                      in which it computes its experts: `ready` or `packed` (function/ready.py)
    use                       of each expert: the share of prompt tokens of the plan's requests that need it (runtime/start_ahead.py)
    start_usd, expert_usd     what a start costs, and reading an expert
    """

    layer: artifacts.LayerIndex
    function: str
    experts: artifacts.Experts
    replicas: artifacts.Replicas
    expert_rows: artifacts.NonNegative
    timeout_s: artifacts.Tokens
    shard: str
    head_bytes: artifacts.Bytes
    head_sha256: str
    form: Literal["ready", "packed"] = Field(default="ready", exclude_if=lambda form: form == "ready")
    use: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(max_length=artifacts.MOST_EXPERTS)] = Field(
        default=(), exclude_if=artifacts.is_empty
    )
    start_usd: artifacts.NonNegative = Field(default=0.0, exclude_if=artifacts.is_zero)
    expert_usd: artifacts.NonNegative = Field(default=0.0, exclude_if=artifacts.is_zero)


class StartPolicy(artifacts.Part):
    """When functions are started ahead of their calls (runtime/start_ahead.py).

    idle_s         an instance that had no call for so long is gone
    most_usd       that the starts of a request may be expected to waste
    n_in           prompt tokens of the plan's mean request: what functions read when the main function loads is for it
    usd_per_call   of a health call: its fee, and what Lambda logs of it
    """

    idle_s: artifacts.NonNegative
    most_usd: artifacts.NonNegative
    n_in: artifacts.Tokens
    usd_per_call: artifacts.NonNegative


class ServerConfig(artifacts.Document):
    """The document server.json, the same for every target.

    model   the model that was profiled; a main function with packaged files reads only those
    assistant   the model that drafts where nothing is found (model/assistant.py); None: nobody does
    served  the requests that the plan holds for; None where it names none
    concurrency   requests that are served at once, for which the plan has provided memory
    speculate     how many draft tokens a pass may have (model/draft.py)
    cache_experts, spare_experts   whether remote experts are kept in memory that the plan does not need, and how many fit
                  (runtime/expert_cache.py)
    start_ahead   when functions are started before their calls; None: never
    gpu     whether the plan puts everything but the experts on a GPU
    gpu_experts   by hidden layer the experts that are on it too, ascending; layers without any are left out
    planned       of what a request's predicted time and cost is made; None where an earlier version has deployed it

    Where functions are called, and where all shards are, is not in it; the program that starts the main function knows that.
    """

    schema_version: str = "remoe.server/4"
    model: ModelRef
    spec: MoeSpec
    functions: tuple[ServedFunction, ...]
    prices: Prices
    gpu: bool = False
    gpu_experts: dict[artifacts.LayerIndex, artifacts.Experts] = Field(default_factory=dict, exclude_if=artifacts.is_empty)
    served: Served | None = None
    concurrency: artifacts.Concurrency = Field(default=1, exclude_if=artifacts.is_one)
    speculate: Speculate = Field(default="off", exclude_if=is_off)
    assistant: ModelRef | None = Field(default=None, exclude_if=artifacts.is_none)
    cache_experts: bool = Field(default=False, exclude_if=lambda value: not value)
    spare_experts: artifacts.Tokens = Field(default=0, exclude_if=artifacts.is_zero)
    start_ahead: StartPolicy | None = Field(default=None, exclude_if=artifacts.is_none)
    planned: PlannedCosts | None = Field(default=None, exclude_if=artifacts.is_none)

    @model_validator(mode="after")
    def _layers_are_the_models(self) -> ServerConfig:
        experts = [self.spec.experts_per_layer] * len(self.spec.moe_layers)
        if self.planned is not None and (len(self.planned.layers) != len(experts) or [*map(len, self.planned.use)] != experts):
            raise ValueError("planned is not of the model's layers and experts")
        return self

    @property
    def predictor(self) -> Predictor | None:
        """Return what predicts what a request takes and costs, where that is known."""
        return None if self.planned is None else predictor(self.planned, self.spec, self.prices.main)

    def refuse_unserved(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Refuse a request that may take more than the plan has provided for.

        Raises: UsageError with the longest request that is answered.
        """
        served = self.served
        if served is None:
            return
        within = prompt_tokens <= served.n_in and max_new_tokens <= served.n_out + 1
        if within and prompt_tokens + max_new_tokens <= served.tokens + 1:
            return
        raise LongRequestError(
            f"The request has {prompt_tokens:,} prompt tokens and may have {max_new_tokens:,} new ones, but this deployment's plan serves "
            f"requests of up to {served.tokens + 1:,} tokens in all, with prompts of up to {served.n_in:,} and up to {served.n_out + 1:,} "
            "new ones.",
            "Shorten the prompt, ask for fewer new tokens, or plan for longer requests and deploy again.",
        )

"""What a server has done, as Prometheus reads it.

Where vLLM measures the same, the name is vLLM's, so that its dashboards work unchanged. What vLLM does not have begins with `remoe_`.

Source: vLLM, "Production Metrics".
"""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from remoe_cli.runtime.main_function import Answer
from remoe_cli.runtime.receipt import Receipt

# vLLM's buckets
_TTFT_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
    2560.0,
)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
_LABELS = ("model_name",)
# vLLM's word for an answer that ended before its end
_REASONS = {"cancelled": "abort", "time-limit": "abort"}


class Metrics:
    """Counters of one server; `model_name` labels those that are vLLM's.

    `running` and `waiting` tell how many requests are answered, and how many wait.
    """

    def __init__(self, model_name: str, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str) -> Counter:
            return Counter(f"remoe_{name}", text, registry=self.registry)

        def gauge_of_vllm(name: str, text: str, now: Callable[[], float]) -> None:
            Gauge(f"vllm:{name}", text, _LABELS, registry=self.registry).labels(model_name).set_function(now)

        def counter_of_vllm(name: str, text: str) -> Counter:
            return Counter(f"vllm:{name}", text, _LABELS, registry=self.registry).labels(model_name)

        def seconds_of_vllm(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"vllm:{name}_seconds", text, _LABELS, registry=self.registry, buckets=buckets).labels(model_name)

        self._model = model_name
        gauge_of_vllm("num_requests_running", "Requests that are being answered.", running)
        gauge_of_vllm("num_requests_waiting", "Requests that wait for their turn.", waiting)
        self._prompt = counter_of_vllm("prompt_tokens", "Prompt tokens that were read.")
        self._generated = counter_of_vllm("generation_tokens", "Tokens that were generated.")
        self._drafts = counter_of_vllm("spec_decode_num_drafts", "Forward passes that tried a draft.")
        self._drafted = counter_of_vllm("spec_decode_num_draft_tokens", "Tokens of drafts that were tried.")
        self._accepted = counter_of_vllm("spec_decode_num_accepted_tokens", "Tokens of drafts that answers took over.")
        self._ended = Counter("vllm:request_success", "Answers, by why they ended.", (*_LABELS, "finished_reason"), registry=self.registry)
        self._ttft = seconds_of_vllm("time_to_first_token", "From a request's arrival to its first token.", _TTFT_S)
        self._tpot = seconds_of_vllm("request_time_per_output_token", "Mean time of a request's further tokens.", _TOKEN_S)
        self._whole = seconds_of_vllm("e2e_request_latency", "From a request's arrival to its answer's end.", _REQUEST_S)
        self._queue = seconds_of_vllm("request_queue_time", "From a request's arrival to its turn.", _REQUEST_S)
        self._failed = counter("requests_failed", "Requests that were begun and have no answer.")
        self._refused = counter("requests_refused", "Requests that were refused because the queue was full.")
        self._calls = counter("expert_invocations", "Invocations of expert functions, as Lambda counts them.")
        self._cold = counter("expert_cold_starts", "Cold starts of expert functions.")
        self._retries = counter("expert_retries", "Tries of calls of expert functions after the first.")
        self._hedges = counter("expert_hedges", "Second calls of the same rows, made because the first took long.")
        self._fallbacks = counter("expert_fallbacks", "Calls whose rows the main function computed itself, as no function answered.")
        self._ahead = counter("expert_starts_ahead", "Calls that only started an expert function, before rows came.")
        self._saved = counter("expert_calls_saved", "Calls that were not made, as their experts were in spare memory.")
        self._billed = counter("expert_billed_seconds", "Seconds that expert functions were billed.")
        self._usd = Counter("remoe_cost_usd", "Cost at list prices, by what was paid.", ("part",), registry=self.registry)
        for part in ("main", "functions"):
            self._usd.labels(part)

    def refused(self) -> None:
        self._refused.inc()

    def answered(self, answer: Answer, arrived_s: float, begun_s: float) -> None:
        """Count an answer; the times are of `time.monotonic()`."""
        receipt, waited_s = answer.receipt, begun_s - arrived_s
        self._count(receipt)
        for choice in answer.choices:
            self._ended.labels(self._model, _REASONS.get(choice.finish_reason, choice.finish_reason)).inc()
        self._queue.observe(waited_s)
        if receipt.ttft_s is not None:
            self._ttft.observe(waited_s + receipt.ttft_s)
        if receipt.tpot_s is not None:
            self._tpot.observe(receipt.tpot_s)
        self._whole.observe(time.monotonic() - arrived_s)

    def failed(self, receipt: Receipt | None) -> None:
        """Count a request that failed, with what was billed until then."""
        self._failed.inc()
        if receipt is not None:
            self._count(receipt)

    def _count(self, receipt: Receipt) -> None:
        self._prompt.inc(receipt.prompt_tokens)
        self._generated.inc(receipt.generated_tokens)
        self._drafts.inc(receipt.drafts)
        self._drafted.inc(receipt.draft_tokens)
        self._accepted.inc(receipt.accepted_tokens)
        self._calls.inc(receipt.invocations)
        self._cold.inc(receipt.cold_starts)
        self._retries.inc(receipt.retries)
        self._hedges.inc(receipt.hedges)
        self._fallbacks.inc(receipt.fallbacks)
        self._ahead.inc(receipt.starts_ahead)
        self._saved.inc(receipt.saved_calls)
        self._billed.inc(receipt.billed_ms / 1000)
        if receipt.cost is not None:
            self._usd.labels("main").inc(receipt.cost.main_usd)
            self._usd.labels("functions").inc(receipt.cost.functions_usd)

    def text(self) -> bytes:
        return generate_latest(self.registry)

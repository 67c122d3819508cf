"""Money, times, ids, names and verdicts as text for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

from remoe_cli.plan.document import GPU_BY_USE, BaselineName, BreakEvenTraffic, MainKind, Plan, Verdict
from remoe_cli.units import size

HOURS_PER_MONTH = 730

VERDICT_WORDS: dict[Verdict, str] = {
    "recommended": "moving experts out: worth it",
    "not-recommended": "moving experts out: not worth it",
    "insufficient-evidence": "moving experts out: too little evidence to tell",
    "depends-on-traffic": "moving experts out: depends on your traffic",
}
BASELINE_NAMES = {  # within a sentence
    BaselineName.ALL_LOCAL: "all experts local",
    BaselineName.MIX: "all experts local",
    BaselineName.CPU: "the whole model on CPUs",
    BaselineName.GPU: "the whole model on a GPU",
    BaselineName.STORED_CPU: "the whole model, quantised as it is stored, on CPUs",
    BaselineName.STORED_GPU: "the whole model, quantised as it is stored, on a GPU",
}

KIND_NAMES = {
    MainKind.BY_USE: "paid by use",
    MainKind.TO_ZERO: "scaled to zero between requests",
    MainKind.ALWAYS_ON: "always on",
}


def figure(value: float) -> str:
    """Write a figure with four digits or all before the point, never with an exponent.

    >>> figure(17917.3), figure(119.1), figure(20.0), figure(0.25)
    ('17,917', '119.1', '20', '0.25')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def request_tokens(n_in: float, n_out: float) -> str:
    """Write how long a request is; the answer's first token, which `n_out` leaves out, counts too.

    >>> request_tokens(40, 15), request_tokens(1200.0, 1000.0)
    ('40 prompt + 16 output tokens', '1,200 prompt + 1,001 output tokens')
    """
    return f"{figure(n_in)} prompt + {figure(n_out + 1)} output tokens"


class Requests(Protocol):
    """What the price of a request is written with.

    n_out               tokens generated after the first
    requests_per_hour   None where the traffic is unknown
    """

    @property
    def n_out(self) -> float: ...

    @property
    def requests_per_hour(self) -> float | None: ...


def dollars(usd: float) -> str:
    """Write USD as people read them: whole dollars from 100 on, else three digits, never with an exponent.

    >>> dollars(1811.3), dollars(108.27), dollars(36.885), dollars(0.0074148), dollars(0.0000239383), dollars(0.0)
    ('$1,811', '$108', '$36.9', '$0.00741', '$0.0000239', '$0')
    """
    if usd >= 99.95:
        return f"${usd:,.0f}"
    digits = f"{usd:.{max(2 - math.floor(math.log10(usd)), 0)}f}" if usd > 0 else "0"
    return f"${digits.rstrip('0').rstrip('.') if '.' in digits else digits}"


def month_usd(usd_per_request: float, requests: Requests) -> float | None:
    """Compute what the requests of a month cost; None where the traffic is unknown."""
    return None if requests.requests_per_hour is None else usd_per_request * requests.requests_per_hour * HOURS_PER_MONTH


def token_usd(usd_per_request: float, requests: Requests) -> float:
    """Compute what a million output tokens cost, with the prompts that lead to them."""
    return usd_per_request / (requests.n_out + 1) * 1e6


def amount(usd_per_request: float, requests: Requests) -> str:
    """Write the USD of a month where the traffic is known, else of a million output tokens."""
    month = month_usd(usd_per_request, requests)
    return dollars(token_usd(usd_per_request, requests) if month is None else month)


def price(usd_per_request: float, requests: Requests) -> str:
    """Write a cost as people pay it: a month where the traffic is known, else a million output tokens.

    >>> from remoe_cli.plan.document import WorkloadRef
    >>> price(0.0074148, WorkloadRef(n_in=125, n_out=200, requests_per_hour=20.0))
    '$108 a month'
    >>> price(0.0074148, WorkloadRef(n_in=125, n_out=200))
    '$36.9 per million output tokens'
    """
    unit = "per million output tokens" if requests.requests_per_hour is None else "a month"
    return f"{amount(usd_per_request, requests)} {unit}"


def prices(usd_per_request: float, requests: Requests) -> str:
    """Write a cost in each way that people pay it.

    >>> from remoe_cli.plan.document import WorkloadRef
    >>> prices(0.0074148, WorkloadRef(n_in=125, n_out=200, requests_per_hour=20.0))
    '$108 a month at 20 requests an hour, $36.9 per million output tokens, $0.00741 a request'
    """
    month = month_usd(usd_per_request, requests)
    monthly = "" if month is None else f"{dollars(month)} a month at {figure(requests.requests_per_hour or 0.0)} requests an hour, "
    return f"{monthly}{dollars(token_usd(usd_per_request, requests))} per million output tokens, {dollars(usd_per_request)} a request"


def seconds(time_s: float) -> str:
    """Write a time with two or three digits.

    >>> seconds(0.2131), seconds(4.871), seconds(69.64), seconds(1268.0), seconds(0.0)
    ('0.21 s', '4.9 s', '69.6 s', '1,268 s', '0 s')
    """
    return f"{time_s:,.0f} s" if time_s >= 99.95 or time_s == 0 else f"{time_s:.1f} s" if time_s >= 9.95 else f"{time_s:.2g} s"


def alone(traffic: BreakEvenTraffic, concurrency: int) -> str:
    """Say where the break-even traffic is if requests are served one at a time.

    Nothing where they are.
    """
    if concurrency == 1:
        return ""
    at = "an instance is never cheaper" if traffic.alone_per_hour is None else f"that is at {figure(traffic.alone_per_hour)}"
    return f" Where requests are served one at a time, {at}."


def warm_and_cold(mean_s: float, cold_s: float, cold_share: float) -> str:
    """Write a mean time as that of warm requests and that of cold ones, which take `cold_s` longer.

    >>> warm_and_cold(17.1, 34.1, 0.189)
    '10.7 s warm, 44.8 s in the 18.9% that are cold'
    """
    warm_s = mean_s - cold_share * cold_s
    return f"{seconds(warm_s)} warm, {seconds(warm_s + cold_s)} in the {cold_share:.1%} that are cold"


def per_million(usd: float) -> str:
    """Write what a request costs as the cost of a million requests.

    >>> per_million(0.0000239383)
    '$23.9 per million requests'
    """
    return f"{dollars(usd * 1e6)} per million requests"


def id_ranges(ids: tuple[int, ...]) -> str:
    """Write ascending ids with runs of three or more as `first-last`.

    >>> id_ranges((0, 1, 2, 5, 7, 8))
    '0-2, 5, 7, 8'
    """
    runs: list[list[int]] = []
    for expert in ids:
        if runs and expert == runs[-1][-1] + 1:
            runs[-1].append(expert)
        else:
            runs.append([expert])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def bought(spec: str, instances: int = 1) -> str:
    """Write what a main function or a baseline runs on, with the number of instances if there are several.

    >>> bought("ml.g6e.xlarge", 6)
    '6 x ml.g6e.xlarge'
    """
    name = "GPU memory by the GB-second" if spec == GPU_BY_USE else spec
    return name if instances == 1 else f"{instances} x {name}"


def capitalized(text: str) -> str:
    """Write the first letter of a sentence as a capital."""
    return text[:1].upper() + text[1:]


def form_text(plan: Plan) -> Iterator[str]:
    """Say in which form expert functions compute quantised experts.

    Nothing where none are quantised, or none is remote.
    """
    model = plan.model
    if model.fetched_expert_bytes == model.expert_bytes or not any(layer.remote for layer in plan.layers):
        return
    if model.packed:
        yield f"packed: functions compute from the stored bytes, {size(model.fetched_expert_bytes)} an expert"
    else:
        yield f"ready: functions dequantise each expert when they load it, {size(model.expert_bytes)} an expert"


def drafts_text(plan: Plan) -> Iterator[str]:
    """Say how many draft tokens a pass may have, and who chose that."""
    if plan.workload.speculate == "off":
        return
    chosen = ", as the planner chose" if plan.workload.speculate == "auto" else ""
    if (assistant := plan.assistant) is not None:
        chosen += f"; where the text has none, {assistant.name} drafts them ({size(assistant.bytes)} in the main function)"
    match plan.speculate:
        case "off":
            yield f"none{chosen}"
        case "auto":
            yield f"as many tokens a pass as each answer's last drafts tell (--speculate auto){chosen}"
        case tokens:
            yield f"up to {tokens} token{'s' * (tokens > 1)} a pass{chosen}"

"""Let requests arrive at one way of serving, one after another in the order of time.

Where an instance answers one request at a time, alone.py lets them arrive, else shared.py. Expert functions have as many instances as the
requests that run need (`Functions.needed`). Beside a main function that starts, they start meanwhile; else the request waits for them.

Lists and heaps do this, as a million requests shall take seconds: a general framework of processes takes several microseconds for each of
the events of a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_cli.plan.arrays import Bools, Floats
from remoe_cli.simulate import alone, shared
from remoe_cli.simulate.load import Load
from remoe_cli.simulate.requests import Arrivals
from remoe_cli.simulate.service import Service


@dataclass(frozen=True)
class Run:
    """What became of the requests.

    ttft_s, tpot_s   float64 [N], NaN for refused ones; `tpot_s` also for answers of one token
    cold, refused    bool [N]: requests that waited for a start, and those without an answer: not taken, or ended by the platform
    usd, over_s      what all of it costs, over how many seconds
    up_share         part of the time in which rented instances were paid
    """

    ttft_s: Floats
    tpot_s: Floats
    cold: Bools
    refused: Bools
    usd: float
    over_s: float
    up_share: float
    tokens: int


def run(service: Service, arrivals: Arrivals, seed: int) -> Run:
    """Simulate one way of serving."""
    fits = _fits(service, arrivals)
    return run_load(service, arrivals, fits, _load(service, arrivals, fits, np.random.default_rng(seed)))


def run_load(service: Service, arrivals: Arrivals, fits: Bools, load: Load) -> Run:
    """Simulate one way of serving where it is known what each of the requests that fit takes."""
    times = alone.serve(service, load) if service.at_once == 1 else shared.serve(service, load)
    answered, cold, first_s, end_s = (_among(fits, each) for each in (times.answered, times.cold, times.first_s, times.end_s))
    usd = times.functions_usd + service.usd_per_request * int(times.taken.sum()) + service.usd_per_s * times.paid_s
    usd += service.start_usd * times.main_starts + service.usd_per_hour * times.up_s / 3600
    usd += times.function_starts * (service.functions.start_usd if service.functions else 0.0)
    further = answered & (arrivals.n_out > 0)
    return Run(
        ttft_s=np.where(answered, first_s - arrivals.at_s, np.nan),
        tpot_s=np.where(further, (end_s - first_s) / np.maximum(1, arrivals.n_out), np.nan),
        cold=cold,
        refused=~answered,
        usd=usd,
        over_s=arrivals.over_s,
        up_share=times.up_s / arrivals.over_s if service.instances is not None else 0.0,
        tokens=int((arrivals.n_out + 1)[answered].sum()),
    )


def _load(service: Service, arrivals: Arrivals, fits: Bools, random: np.random.Generator) -> Load:
    """Say what each of the requests that fit takes."""
    n_in, n_out = arrivals.n_in[fits], arrivals.n_out[fits]
    # The mean over the tokens of one answer; single tokens differ by the experts that they use.
    noise = random.standard_normal(len(n_out)) * service.token_sd_s / np.sqrt(np.maximum(1, n_out))
    return Load(
        at_s=arrivals.at_s[fits],
        n_in=n_in,
        prompt_s=np.interp(n_in, service.prompts, service.prefill_s),
        prompt_usd=np.interp(n_in, service.prompts, service.prefill_usd),
        tpot_s=np.maximum(0.0, service.step_s[1] + noise),
        n_out=n_out,
        cold_s=random.choice(service.functions.waits_s, len(n_out)) if service.functions else np.zeros(len(n_out)),
        over_s=arrivals.over_s,
    )


def _among(fits: Bools, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Put figures of the requests that fit at their places among all; others have 0."""
    every = np.zeros(len(fits), dtype=values.dtype)
    every[fits] = values
    return every


def _fits(service: Service, arrivals: Arrivals) -> Bools:
    """Say which requests are no longer than those that the deployment takes."""
    n_in, n_out, most = arrivals.n_in, arrivals.n_out, service.longest
    if most is None:
        return np.ones(len(n_in), dtype=bool)
    fits: Bools = (n_in <= most.n_in) & (n_out <= most.n_out) & (n_in + n_out <= most.tokens)
    return fits

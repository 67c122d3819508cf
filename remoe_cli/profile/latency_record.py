"""The latency part of a profile: fitted curves, the raw points behind them, and how far off they are.

Times are in seconds, compute power in vCPUs. A curve is data with a few lines of arithmetic; how it was fitted is
profile/curves.py's business, how it was measured profile/latency.py's, how it was described profile/hardware.py's.

Every curve has `work_s(tokens, vcpus)` and `elapsed_s(work_s, vcpus)`. Work adds up over the experts of one call, elapsed time need
not: under a CPU quota the waiting depends on the call's whole work. `seconds` is one expert alone in a call, 0 for no tokens.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from remoe_cli.artifacts import Part

WARN_ABOVE = 0.15  # held-out median error of a kept curve
WARN_SPREAD = 1.5  # of passes that do the same


class _Curve(Part):
    def work_s(self, tokens: npt.ArrayLike, vcpus: npt.ArrayLike) -> Any:
        """What one expert adds to a call, broadcast; 0 for no tokens."""
        n, v = np.asarray(tokens, dtype=np.float64), np.asarray(vcpus, dtype=np.float64)
        return np.where(n > 0, self._work_s(n, v), 0.0)

    def _work_s(self, n: Any, v: Any) -> Any:
        raise NotImplementedError

    def elapsed_s(self, work_s: npt.ArrayLike, vcpus: npt.ArrayLike) -> Any:
        """How long a call of that much work takes."""
        return np.asarray(work_s, dtype=np.float64) + 0.0 * np.asarray(vcpus, dtype=np.float64)

    def seconds(self, tokens: npt.ArrayLike, vcpus: npt.ArrayLike) -> Any:
        return self.elapsed_s(self.work_s(tokens, vcpus), vcpus)


class Linear(Part):
    """Time of a piece of work for n tokens: 0 for n = 0, else fixed_s + per_token_s * n, but never less than least_s.

    least_s   reading the weights, where a roofline says so
    """

    fixed_s: float
    per_token_s: float
    least_s: float = 0.0

    def seconds(self, tokens: npt.ArrayLike) -> Any:
        n = np.asarray(tokens, dtype=np.float64)
        return np.where(n > 0, np.maximum(self.least_s, self.fixed_s + self.per_token_s * n), 0.0)


class Exponential(_Curve):
    """The paper's form (method section 8), for n tokens: (th1 exp(-th2 v) + th3) (1 + per_token (n - 1)), at v vCPUs."""

    form: Literal["exponential"] = "exponential"
    th1_s: float
    th2: float
    th3_s: float
    per_token: float

    def _work_s(self, n: Any, v: Any) -> Any:
        return (self.th1_s * np.exp(-self.th2 * v) + self.th3_s) * (1 + self.per_token * (n - 1))


class Physical(_Curve):
    """Overhead that no vCPU shortens, then reading the weights and computing rows: overhead + (weights + per_token n) / v."""

    form: Literal["physical"] = "physical"
    overhead_s: float
    weights_s: float
    per_token_s: float

    def _work_s(self, n: Any, v: Any) -> Any:
        return self.overhead_s + (self.weights_s + self.per_token_s * n) / v


class Roofline(_Curve):
    """Reading weights and computing rows overlap, and more than `saturation_vcpus` do not help:
    overhead + max(weights, per_token n) / min(v, saturation)."""

    form: Literal["roofline"] = "roofline"
    overhead_s: float
    weights_s: float
    per_token_s: float
    saturation_vcpus: float

    def _work_s(self, n: Any, v: Any) -> Any:
        return self.overhead_s + np.maximum(self.weights_s, self.per_token_s * n) / np.minimum(v, self.saturation_vcpus)


class CpuQuota(_Curve):
    """One thread under a CPU quota as Linux and Lambda enforce it: a share v < 1 runs at full speed for v of each period, then waits.

    Work is fixed + per_token n seconds of CPU, whatever v. An idle function starts at a random point of a period with its quota whole,
    and gets it again when the next period begins; so a call of up to v periods is not slowed at all, and the mean wait of a longer one
    that needs x quotas of CPU is (1 - v) periods times (1 - v) (ceil(x) - 3/2) + v (x - 1).
    """

    form: Literal["quota"] = "quota"
    fixed_s: float
    per_token_s: float
    period_s: float

    def _work_s(self, n: Any, v: Any) -> Any:
        return self.fixed_s + self.per_token_s * n + 0.0 * v

    def elapsed_s(self, work_s: npt.ArrayLike, vcpus: npt.ArrayLike) -> Any:
        work, v = np.asarray(work_s, dtype=np.float64), np.minimum(np.asarray(vcpus, dtype=np.float64), 1.0)
        quotas = work / (v * self.period_s)
        waits = (1 - v) * (np.ceil(quotas) - 1.5) + v * (quotas - 1)
        return work + np.where(quotas > 1, (1 - v) * self.period_s * waits, 0.0)


Curve = Annotated[Exponential | Physical | Roofline | CpuQuota, Field(discriminator="form")]


class MeasuredPoint(Part):
    """One measured median."""

    tokens: int
    vcpus: float
    seconds: float


class Timing(Part):
    """One expert's time against tokens and vCPUs: the curve that predicts held-out points best, and what it was chosen from.

    held_out_error   median relative error of the kept form on points that it was not fitted to; None for a description
    errors           by form that was tried, the geometric mean factor by which such points are missed, less 1: the least is kept
    points           what was measured; empty for a description
    residuals        (predicted - measured) / measured of the kept curve at each point
    """

    curve: Curve
    held_out_error: float | None
    errors: dict[str, float]
    points: tuple[MeasuredPoint, ...]
    residuals: tuple[float, ...]

    def seconds(self, tokens: npt.ArrayLike, vcpus: npt.ArrayLike) -> Any:
        """One expert alone in a call for n tokens at v vCPUs, broadcast; 0 for no tokens."""
        return self.curve.seconds(tokens, vcpus)

    def work_s(self, tokens: npt.ArrayLike, vcpus: npt.ArrayLike) -> Any:
        """What one expert adds to a call of several; `elapsed_s` of the sum is how long the call takes."""
        return self.curve.work_s(tokens, vcpus)

    def elapsed_s(self, work_s: npt.ArrayLike, vcpus: npt.ArrayLike) -> Any:
        return self.curve.elapsed_s(work_s, vcpus)


class LayerTimes(Part):
    """Non-expert work layer by layer, as measured: seconds[i][j] for layer `names[i]` and tokens[j] (0 stands for one token after a
    cached prompt). The last name is `rest`: embeddings, final norm and head.

    spread   how many times as long as the fastest pass the median one took, at the count of tokens where that is most: 1 on a quiet machine
    """

    names: tuple[str, ...]
    tokens: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    spread: float = 1.0


class Quantiles(Part):
    """The spread of a measured time. `tenths` are the means of its ten tenths, ascending: equally likely values with the right mean."""

    p50: float
    p90: float
    p99: float
    tenths: tuple[float, ...] = Field(min_length=1)

    @property
    def mean(self) -> float:
        return sum(self.tenths) / len(self.tenths)


class InvocationTiming(Part):
    """Warm invocations of a live target, as the dispatcher sees them.

    unbilled_s     client's elapsed time less the function's duration, for a small payload; where prompts were asked, as they were seen in
                   answers, with what the main process's own work takes longer for each call
    billed_s       the function's duration, which is what is billed, less the experts' own computing (decoding, encoding, the runtime)
    bytes_per_s    rate at which a payload's further bytes pass, request and response together, on the wire
    samples        (payload bytes both ways, elapsed_s, duration_s, compute_s) of each call
    """

    target: str
    measured_on: str
    unbilled_s: Quantiles
    billed_s: Quantiles
    bytes_per_s: float
    samples: tuple[tuple[int, float, float, float], ...]


class ColdStart(Part):
    """Medians over cold starts of a live target; `total_s` is what the client waits, the others are its parts in order."""

    starts: int
    process_s: float
    imports_s: float
    weights_s: float
    first_result_s: float
    total_s: float


class Latency(Part):
    """Times that the cost model needs (method section 2).

    source              `measured` on `machine`, or `described` by a hardware file (roofline), which `machine` then names
    nonexpert_prefill   all non-expert modules of the whole model, for n prompt tokens (sum over layers of tau_f_l)
    nonexpert_decode_s  the same for one generated token (sum over layers of t_f_l)
    nonexpert_layers    the same by layer, raw; None for a description
    local_expert        one expert by the main process (tau_c_l(w, n))
    remote_expert       one expert by the function's own arithmetic (tau_c_l(y, n))
    copy_s              n tokens' hidden states from one device to the other (tau_sw(n)), paid twice a layer; 0 without an accelerator
    main_vcpus          vCPUs of the main process for which the non-expert times hold
    invocation          a live target's, when there was one
    load_s              reading the main model from disk
    """

    source: Literal["measured", "described"]
    machine: str
    measured_on: str
    main_vcpus: float
    nonexpert_prefill: Linear
    nonexpert_decode_s: float
    nonexpert_layers: LayerTimes | None
    local_expert: Timing
    remote_expert: Timing
    copy_s: Linear
    invocation: InvocationTiming | None = None
    cold_start: ColdStart | None = None
    load_s: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know before trusting these times, in whole sentences."""
        said = []
        for name, timing in (("the main process", self.local_expert), ("the function", self.remote_expert)):
            if timing.held_out_error is not None and timing.held_out_error > WARN_ABOVE:
                said.append(
                    f"The fitted time of an expert in {name} is off by {timing.held_out_error:.0%} (median, on points not used "
                    f"for fitting; form '{timing.curve.form}'). Profile on a quiet machine."
                )
        spread = self.nonexpert_layers.spread if self.nonexpert_layers else 1.0
        if spread > WARN_SPREAD:
            said.append(
                f"Passes through the non-expert modules took up to {spread:.1f} times (median) as long as the fastest, so something else "
                f"was using the cores. Profile on a quiet machine."
            )
        points = self.remote_expert.points
        if points and all(point.vcpus >= 1 for point in points):
            said.append("No CPU quota can be set on this machine: the function was timed on one whole vCPU, smaller shares are computed.")
        return tuple(said)

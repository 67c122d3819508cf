"""The latencies of a profile: fitted curves, the measured points behind them, and their errors.

Times are in seconds, compute power is in vCPUs. A curve is data with a few lines of arithmetic. curves.py fits it, latency.py measures
its points, and hardware.py makes one from a description.

Every curve has `work_s(tokens, vcpus)` and `elapsed_s(work_s, vcpus)`. The work of the experts of one call adds up. Elapsed time may not:
under a CPU quota the waiting depends on the whole work of the call. `seconds` is the time of one expert alone in a call, 0 for no tokens.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from remoe_cli.artifacts import Bytes, Figure, NonNegative, Part, Positive, Tokens, is_empty, is_none

WARN_ABOVE = 0.15  # held-out median error of a kept curve
WARN_SPREAD = 1.5  # median over least time of passes that do the same


class _Curve(Part):
    """What all curves share; n tokens and v vCPUs are broadcast."""

    def work_s(self, tokens: npt.ArrayLike, vcpus: npt.ArrayLike) -> Any:
        """Compute the work that one expert adds to a call; 0 for no tokens."""
        n, v = np.asarray(tokens, dtype=np.float64), np.asarray(vcpus, dtype=np.float64)
        return np.where(n > 0, self._work_s(n, v), 0.0)

    def _work_s(self, n: Any, v: Any) -> Any:
        raise NotImplementedError

    def elapsed_s(self, work_s: npt.ArrayLike, vcpus: npt.ArrayLike) -> Any:
        """Compute how long a call with so much work takes."""
        return np.asarray(work_s, dtype=np.float64) + 0.0 * np.asarray(vcpus, dtype=np.float64)

    def seconds(self, tokens: npt.ArrayLike, vcpus: npt.ArrayLike) -> Any:
        """Compute the time of a call with one expert."""
        return self.elapsed_s(self.work_s(tokens, vcpus), vcpus)


class Linear(Part):
    """Time of work for n tokens: 0 for n = 0, else fixed_s + per_token_s * n, but at least least_s.

    >>> Linear(fixed_s=1.0, per_token_s=0.5).seconds([0, 1, 4]).tolist()
    [0.0, 1.5, 3.0]

    least_s   the time to read the weights, for a roofline
    """

    fixed_s: NonNegative
    per_token_s: NonNegative
    least_s: NonNegative = 0.0

    def seconds(self, tokens: npt.ArrayLike) -> Any:
        """Compute the time for each number of tokens."""
        n = np.asarray(tokens, dtype=np.float64)
        return np.where(n > 0, np.maximum(self.least_s, self.fixed_s + self.per_token_s * n), 0.0)


class AssistantTimes(Part):
    """What an assistant (model/assistant.py) takes in the main process.

    prefill    to read n tokens
    decode_s   to draft one token
    """

    prefill: Linear
    decode_s: NonNegative

    def slower(self, factor: float) -> AssistantTimes:
        """Return the times of a machine that takes so many times as long."""
        prefill = {name: value * factor for name, value in self.prefill}
        return AssistantTimes(prefill=Linear(**prefill), decode_s=self.decode_s * factor)

    def step_s(self, drafted: float, caught_up: float) -> float:
        """Compute the time in which it drafts so many tokens, and reads so many more that it did not draft."""
        return drafted * self.decode_s + caught_up * self.prefill.per_token_s


class Exponential(_Curve):
    """The paper's form for v vCPUs and n tokens: (th1 exp(-th2 v) + th3) (1 + per_token (n - 1)).

    Source: method.md, section 8, which has it for one token.
    """

    form: Literal["exponential"] = "exponential"
    th1_s: NonNegative
    th2: NonNegative
    th3_s: NonNegative
    per_token: NonNegative

    def _work_s(self, n: Any, v: Any) -> Any:
        return (self.th1_s * np.exp(-self.th2 * v) + self.th3_s) * (1 + self.per_token * (n - 1))


class Physical(_Curve):
    """Overhead that vCPUs do not shorten, and work that they do: overhead + (weights + per_token n) / v."""

    form: Literal["physical"] = "physical"
    overhead_s: NonNegative
    weights_s: NonNegative
    per_token_s: NonNegative

    def _work_s(self, n: Any, v: Any) -> Any:
        return self.overhead_s + (self.weights_s + self.per_token_s * n) / v


class Roofline(_Curve):
    """Reading and computing at once: overhead + max(weights, per_token n) / min(v, saturation).

    More than `saturation_vcpus` do not help.
    """

    form: Literal["roofline"] = "roofline"
    overhead_s: NonNegative
    weights_s: NonNegative
    per_token_s: NonNegative
    saturation_vcpus: Positive

    def _work_s(self, n: Any, v: Any) -> Any:
        return self.overhead_s + np.maximum(self.weights_s, self.per_token_s * n) / np.minimum(v, self.saturation_vcpus)


class CpuQuota(_Curve):
    """One thread under a CPU quota, as Linux and Lambda enforce it.

    With v < 1 vCPUs a function runs at full speed for v of each period, then waits for the next. Its work is fixed + per_token n seconds
    of CPU, whatever v is. An idle function starts at a random point of a period with its whole quota, and gets it again when the next
    period begins. So a call of up to v periods does not wait, and the mean wait of a longer one, which needs x quotas of CPU, is (1 - v)
    periods times (1 - v) (ceil(x) - 3/2) + v (x - 1).
    """

    form: Literal["quota"] = "quota"
    fixed_s: NonNegative
    per_token_s: NonNegative
    period_s: Positive

    def _work_s(self, n: Any, v: Any) -> Any:
        return self.fixed_s + self.per_token_s * n + 0.0 * v

    def elapsed_s(self, work_s: npt.ArrayLike, vcpus: npt.ArrayLike) -> Any:
        work, v = np.asarray(work_s, dtype=np.float64), np.minimum(np.asarray(vcpus, dtype=np.float64), 1.0)
        quotas = work / (v * self.period_s)
        waits = (1 - v) * (np.ceil(quotas) - 1.5) + v * (quotas - 1)
        return work + np.where(quotas > 1, (1 - v) * self.period_s * waits, 0.0)


Curve = Annotated[Exponential | Physical | Roofline | CpuQuota, Field(discriminator="form")]


class MeasuredPoint(Part):
    """What an expert takes for `tokens` tokens at `vcpus` vCPUs.

    It is the median of measured times; in the main process, times `Latency.slower_in_passes`.
    """

    tokens: Tokens
    vcpus: NonNegative
    seconds: NonNegative


class Timing(Part):
    """One expert's time against tokens and vCPUs: the best curve, and the points that it is fitted to.

    held_out_error   median relative error of the kept form at points that it was not fitted to; None for a description
    errors           by form, the geometric mean factor by which it misses such points, minus 1; the form with the least is kept
    points           the measured points; none for a description
    residuals        (predicted - measured) / measured of the kept curve at each point
    """

    curve: Curve
    held_out_error: Figure | None
    errors: dict[str, Figure]
    points: tuple[MeasuredPoint, ...]
    residuals: tuple[Figure, ...]

    def seconds(self, tokens: npt.ArrayLike, vcpus: npt.ArrayLike) -> Any:
        """Compute the time of one expert alone in a call; 0 for no tokens."""
        return self.curve.seconds(tokens, vcpus)

    def work_s(self, tokens: npt.ArrayLike, vcpus: npt.ArrayLike) -> Any:
        """Compute the work that one expert adds to a call; `elapsed_s` of the sum is the time of the call."""
        return self.curve.work_s(tokens, vcpus)

    def elapsed_s(self, work_s: npt.ArrayLike, vcpus: npt.ArrayLike) -> Any:
        """Compute how long a call with so much work takes."""
        return self.curve.elapsed_s(work_s, vcpus)


class LayerTimes(Part):
    """Measured times of the non-expert modules by layer.

    names     the layers; the last is `rest`: embeddings, final norm and head
    tokens    numbers of tokens; 0 stands for one token after a cached prompt
    seconds   seconds[i][j] is the time of layer names[i] for tokens[j]
    spread    the median pass over the fastest pass, at the number of tokens where this is largest: 1 on a quiet machine
    """

    names: tuple[str, ...]
    tokens: tuple[Tokens, ...]
    seconds: tuple[tuple[Figure, ...], ...]
    spread: Figure = 1.0


class Quantiles(Part):
    """The distribution of a measured time.

    tenths   the means of its ten tenths, ascending: equally likely values whose mean is right
    """

    p50: Figure
    p90: Figure
    p99: Figure
    tenths: tuple[Figure, ...] = Field(min_length=1)

    @property
    def mean(self) -> float:
        return sum(self.tenths) / len(self.tenths)


class InvocationTiming(Part):
    """Warm invocations of a running deployment, as the dispatcher sees them.

    unbilled_s    the client's elapsed time minus the function's duration, for a small payload. If the deployment answered prompts, it is
                  the value in these answers, and holds the time that each call adds to the main function's own work.
    billed_s      the function's duration minus the experts' computing: decoding, encoding, the runtime
    bytes_per_s   rate on the wire at which a larger payload passes, request and response together
    samples       (payload bytes of request and response, elapsed_s, duration_s, compute_s) of each call
    """

    target: str
    measured_on: str
    unbilled_s: Quantiles
    billed_s: Quantiles
    bytes_per_s: Positive
    samples: tuple[tuple[Bytes, Figure, Figure, Figure], ...]


class ColdStart(Part):
    """Medians over cold starts of a running deployment.

    total_s is the wait of the client. The other times are its steps, in order.

    waits_s   the wait of the client in single starts, ascending
    """

    starts: Tokens
    process_s: Figure
    imports_s: Figure
    weights_s: NonNegative
    first_result_s: Figure
    total_s: Figure
    waits_s: tuple[Figure, ...] = Field(default=(), exclude_if=is_empty)


class Latency(Part):
    """All times that the cost model needs.

    source               `measured` on the machine `machine`, or `described` by the hardware file that `machine` names
    main_vcpus           vCPUs of the main function for which the non-expert times hold
    nonexpert_prefill    all non-expert modules for n prompt tokens: the sum over layers of tau_f_l
    nonexpert_decode_s   all non-expert modules for one generated token: the sum over layers of t_f_l
    nonexpert_layers     the measured times by layer; None for a description
    local_expert         one expert in the main function, on its CPUs: tau_c_l(w, n)
    gpu_expert           one expert alone on the main function's GPU, whatever its vCPUs are: tau_g_l(n). None where there is no GPU
    remote_expert        one expert by the arithmetic of the expert function: tau_c_l(y, n)
    packed_expert        the same for an expert that is computed from its stored bytes, where functions may also dequantise it; else None
    unquantised_expert   the same for experts as the checkpoint stores them, where `remote_expert` is for quantised ones; else None
    slower_in_passes     how many times as long an expert of the main process takes in a forward pass as alone in a loop: with one token,
                         and with a prompt's. The points of `local_expert` are times in passes. None where this was not measured
    assistant            what an assistant takes where everything but the experts is; None where there is none
    copy_s               hidden states of n tokens from one device to the other: tau_sw(n). Each layer pays it twice; 0 without a GPU
    invocation           calls of a running deployment, if there was one
    load_s               reading the model from disk

    Source: method.md, section 2, for the symbols.
    """

    source: Literal["measured", "described"]
    machine: str
    measured_on: str
    main_vcpus: Positive
    nonexpert_prefill: Linear
    nonexpert_decode_s: NonNegative
    nonexpert_layers: LayerTimes | None
    local_expert: Timing
    remote_expert: Timing
    packed_expert: Timing | None = Field(default=None, exclude_if=is_none)
    unquantised_expert: Timing | None = Field(default=None, exclude_if=is_none)
    gpu_expert: Timing | None = Field(default=None, exclude_if=is_none)
    slower_in_passes: tuple[Positive, Positive] | None = Field(default=None, exclude_if=is_none)
    assistant: AssistantTimes | None = Field(default=None, exclude_if=is_none)
    copy_s: Linear
    invocation: InvocationTiming | None = None
    cold_start: ColdStart | None = None
    load_s: NonNegative

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences that a user should read before relying on these times."""
        sentences = []
        timings = (("the main function", self.local_expert), ("an expert function", self.remote_expert), ("the GPU", self.gpu_expert))
        for name, timing in timings:
            if timing is not None and timing.held_out_error is not None and timing.held_out_error > WARN_ABOVE:
                sentences.append(
                    f"The fitted time of an expert in {name} is wrong by {timing.held_out_error:.0%} (median error at points that were not "
                    f"used for fitting; form '{timing.curve.form}'). Profile on a quiet machine."
                )
        spread = self.nonexpert_layers.spread if self.nonexpert_layers else 1.0
        if spread > WARN_SPREAD:
            sentences.append(
                f"The median forward pass took up to {spread:.1f} times as long as the fastest, because other programs used the cores. "
                f"Profile on a quiet machine."
            )
        points = self.remote_expert.points
        if points and all(point.vcpus >= 1 for point in points):
            sentences.append("No CPU quota can be set on this machine. The function was timed on one vCPU; times at less are computed.")
        return tuple(sentences)

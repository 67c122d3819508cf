"""The main function: its speed, memory and price. Pure functions that know nothing of remote experts.

- Experts on its CPUs take their fitted time at the spec's vCPUs, but at no more than the profile's machine had. Non-expert modules on CPUs
  scale with the vCPUs likewise; on a GPU they take what was measured or described, whatever the vCPUs.
- Experts may be on the GPU of an instance that has one, if the time of an expert on it is known. GPU memory that is bought by the GB-second
  holds none: its size would be a further choice. Both devices compute their experts at the same time.
- Prices are those of prices.py. A spec paid by use costs time and a fee. A rented instance costs its hours: all of them where the traffic
  is known, whether they are used or not; else those of the request alone.
- A share of requests is cold: a main function paid by use then starts, and reads what it holds, before it answers, and is billed for it. A
  rented instance is always on, unless it scales to zero: then a share of the requests wakes it, and it costs the time that it is up.
- Several requests at once (`Problem.concurrency`) share its time, and have each their own KV cache. Its decode steps have a row of each.
- With drafts (`Problem.drafting`) a request has further rows in a decode step, and an answer has fewer steps than tokens. An assistant
  that makes them is held beside the model, reads each prompt after it, and drafts before each step (assistant.py).

Source: method.md, sections 3, 4, 11 and 12.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from remoe_cli.plan.arrays import Floats
from remoe_cli.plan.catalog.catalog import ScaleToZero
from remoe_cli.plan.cost import assistant, prices
from remoe_cli.plan.cost.prices import MainPrices
from remoe_cli.plan.document import MainSpec
from remoe_cli.plan.problem.problem import MB, Main, Problem
from remoe_cli.profile.latency_record import Roofline


def on_gpu(problem: Problem, spec: MainSpec) -> bool:
    """Tell whether non-expert modules are on a GPU: the instance's own, or one bought by the GB-second."""
    by_use = spec.usd_per_hour is None and problem.catalog.main.usd_per_accelerator_gb_second > 0
    return by_use or spec.gpu_memory_mb is not None


def vcpus(problem: Problem, spec: MainSpec) -> float:
    """Read the vCPUs that compute experts: the spec's, but no more than the profile's machine had."""
    most = problem.latency_of(spec).main_vcpus
    return most if spec.vcpus is None else min(spec.vcpus, most)


def useful_vcpus(problem: Problem, spec: MainSpec) -> float:
    """Count the spec's vCPUs up to the number at which its machine gets no faster."""
    return min(vcpus(problem, spec), _most_useful_vcpus(problem, spec))


def _most_useful_vcpus(problem: Problem, spec: MainSpec) -> float:
    latency = problem.latency_of(spec)
    curve = latency.local_expert.curve
    return min(latency.main_vcpus, curve.saturation_vcpus) if isinstance(curve, Roofline) else latency.main_vcpus


def nonexpert_factor(problem: Problem, spec: MainSpec) -> float:
    """Compute by how much non-expert modules are slower than in the latency record."""
    return 1.0 if on_gpu(problem, spec) else _most_useful_vcpus(problem, spec) / useful_vcpus(problem, spec)


def prefill_rest_s(problem: Problem, spec: MainSpec, n_in: float) -> float:
    """Compute prefill without experts: non-expert modules, and two copies in each layer.

    Source: tau_f and 2 tau_sw in method.md, section 3.
    """
    latency = problem.latency_of(spec)
    copies_s = 2 * len(problem.spec.moe_layers) * float(latency.copy_s.seconds(n_in))
    modules_s = float(latency.nonexpert_prefill.seconds(n_in)) + assistant.prompt_s(problem, latency.assistant, n_in)
    return modules_s * nonexpert_factor(problem, spec) + copies_s


def decode_rest_s(problem: Problem, spec: MainSpec) -> float:
    """Compute one decode step without experts: non-expert modules, and two copies in each layer.

    Each further row takes what a further token takes in prefill.
    """
    latency = problem.latency_of(spec)
    copies_s = 2 * len(problem.spec.moe_layers) * mean_of_steps(problem, lambda rows: float(latency.copy_s.seconds(rows)))
    step_s = latency.nonexpert_decode_s
    if not problem.is_one_token:
        step_s += mean_of_steps(problem, lambda rows: float(latency.nonexpert_prefill.seconds(rows) - latency.nonexpert_prefill.seconds(1)))
    return (step_s + assistant.step_s(problem, latency.assistant)) * nonexpert_factor(problem, spec) + copies_s


def mean_of_steps(problem: Problem, seconds: Callable[[int], float]) -> float:
    """Compute the mean over decode steps of what depends on their rows."""
    if problem.drafting.most_rows == 1:
        return seconds(problem.concurrency)
    each = enumerate(problem.drafting.rows, 1)
    return sum(share * seconds(problem.concurrency * rows) for rows, share in each if share)


def expert_prefill_s(problem: Problem, spec: MainSpec, tokens: Floats) -> Floats:
    """Compute the time of each local expert (tau_c(w, n)) for any array of token counts."""
    seconds: Floats = problem.latency_of(spec).local_expert.seconds(tokens, vcpus(problem, spec))
    return seconds


def expert_step_s(problem: Problem, spec: MainSpec) -> float:
    """Compute the time of one local expert for one token (t_c(w))."""
    return float(problem.latency_of(spec).local_expert.seconds(1, vcpus(problem, spec)))


def expert_steps_s(problem: Problem, spec: MainSpec) -> Floats:
    """Compute the time of one local expert for each number of rows of a decode step, from 0 on.

    Shapes: [step_tokens + 1].
    """
    return expert_prefill_s(problem, spec, np.arange(problem.step_tokens + 1.0))


def gpu_expert_steps_s(problem: Problem, spec: MainSpec) -> Floats:
    """Compute the same for an expert on the GPU; endless where none can be there."""
    return gpu_expert_prefill_s(problem, spec, np.arange(problem.step_tokens + 1.0))


def has_gpu_tier(problem: Problem, spec: MainSpec) -> bool:
    """Tell whether experts may be on this spec's own GPU."""
    return problem.gpu_experts and spec.gpu_memory_mb is not None and problem.latency_of(spec).gpu_expert is not None


def gpu_expert_prefill_s(problem: Problem, spec: MainSpec, tokens: Floats) -> Floats:
    """Compute the time of each expert on the GPU (tau_g(n)) for any array of token counts.

    It is endless where none can be there.
    """
    timing = problem.latency_of(spec).gpu_expert
    if timing is None or not has_gpu_tier(problem, spec):
        return np.full(np.shape(tokens), np.inf)
    seconds: Floats = timing.seconds(tokens, 1)
    return seconds


def gpu_expert_step_s(problem: Problem, spec: MainSpec) -> float:
    """Compute the time of one expert on the GPU for one token (t_g); endless where none can be there."""
    return float(gpu_expert_prefill_s(problem, spec, np.ones(1))[0])


# Memory


def base_bytes(problem: Problem) -> int:
    """Compute M_g: non-expert modules, an assistant, and what all requests at once need beside them.

    These are KV cache and hidden states. Each request may be the one with most tokens.

    Source: method.md, section 4.
    """
    return problem.spec.nonexpert_bytes + problem.request_bytes * problem.concurrency + assistant.held_bytes(problem)


def main_memory_bytes(problem: Problem, spec: MainSpec, cpu_experts: int) -> float:
    """Compute the CPU memory of the main function with `cpu_experts` experts of all layers together in it.

    Beside an instance's own GPU it also holds the buffers through which hidden states come and the outputs of all their slots go back, of
    the longest prompt or a decode step, and while experts are loaded they take more than they do later.

    Source: the limit of main memory in method.md, section 4.
    """
    held = base_bytes(problem)
    if on_gpu(problem, spec):
        held = problem.spec.hidden_state_bytes * problem.workload.most_out * problem.concurrency
    if spec.gpu_memory_mb is not None:
        held += (1 + problem.spec.top_k) * problem.spec.hidden_state_bytes * most_rows(problem)
    return problem.catalog.main.runtime_memory_mb * MB + held + cpu_expert_bytes(problem, spec) * cpu_experts


def most_rows(problem: Problem) -> int:
    """Count the hidden states of the largest pass: the longest prompt, or a decode step."""
    return max(problem.workload.most_in, problem.step_tokens)


def cpu_expert_bytes(problem: Problem, spec: MainSpec) -> float:
    """Compute the CPU memory that one expert takes, at the peak of loading."""
    return problem.spec.expert_bytes * (1.0 if spec.gpu_memory_mb is None else problem.catalog.main.gpu_load_factor)


def local_capacity(problem: Problem, spec: MainSpec) -> int:
    """Count the experts of all layers that fit CPU memory; negative when the rest does not fit."""
    if spec.gpu_memory_mb is not None and base_bytes(problem) > usable_gpu_bytes(problem, spec):
        return -1
    return int((spec.memory_mb * MB - main_memory_bytes(problem, spec, 0)) // cpu_expert_bytes(problem, spec))


def fetch_capacity(problem: Problem, spec: MainSpec) -> float:
    """Count the experts of all layers that fit the /tmp of a spec that scales to zero.

    Those on its GPU count too: all are fetched to /tmp. It is endless for other specs.
    """
    if (zero := _zero(problem, spec)) is None:
        return math.inf
    return (zero.storage_mb * MB - rest_read_bytes(problem)) // problem.spec.read_expert_bytes


def rest_read_bytes(problem: Problem) -> int:
    """Count what a main function that starts reads besides experts."""
    return problem.spec.read_nonexpert_bytes + assistant.weight_bytes(problem)


def _zero(problem: Problem, spec: MainSpec) -> ScaleToZero | None:
    return problem.catalog.zero if spec.scales_to_zero else None


def usable_gpu_bytes(problem: Problem, spec: MainSpec) -> float:
    """Compute the memory of the spec's GPU that weights, KV cache and hidden states can take."""
    return problem.catalog.main.usable_gpu_mb(spec.gpu_memory_mb or 0) * MB


def gpu_capacity(problem: Problem, spec: MainSpec) -> int:
    """Count the experts of all layers that fit the GPU beside the rest; 0 where none can be there."""
    if not has_gpu_tier(problem, spec):
        return 0
    room = (usable_gpu_bytes(problem, spec) - base_bytes(problem) - _gpu_work_bytes(problem)) // problem.spec.expert_bytes
    return max(0, int(min(room, fetch_capacity(problem, spec))))


def _gpu_work_bytes(problem: Problem) -> int:
    """Compute the memory of the GPU that a layer with experts on it takes meanwhile.

    The outputs of all slots of the largest pass are there three times: as they come, in order, and weighted.
    """
    return 3 * most_rows(problem) * problem.spec.top_k * problem.spec.hidden_state_bytes


def most_gpu_experts(problem: Problem) -> int:
    """Count the experts that fit the largest GPU of the menu."""
    return max(gpu_capacity(problem, spec) for spec in problem.menu)


# Money


def always_on(problem: Problem, spec: MainSpec) -> bool:
    """Tell whether this is a rented instance whose idle hours are priced, because the traffic is known."""
    return spec.usd_per_hour is not None and problem.workload.requests_per_hour is not None


def prices_of(problem: Problem, main: Main) -> MainPrices:
    """Read the prices of a main function as it is bought, at the workload's traffic."""
    return prices.main_prices(
        problem.catalog,
        main.spec,
        accelerator_bytes=base_bytes(problem),
        instances=main.instances,
        requests_per_hour=problem.workload.requests_per_hour,
        up_share=waking.up_share if main.spec.scales_to_zero and (waking := problem.workload.waking) else 1.0,
    )


def usd_per_s(problem: Problem, spec: MainSpec) -> float:
    """Price a second of a request: memory by use (c_g M_g + c_c w), or the instance's rent.

    It is 0 where the hours of the instance are paid anyway.

    Source: method.md, section 4.
    """
    return 0.0 if always_on(problem, spec) else prices_of(problem, Main(spec)).usd_per_s


def fixed_usd(problem: Problem, main: Main) -> float:
    """Price what a request costs in the main function however long it takes.

    Reads of S3 in its share of cold starts are in it.
    """
    found = prices_of(problem, main)
    reads = cold_share(problem, main.spec) * prices.main_reads(problem.catalog, main.spec)
    return found.usd_per_request + reads * found.usd_per_read + (found.share_usd or 0.0)


def longest_mean_s(problem: Problem, main: Main) -> float:
    """Compute how long a mean request may keep a main function busy (`busy_s`).

    It is the time that always-on instances have for it.
    """
    per_hour = problem.workload.requests_per_hour
    return math.inf if main.spec.usd_per_hour is None or per_hour is None else 3600 * main.instances / per_hour


def longest_request_s(problem: Problem, spec: MainSpec) -> float:
    """Look up how long any request may take: after that the platform ends it."""
    side = problem.catalog.main
    if (zero := _zero(problem, spec)) is not None:
        return zero.timeout_s + zero.wake_s  # the request is not given to the function before
    if spec.usd_per_hour is None:
        return side.timeout_s
    return math.inf if side.rented_timeout_s is None else side.rented_timeout_s


# Several requests at once


def first_token_s(problem: Problem, warm_s: float, step_s: float) -> float:
    """Compute the mean TTFT of a warm request: a decode step of all goes before its prompt.

    Source: method.md, section 11.
    """
    return warm_s + (step_s if problem.concurrency > 1 else 0.0)


def next_token_s(problem: Problem, warm_s: float, step_s: float) -> float:
    """Compute the mean TPOT: the decode steps of all for a token, and a part of the prompts of the others.

    These are computed between steps. Each of the others begins anew while a request lasts. `warm_s` is the mean prefill.
    """
    others = problem.concurrency - 1
    return problem.drafting.passes * step_s + (others * warm_s / max(problem.workload.n_out, 1.0) if others else 0.0)


def busy_s(problem: Problem, ttft_s: float, tpot_s: float, cold_s: float) -> float:
    """Compute the main function's time for a mean request: all that are served at once share it.

    `cold_s`, what cold starts add to the mean TTFT, is not shared.
    """
    if problem.concurrency == 1:
        return ttft_s + problem.workload.n_out * tpot_s
    return (ttft_s - cold_s + problem.workload.n_out * tpot_s) / problem.concurrency + cold_s


# Cold starts


def is_ever_cold(problem: Problem, spec: MainSpec) -> bool:
    """Tell whether a request may find all cold.

    The first one to a main function that starts always does; one to an instance that is always on does if the plan has cold requests.
    """
    return spec.starts or problem.workload.cold_share > 0


def cold_share(problem: Problem, spec: MainSpec) -> float:
    """Look up the share of requests for which the main function itself has to start."""
    if not spec.scales_to_zero:
        return problem.workload.cold_share if spec.starts else 0.0
    return problem.workload.waking.wake_share if problem.workload.waking else 0.0


def late_functions(problem: Problem, spec: MainSpec) -> float:
    """Compute the part of the workload's cold requests that wait for expert functions only.

    They find the main function up. Where that starts too, expert functions start meanwhile.
    """
    if spec.usd_per_hour is None:
        return 0.0
    cold = problem.workload.cold_share
    return max(0.0, 1 - cold_share(problem, spec) / cold) if cold > 0 else 0.0


def load_bytes_per_s(problem: Problem, spec: MainSpec) -> float:
    """Look up the rate at which a main function that starts reads what it holds."""
    zero = _zero(problem, spec)
    return problem.catalog.main.load_bytes_per_s if zero is None else zero.load_bytes_per_s


def start_s(problem: Problem, spec: MainSpec, local_experts: int) -> float:
    """Compute how long a main function takes to start and to read what it holds.

    That includes the experts on its GPU. One that is always on has done so before any request.
    """
    if not spec.starts:
        return 0.0
    zero, model = _zero(problem, spec), problem.spec
    begin_s = problem.catalog.main.cold_start_s if zero is None else zero.wake_s
    read_bytes = rest_read_bytes(problem) + local_experts * model.read_expert_bytes
    return begin_s + read_bytes / load_bytes_per_s(problem, spec)


def cold_rest_s(problem: Problem, spec: MainSpec) -> float:
    """Compute what cold starts add to the mean TTFT, without reading local experts (T_cold)."""
    return cold_share(problem, spec) * start_s(problem, spec, 0)


def cold_expert_s(problem: Problem, spec: MainSpec) -> float:
    """Compute what reading one local expert in cold starts adds to the mean TTFT."""
    return cold_share(problem, spec) * problem.spec.read_expert_bytes / load_bytes_per_s(problem, spec)

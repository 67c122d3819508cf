"""What an assistant takes of the main function: memory, and time of prompts and decode steps. Pure.

It is where the main function's non-expert modules are, and its times are those of the same machine. Every request has a cache of its own
in it, and is drafted for by itself. All of it is nothing where the problem's drafts are not the assistant's.

Source: method.md, section 12.
"""

from __future__ import annotations

from remoe_cli.plan.problem.problem import Problem
from remoe_cli.profile.hardware import Hardware, assistant_times
from remoe_cli.profile.latency_record import AssistantTimes


def weight_bytes(problem: Problem) -> int:
    """Return the bytes of its weights, which a main function that starts reads."""
    return 0 if (assistant := problem.loaded_assistant) is None else assistant.bytes


def held_bytes(problem: Problem) -> int:
    """Compute its weights, and its KV cache of all requests at once.

    Each of them may be the one with most tokens.
    """
    if (assistant := problem.loaded_assistant) is None:
        return 0
    return assistant.bytes + assistant.kv_cache_bytes(problem.workload.most_tokens.tokens) * problem.concurrency


def prompt_s(problem: Problem, times: AssistantTimes | None, n_in: float) -> float:
    """Compute how long it reads a prompt."""
    return float(times.prefill.seconds(n_in)) if times is not None and problem.loaded_assistant is not None else 0.0


def step_s(problem: Problem, times: AssistantTimes | None) -> float:
    """Compute how long it drafts for a decode step of all requests."""
    if times is None or problem.loaded_assistant is None:
        return 0.0
    return problem.concurrency * times.step_s(problem.drafting.drafted, problem.drafting.caught_up)


def times_on(problem: Problem, hardware: Hardware, vcpus: float | None, slow: float = 1.0) -> AssistantTimes | None:
    """Look up its times on a described machine, on so many vCPUs or on the GPU (None)."""
    if (assistant := problem.loaded_assistant) is None:
        return None
    return assistant_times(hardware, assistant, vcpus).slower(slow)

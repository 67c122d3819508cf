"""For the verifier: what the plan's assistant takes of the main function, if it has one.

It drafts for each request by itself, before each decode step, and reads each prompt after the model. method.md, section 12.
"""

from __future__ import annotations

from remoe_cli.plan.verify.inputs import VerifierInputs
from remoe_cli.profile.hardware import Hardware, assistant_times
from remoe_cli.profile.latency_record import AssistantTimes


def weight_bytes(inputs: VerifierInputs) -> int:
    """Return the bytes of its weights."""
    drafting = inputs.profile.record.assistant
    return drafting.spec.bytes if inputs.plan.assistant is not None and drafting is not None else 0


def cache_bytes(inputs: VerifierInputs, tokens: int) -> int:
    """Compute its KV cache of one request."""
    drafting = inputs.profile.record.assistant
    if inputs.plan.assistant is None or drafting is None:
        return 0
    layers = drafting.spec.kv_layers
    held = sum(layer.bytes_per_token * (tokens if layer.window is None else min(tokens, layer.window)) for layer in layers)
    return held + sum(int(layer.compressed_bytes_per_token * tokens) for layer in layers)


def prompt_s(inputs: VerifierInputs, times: AssistantTimes | None, n_in: float) -> float:
    """Compute how long it reads a prompt."""
    return 0.0 if times is None or inputs.plan.assistant is None else float(times.prefill.seconds(n_in))


def step_s(inputs: VerifierInputs, times: AssistantTimes | None, served: int) -> float:
    """Compute how long it drafts for a decode step of so many requests."""
    if times is None or inputs.plan.assistant is None:
        return 0.0
    drafted, caught_up = inputs.assisted
    return served * (times.decode_s * drafted + times.prefill.per_token_s * caught_up)


def times_on(inputs: VerifierInputs, hardware: Hardware, vcpus: float | None, slower: float = 1.0) -> AssistantTimes | None:
    """Compute its times on a described machine, on so many vCPUs or on the GPU (None)."""
    drafting = inputs.profile.record.assistant
    return None if drafting is None else assistant_times(hardware, drafting.spec, vcpus).slower(slower)

"""A model, from its config.json alone: whether remoe can profile, plan and serve it, and why not."""

from __future__ import annotations

from collections.abc import Iterator

from remoe_cli.doctor.finding import Finding, tried
from remoe_cli.errors import ModelError
from remoe_cli.model.checkpoint import Checkpoint, find_settings
from remoe_cli.model.spec import ONE_AT_A_TIME, MoeSpec, read_spec
from remoe_cli.units import size

_KV_CACHE_TOKENS = 4096  # of which the size is told, if the model has as many positions


def findings(model: str) -> Iterator[Finding]:
    """Look at the model of a folder or a hub id; of the hub, only settings are fetched.

    Raises: UsageError when there is no such model.
    """
    checkpoint = find_settings(model)
    try:
        spec = read_spec(checkpoint)
    except ModelError as error:
        yield Finding(name="experts", ok=False, value=error.message, hint=error.hint)
        return
    yield _experts(spec)
    yield Finding(name="sizes", ok=True, value=_sizes(spec))
    is_served = spec.stored is None or spec.stored.served
    yield Finding(
        name="stored form",
        ok=is_served,
        value=spec.stored_as or f"{spec.dtype}, as it is computed with",
        hint="" if is_served else "It can be planned; to serve it, save a dequantised copy.",
    )
    yield _quantising(checkpoint, spec)
    one = spec.family in ONE_AT_A_TIME
    yield Finding(
        name="requests at once", ok=True, value="one: they cannot share the model's cache" if one else "several share a main function"
    )
    yield _weights(checkpoint, spec)
    yield tried("chat template", lambda: _template(checkpoint))


def _experts(spec: MoeSpec) -> Finding:
    layers = f"{len(spec.moe_layers)} of {spec.hidden_layers} layers"
    return Finding(name="experts", ok=True, value=f"{spec.family}: {spec.experts_per_layer} in each of {layers}, top-{spec.top_k}")


def _sizes(spec: MoeSpec) -> str:
    tokens = min(_KV_CACHE_TOKENS, spec.context_tokens or _KV_CACHE_TOKENS)
    experts, rest, kv_cache = map(size, (spec.routed_bytes, spec.nonexpert_bytes, spec.kv_cache_bytes(tokens)))
    return f"experts {experts}, all else {rest}, KV cache of {tokens:,} tokens {kv_cache}"


def _quantising(checkpoint: Checkpoint, spec: MoeSpec) -> Finding:
    """Say whether experts of functions can be quantised on request; nothing is wrong where they cannot."""
    if spec.stored is not None:
        return Finding(name="quantising", ok=True, value=f"not on request: the checkpoint is quantised already ({spec.stored.format})")
    try:
        each = read_spec(checkpoint, "int4").fetched_expert_bytes
    except ModelError as error:
        return Finding(name="quantising", ok=True, value=f"not on request: {error.message}")
    value = f"experts of functions can be in INT8 or INT4, which takes {size(each)} an expert, not {size(spec.expert_bytes)}"
    return Finding(name="quantising", ok=True, value=value, hint="'remoe profile --experts int4' measures what the model loses by it.")


def _weights(checkpoint: Checkpoint, spec: MoeSpec) -> Finding:
    if checkpoint.known is not None:
        return Finding(name="weights", ok=True, value=f"on the hub, {size(spec.stored_bytes)}", hint="'remoe profile' downloads them.")

    def count() -> Finding:
        held, files = sum(file.stat().st_size for file in checkpoint.weight_files), len(checkpoint.weight_files)
        return Finding(name="weights", ok=True, value=f"{size(held)} in {files} file{'' if files == 1 else 's'}")

    return tried("weights", count)


def _template(checkpoint: Checkpoint) -> Finding:
    from remoe_cli.model.tokens import has_chat_template, load_tokenizer

    found = has_chat_template(load_tokenizer(checkpoint))
    return Finding(name="chat template", ok=True, value="there is one" if found else "none: prompts are used as they stand")

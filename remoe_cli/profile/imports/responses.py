"""Responses of inference servers with the experts of every token, one JSON object a line.

    vLLM     (--enable-return-routed-experts) choices[0].routed_experts: base64 of a .npy, [tokens - 1, layers, k], prompt tokens first;
             in older versions nested lists of the generated tokens only, beside prompt_routed_experts
    SGLang   (return_routed_experts) meta_info.routed_experts, or sglext.routed_experts of its OpenAI API: base64 of raw int32
             [tokens - 1, hidden layers, k], without its shape
    others   the same fields at the top of the object, as a script writes vLLM's RequestOutput

How many tokens are the prompt's is read from usage.prompt_tokens, meta_info.prompt_tokens, prompt_tokens or prompt_token_ids. The last
generated token is not fed back to the model, so it has no experts.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from remoe_cli.model.checkpoint import reason
from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.imports.arrays import read_npy_stream
from remoe_cli.profile.imports.checks import Array, TracedRouting, refuse, whole

_NPY = b"\x93NUMPY"


def is_responses(start: bytes, file: Path) -> bool:
    """Tell whether a file begins like a JSON object."""
    return start.lstrip()[:1] == b"{"


def read_responses(file: Path, spec: MoeSpec, model: str) -> TracedRouting:
    """Read one response a line: the expert ids of its tokens, and how many of them are its prompt.

    Raises: UsageError for a line that is no response with experts, with its number.
    """
    sequences: list[Array] = []
    prompt_tokens: list[int] = []
    for where, row in _objects(file):
        ids, prompt = _sequence(where, row, spec)
        if sequences and ids.shape[1:] != sequences[0].shape[1:]:
            raise refuse(where, f"its experts have shape {ids.shape}, unlike those before ({sequences[0].shape})")
        sequences.append(whole(ids, f"{where}: routed_experts", -1).astype(np.int32))
        prompt_tokens.append(prompt)
    if not sequences:
        raise refuse(file, "it holds no responses")
    offsets = np.cumsum([0, *(len(ids) for ids in sequences)])
    return TracedRouting("server responses", np.concatenate(sequences), offsets, np.array(prompt_tokens))


def _objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}, row {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise refuse(where, f"not JSON ({reason(error)})", "Give a file with one JSON object a line.") from None
            if not isinstance(row, dict):
                raise refuse(where, f"a JSON {type(row).__name__}, not an object", "Give a file with one JSON object a line.")
            yield where, row


def _sequence(where: str, row: dict[str, Any], spec: MoeSpec) -> tuple[Array, int]:
    """Get the ids [tokens, layers, k] of one response, and how many of the tokens are its prompt."""
    choices = row.get("choices", row.get("outputs"))
    if isinstance(choices, list) and len(choices) > 1:
        raise refuse(where, f"it has {len(choices)} answers to one prompt", "Give one answer a row.")
    inner = [choices[0]] if isinstance(choices, list) and choices else []
    objects = [x for x in (*inner, row.get("meta_info"), row.get("sglext"), row.get("usage"), row) if isinstance(x, dict)]
    experts = _first(objects, "routed_experts")
    if experts is None:
        raise refuse(where, "it has no routed_experts", "Start the server with --enable-return-routed-experts.")
    ids, before = _ids(where, experts, spec), _first(objects, "prompt_routed_experts")
    prompt = _prompt_tokens(where, objects)
    if before is not None:
        start = _ids(where, before, spec)
        if start.shape[1:] != ids.shape[1:]:
            raise refuse(where, f"experts of prompt and answer have shapes {start.shape} and {ids.shape}")
        return np.concatenate([start, ids]), len(start)
    if prompt is None:
        raise refuse(where, "it does not say how many tokens its prompt has", "Keep usage.prompt_tokens or prompt_token_ids.")
    generated = _first(objects, "completion_tokens")
    if prompt > len(ids) or (type(generated) is int and len(ids) not in (prompt + generated - 1, prompt + generated)):
        raise refuse(where, f"it has experts of {len(ids)} tokens for {prompt} prompt tokens and {generated or 'some'} generated ones")
    return ids, prompt


def _first(objects: list[dict[str, Any]], name: str) -> Any:
    return next((x[name] for x in objects if x.get(name) is not None), None)


def _prompt_tokens(where: str, objects: list[dict[str, Any]]) -> int | None:
    stated, ids = _first(objects, "prompt_tokens"), _first(objects, "prompt_token_ids")
    if stated is None and isinstance(ids, list):
        return len(ids)
    if stated is not None and (type(stated) is not int or not 0 <= stated < 2**31):
        raise refuse(where, f"its prompt_tokens are {str(stated)[:40]!r}, not a number of tokens")
    return stated


def _ids(where: str, experts: Any, spec: MoeSpec) -> Array:
    """Decode nested lists, base64 of a .npy, or base64 of int32 for all hidden layers."""
    try:
        if isinstance(experts, str):
            data = base64.b64decode(experts, validate=True)
            if not data.startswith(_NPY):
                return np.frombuffer(data, dtype="<i4").reshape(-1, spec.hidden_layers, spec.top_k)
            ids = read_npy_stream(io.BytesIO(data), len(data))
        else:
            ids = np.array(experts)
    except Exception as error:  # numpy's reader of headers fails in ways of its own
        raise refuse(where, f"its routed_experts cannot be read ({reason(error)})") from None
    if ids.ndim != 3:
        raise refuse(where, f"its routed_experts have shape {ids.shape}, and [tokens, layers, top-k] is needed")
    return ids

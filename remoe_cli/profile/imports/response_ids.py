"""The expert ids of one answer: how servers write them, and which tokens they belong to.

An answer of g tokens to a prompt of p tokens has ids of p + g - 1 tokens: the last token is not fed back to the model. There are fewer
where the request asked for no answer (SGLang then leaves out the prompt's last token), or for ids from a later token on.

Source: vllm-project/vllm, vllm/entrypoints/openai/completion/protocol.py (base64 of a .npy); docs.vllm.ai/en/v0.21.0/training/
routed_experts_replay (nested lists, prompt and answer apart); sgl-project/sglang, python/sglang/srt/managers/tokenizer_manager.py
(base64 of int32), issue 20964 (the last token of a prompt without an answer) and pull request 24851 (routed_experts_start_len);
ai-dynamo/dynamo, components/src/dynamo/vllm/handlers.py (an object of data, shape, dtype and start).
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from remoe_cli.model.checkpoint import reason
from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.imports.arrays import read_npy_stream
from remoe_cli.profile.imports.checks import Array, refuse, whole

_NPY = b"\x93NUMPY"


@dataclass(frozen=True)
class AnswerIds:
    """The ids of one answer and its prompt.

    ids             [tokens, layers, k]
    missing         how many tokens before the ids, and after them, have none
    prompt_tokens   how many of all these tokens are the prompt's
    """

    ids: Array
    missing: tuple[int, int]
    prompt_tokens: int

    @property
    def tokens(self) -> int:
        return sum(self.missing) + len(self.ids)

    def padded(self) -> Array:
        """Return the ids of all tokens, with -1 for those that have none."""
        return np.pad(self.ids, (self.missing, (0, 0), (0, 0)), constant_values=-1) if any(self.missing) else self.ids


def decode_ids(where: str, experts: Any, spec: MoeSpec) -> Array:
    """Decode the ids of a response.

    They are nested lists, base64 of a .npy, base64 of int32 for all hidden layers, or an object that states its shape. No ids at all give
    an array without tokens.

    Raises: UsageError for anything else.
    """
    try:
        ids = _decoded(experts, spec)
    except Exception as error:  # numpy's reader of headers fails in ways of its own
        raise refuse(where, f"its routed_experts cannot be read ({reason(error)})") from None
    if ids.size and ids.ndim != 3:
        raise refuse(where, f"its routed_experts have shape {ids.shape}, and [tokens, layers, top-k] is needed")
    ids = whole(ids.reshape(ids.shape if ids.ndim == 3 else (0, 0, 0)), f"{where}: routed_experts", -1)
    return ids.astype(np.int16 if not ids.size or ids.max() < 2**15 else np.int32)


def _decoded(experts: Any, spec: MoeSpec) -> Array:
    if isinstance(experts, dict):
        data, dtype = base64.b64decode(experts["data"], validate=True), np.dtype(str(experts.get("dtype", "int32")))
        shape = tuple(int(axis) for axis in experts["shape"])
        if dtype.kind not in "iu" or any(axis < 0 for axis in shape) or math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"{len(data)} bytes of data are no array {shape} of {dtype}")
        return np.frombuffer(data, dtype=dtype).reshape(shape)
    if not isinstance(experts, str):
        return np.array(experts)
    data = base64.b64decode(experts, validate=True)
    if data.startswith(_NPY):
        return read_npy_stream(io.BytesIO(data), len(data))
    return np.frombuffer(data, dtype="<i4").reshape(-1, spec.hidden_layers, spec.top_k)


def align(where: str, ids: Array, start: int, prompt: int | None, generated: int | None) -> AnswerIds:
    """Say which tokens ids of prompt and answer together belong to.

    `start` is the first token that has ids; `prompt` and `generated` are the numbers of tokens, of which one may not be stated.

    Raises: UsageError when the numbers do not fit each other.
    """
    end = start + len(ids)
    prompt = end - max((generated or 0) - 1, 0) if prompt is None else prompt
    no_answer = not generated and end == prompt - 1
    fits = end >= prompt if generated is None else end in (prompt + generated - 1, prompt + generated)
    if prompt < 0 or not (fits or no_answer):
        stated = "some" if generated is None else generated
        what = f"it has experts of {len(ids)} tokens for {prompt} prompt tokens and {stated} generated ones"
        raise refuse(where, what, "Check that the response is whole, and that it answers a single prompt.")
    return AnswerIds(ids, (start, int(no_answer)), prompt)


def align_parts(where: str, before: Array, ids: Array, generated: int | None) -> AnswerIds:
    """Say which tokens the ids of two parts belong to.

    The parts are the ids of the prompt, `before`, and those of the answer.

    Raises: UsageError when the parts fit neither each other nor the number of generated tokens.
    """
    if len(before) and len(ids) and before.shape[1:] != ids.shape[1:]:
        raise refuse(where, f"experts of prompt and answer have shapes {before.shape} and {ids.shape}")
    if generated is not None and len(ids) and len(ids) not in (generated - 1, generated):
        if len(ids) == len(before) + generated - 1:  # the answer's ids have those of the prompt too
            return AnswerIds(ids, (0, 0), len(before))
        raise refuse(where, f"it has experts of {len(ids)} generated tokens, and its answer has {generated}")
    both = np.concatenate([before, ids]) if len(before) and len(ids) else before if len(before) else ids
    unrecorded = max(generated - 1, 0) if generated and not len(ids) else 0
    return AnswerIds(both, (0, unrecorded), len(before))

"""Responses of inference servers with the experts of every token.

A file has one response a line, an array of them, or a single one (json_rows.py). A response stands alone, or inside a line of a batch
file or of a log: {"response": {"status_code": 200, "body": {...}}, "error": null}. The ids are in routed_experts (response_ids.py):

    vLLM     (--enable-return-routed-experts) of each answer in choices, or in outputs of its RequestOutput; up to version 0.21 those of
             the prompt are apart, in prompt_routed_experts of the response
    SGLang   (return_routed_experts) in meta_info; in its OpenAI API in sglext of the response or of each answer
    others   in the answer's message, or in nvext.engine_data

How many tokens are the prompt's is read from prompt_tokens of usage or meta_info, or from prompt_token_ids; how many were generated from
completion_tokens, or from the answer's token ids. Each answer is a row: of several answers to one prompt each has the prompt's routing.

Requests that failed and answers without routing are left out, and counted in a remark. An answer has none, for example, when its request
was aborted before the first forward pass; its ids are then null, or zeros for every token.

Source: vllm-project/vllm, vllm/entrypoints/openai/run_batch.py and completion/protocol.py; sgl-project/sglang, python/sglang/srt/
managers/tokenizer_manager.py and entrypoints/openai/protocol.py (SglExt); ai-dynamo/dynamo, components/src/dynamo/vllm/handlers.py;
platform.openai.com/docs/api-reference/batch/request-output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remoe_cli.errors import UsageError
from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.imports.checks import Array, TracedRouting, listed, refuse
from remoe_cli.profile.imports.json_rows import json_rows
from remoe_cli.profile.imports.response_ids import AnswerIds, align, align_parts, decode_ids

Object = dict[str, Any]
_MOST_IDS = 2**29  # of a file; they take 1 GiB
_MOST_TOKENS = 2**31  # that a field may state
_INSIDE = ("message", "meta_info", "sglext", "sgl_ext", "nvext", "engine_data", "usage")  # objects in which servers put the fields
_ANSWERS = ("choices", "outputs")
_TOKEN_IDS = ("token_ids", "output_ids", "output_token_ids", "completion_token_ids")
_STARTS = ("routed_experts_start_len", "routed_experts_prompt_start")
# An object with any of these is a response, which may lack routing.
_OF_A_RESPONSE = frozenset((*_ANSWERS, *_INSIDE, *_TOKEN_IDS, "text", "response", "status_code", "error"))
_START = re.compile(rb"\s*(\{|\[\s*[\[{\]]|\[\s*$)")
_SUCCESS = re.compile(r"2\d\d")
_HINT = "Start vLLM with --enable-return-routed-experts, or send return_routed_experts with each request to SGLang."


def is_responses(start: bytes, file: Path) -> bool:
    """Tell whether a file begins like a JSON object, or like an array of them."""
    return _START.match(start) is not None


def read_responses(file: Path, spec: MoeSpec, model: str) -> TracedRouting:
    """Read the expert ids of all answers, and how many of their tokens are the prompt's.

    Raises: UsageError for what is no response, with its place, for ids that do not fit their response, and when no response has ids.
    """
    sequences: list[Array] = []
    prompt_tokens: list[int] = []
    requests: list[int] = []
    failed, unrecorded = _LeftOut(), _LeftOut()
    read = several = ids_read = 0
    for where, value in json_rows(file):
        path = _unwrapped(where, value)
        read += 1
        if any(map(_is_failed, path)):
            failed.add(where, value)
            continue
        answers = _answers(where, path, spec)
        several += len(answers) > 1
        for place, answer in answers:
            if answer is None:
                unrecorded.add(place, path[-1])
                continue
            if sequences and answer.ids.shape[1:] != sequences[0].shape[1:]:
                raise refuse(place, f"its experts have shape {answer.ids.shape}, unlike those before ({sequences[0].shape})")
            ids_read += answer.tokens * max(1, answer.ids[0].size)
            if ids_read > _MOST_IDS:
                raise refuse(place, f"with it the file has more than {_MOST_IDS:,} ids, which is the most", "Import fewer responses.")
            sequences.append(answer.padded())
            prompt_tokens.append(answer.prompt_tokens)
            requests.append(read - 1)
    if not sequences:
        raise _without_routing(file, failed, unrecorded)
    remarks = (
        *failed.remark(f"{read:,} requests (failed)"),
        *unrecorded.remark(f"{len(sequences) + unrecorded.count:,} answers (routed_experts is null, missing or zeros)"),
        *([f"{file}: {several:,} responses have several answers: each answer is a row with the prompt's routing."] if several else []),
    )
    offsets = np.cumsum([0, *(len(ids) for ids in sequences)])
    ids = np.concatenate(sequences)
    return TracedRouting("server responses", ids, offsets, np.array(prompt_tokens), remarks=remarks, requests=np.array(requests), read=read)


@dataclass
class _LeftOut:
    """What is left out: how many, the place of the first, and its fields."""

    count: int = 0
    first: str = ""
    fields: tuple[str, ...] = ()

    def add(self, where: str, response: object) -> None:
        if not self.count:
            self.first, self.fields = where, tuple(response) if isinstance(response, dict) else ()
        self.count += 1

    def remark(self, what: str) -> tuple[str, ...]:
        return (f"Left out: {self.count:,} of {what}; the first is {self.first}.",) if self.count else ()


def _without_routing(file: Path, failed: _LeftOut, unrecorded: _LeftOut) -> UsageError:
    if unrecorded.count:
        fields = listed(unrecorded.fields)
        what = f"it has no routed_experts but null or zeros, nor has any other response of the file (it has {fields})"
        return refuse(unrecorded.first, what, _HINT)
    if failed.count:
        what = f"its request failed, and so did all others of the file (it has {listed(failed.fields)})"
        return refuse(failed.first, what, "Give responses of requests that succeeded.")
    return refuse(file, "it holds no responses", _HINT)


def _unwrapped(where: str, value: object) -> list[Object]:
    """Return the objects that lie inside each other in a line of a batch file; the last is the response.

    Raises: UsageError for what is no response.
    """
    if not isinstance(value, dict):
        raise refuse(where, f"a JSON {type(value).__name__}, not an object", "Give one response a line, or a JSON array of responses.")
    path: list[Object] = [value]
    while inner := next((path[-1][name] for name in ("response", "body") if isinstance(path[-1].get(name), dict)), None):
        path.append(inner)
    if not any(_OF_A_RESPONSE.intersection(each) or _first(_objects(each), "routed_experts", "prompt_routed_experts") for each in path):
        raise refuse(where, f"it has no routed_experts, and is no response (it has {listed(value)})", _HINT)
    return path


def _is_failed(part: Object) -> bool:
    status = part.get("status_code")
    return bool(part.get("error")) or part.get("object") == "error" or (status is not None and not _SUCCESS.fullmatch(str(status)))


def _answers(where: str, path: list[Object], spec: MoeSpec) -> list[tuple[str, AnswerIds | None]]:
    """Return the ids of each answer with its place; None for an answer without routing.

    Raises: UsageError when ids, answers and stated numbers of tokens do not fit each other.
    """
    shared = [part for each in reversed(path) for part in _objects(each)]
    found: list[Any] = next((path[-1][name] for name in _ANSWERS if isinstance(path[-1].get(name), list)), [])
    if len(found) < 2:
        own = list(_objects(found[0])) if found else []
        return [(where, _answer(where, [*own, *shared], [*own, *shared], _generated([*own, *shared]), spec))]
    answers = []
    for number, choice in enumerate(found):
        own, place = list(_objects(choice)), f"{where}, answer {number + 1}"
        # Ids of the response itself are those of its first answer.
        holders = own if number or _first(own, "routed_experts") is not None else [*own, *shared]
        answers.append((place, _answer(place, holders, [*own, *shared], _generated(own), spec)))
    generated, made = _generated(shared), [answer.tokens - answer.prompt_tokens for _, answer in answers if answer]
    if generated is not None and len(made) == len(found) and generated not in (sum(made), sum(made) + len(made)):
        what = f"its {len(made)} answers have experts of {sum(made)} tokens after the prompt, and it states {generated} generated ones"
        raise refuse(where, what, "Check that the response is whole, and that it answers a single prompt.")
    return answers


def _answer(where: str, holders: list[Object], parts: list[Object], generated: int | None, spec: MoeSpec) -> AnswerIds | None:
    """Get the ids of one answer: its own from `holders`, all that is said of it from `parts`."""
    experts, before = _first(holders, "routed_experts"), _first(parts, "prompt_routed_experts")
    ids = decode_ids(where, experts or [], spec)
    if before is not None:
        found = align_parts(where, decode_ids(where, before, spec), ids, generated)
    elif not len(ids):
        return None
    else:
        start = _number(where, _STARTS[0], experts.get("start") if isinstance(experts, dict) else _first(parts, *_STARTS))
        prompt = _prompt_tokens(where, parts)
        if prompt is None and generated is None:
            fields = dict.fromkeys(name for part in parts for name in part)
            what = f"it does not say how many tokens its prompt has (it has {listed(fields)})"
            raise refuse(where, what, "Keep usage.prompt_tokens, meta_info.prompt_tokens or prompt_token_ids of the responses.")
        found = align(where, ids, start or 0, prompt, generated)
    if not len(found.ids) or (found.ids < 0).all() or (spec.top_k > 1 and not found.ids.any()):
        return None
    return found


def _objects(value: object, depth: int = 3) -> Iterator[Object]:
    """Yield an object, and those inside it that may have the fields."""
    if isinstance(value, dict) and depth:
        yield value
        for name in _INSIDE:
            yield from _objects(value.get(name), depth - 1)


def _first(parts: list[Object] | Iterator[Object], *names: str) -> Any:
    """Get the first field of one of the names that is not null."""
    return next((part[name] for part in parts for name in names if part.get(name) is not None), None)


def _generated(parts: list[Object]) -> int | None:
    stated = _first(parts, "completion_tokens", *_TOKEN_IDS)
    if isinstance(stated, list):
        return len(stated)
    return stated if type(stated) is int and 0 <= stated < _MOST_TOKENS else None


def _prompt_tokens(where: str, parts: list[Object]) -> int | None:
    stated = _first(parts, "prompt_tokens", "prompt_token_ids")
    return len(stated) if isinstance(stated, list) else _number(where, "prompt_tokens", stated)


def _number(where: str, name: str, stated: object) -> int | None:
    if stated is not None and (type(stated) is not int or not 0 <= stated < _MOST_TOKENS):
        raise refuse(where, f"its {name} are {ascii(stated)[:40]}, not a number of tokens", "Correct the response.")
    return stated if isinstance(stated, int) else None

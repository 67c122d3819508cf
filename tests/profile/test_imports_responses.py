"""Responses as servers and people leave them: arrays, batch files, several answers, answers without routing, parts of the tokens."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli.errors import UsageError
from remoe_cli.profile.imports.importer import ImportedRouting, import_profile, import_routing
from remoe_cli.profile.prompts import read_prompts
from tests.support import routing_files as made
from tests.support.families import FAMILIES
from tests.support.routing_files import LENGTHS, PROMPT, SPEC, Array

IDS = made.make_ids()
COUNTS = made.count(IDS)
EARLY = made.count(made.phases(IDS)[0], PROMPT)
ROWS = made.vllm_lines(IDS)
DECODED = tuple(np.subtract(LENGTHS, PROMPT).tolist())


def read(tmp_path: Path, rows: list[Any] | str | bytes) -> ImportedRouting:
    file = tmp_path / "x"
    data = rows if isinstance(rows, bytes) else (rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))).encode()
    file.write_bytes(data)
    return import_routing(file, SPEC)


def check(found: ImportedRouting, rows: list[int] | None = None) -> None:
    """Check that the rows are those sequences of IDS, or all."""
    rows = [0, 1, 2] if rows is None else rows
    assert (found.arrays["prefill_counts"] == EARLY[rows]).all()
    assert (found.arrays["decode_counts"] == (COUNTS - EARLY)[rows]).all()
    assert found.arrays["prompt_tokens"].tolist() == [PROMPT[row] for row in rows]
    assert found.arrays["decode_tokens"].tolist() == [DECODED[row] for row in rows]


def sequence(row: int) -> Array:
    first = made.offsets()[row]
    return IDS[first : first + LENGTHS[row]]


def raw(ids: Array) -> str:
    """Base64 of int32 for all hidden layers, of which the first is dense."""
    return base64.b64encode(np.concatenate([np.zeros_like(ids[:, :1]), ids], axis=1).astype("<i4").tobytes()).decode()


CHAT = [{**row, "object": "chat.completion", "choices": [{**row["choices"][0], "message": {"content": "\u2028\x85\x0b"}}]} for row in ROWS]
SHAPES: dict[str, list[Any] | str | bytes] = {
    "a blank line and line ends of DOS": "\r\n\r\n".join(map(json.dumps, ROWS)) + "\r\n",
    "characters that Unicode calls line ends": "\n".join(json.dumps(row, ensure_ascii=False) for row in CHAT),
    "array": json.dumps(ROWS),
    "array over lines": json.dumps(ROWS, indent=2) + "\n",
    "arrays on lines": [ROWS[:2], [], ROWS[2:]],
    "arrays on later lines": [ROWS[0], ROWS[1:]],
    "carriage returns within a line": "\n".join([json.dumps(ROWS[0]), *(json.dumps(row).replace(", ", ",\r") for row in ROWS[1:])]),
    "array of arrays": [[ROWS[:2], ROWS[2:]]],
    "objects over lines": "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "objects without an end of line": "".join(map(json.dumps, ROWS)),
    "UTF-8 with a byte order mark": b"\xef\xbb\xbf" + "\n".join(map(json.dumps, ROWS)).encode(),
    "array with a byte order mark": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "UTF-16": "\n".join(map(json.dumps, ROWS)).encode("utf-16"),
    "bytes that are no text": "\n".join(map(json.dumps, ROWS)).encode().replace(b'"x"', b'"\xff\xfe"'),
    "gzip": gzip.compress("\n".join(map(json.dumps, ROWS)).encode()),
    "gzip of an array with a byte order mark": gzip.compress(b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode()),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_files(shape: str, tmp_path: Path) -> None:
    found = read(tmp_path, SHAPES[shape])
    check(found)
    assert found.remarks == ()


@pytest.mark.parametrize("row", [ROWS[0], made.sglang_lines(IDS)[0], made.vllm_split_lines(IDS)[0]])
@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_alone(row: dict[str, Any], indent: int | None, tmp_path: Path) -> None:
    check(read(tmp_path, json.dumps(row, indent=indent)), [0])


def test_a_long_array_is_read_piece_by_piece(tmp_path: Path) -> None:
    """Of values that are longer than what is read at once."""
    rows = [row | {"text": "}{[," * 40_000} for row in ROWS]
    check(read(tmp_path, json.dumps(rows)))


PLACES: dict[str, Callable[[Array, int, int], dict[str, Any]]] = {
    "message": lambda ids, p, n: {"choices": [{"message": {"routed_experts": made.npy_base64(ids)}}], "usage": {"prompt_tokens": p}},
    "RequestOutput": lambda ids, p, n: {
        "prompt_token_ids": [5] * p,
        "outputs": [{"token_ids": [5] * (n + 1), "routed_experts": ids.tolist()}],
    },
    "top": lambda ids, p, n: {"routed_experts": ids.tolist(), "prompt_tokens": p},
    "tokens of the answer alone": lambda ids, p, n: {"choices": [{"token_ids": [5] * (n + 1), "routed_experts": made.npy_base64(ids)}]},
    "meta_info of an answer": lambda ids, p, n: {
        "choices": [{"meta_info": {"routed_experts": raw(ids), "prompt_tokens": p, "completion_tokens": n + 1}}]
    },
    "sglext": lambda ids, p, n: {
        "choices": [{"text": ""}],
        "usage": {"prompt_tokens": p, "completion_tokens": n + 1},
        "sglext": {"routed_experts": raw(ids)},
    },
    "sgl_ext of an answer": lambda ids, p, n: {
        "choices": [{"text": "", "sgl_ext": {"routed_experts": raw(ids)}}],
        "usage": {"prompt_tokens": p, "completion_tokens": n + 1},
    },
    "nvext": lambda ids, p, n: {
        "choices": [{"text": ""}],
        "usage": {"prompt_tokens": p, "completion_tokens": n + 1},
        "nvext": {
            "engine_data": {
                "routed_experts": {
                    "data": base64.b64encode(ids.astype(np.int16).tobytes()).decode(),
                    "shape": list(ids.shape),
                    "dtype": "int16",
                    "start": 0,
                }
            }
        },
    },
    "log line": lambda ids, p, n: {
        "request": {"max_tokens": 9},
        "status_code": 200,
        "response": {"choices": [{"routed_experts": made.npy_base64(ids)}], "usage": {"prompt_tokens": p}},
    },
    "ids of prompt and answer twice": lambda ids, p, n: {
        "choices": [{"routed_experts": made.npy_base64(ids)}],
        "prompt_routed_experts": made.npy_base64(ids[:p]),
        "usage": {"prompt_tokens": p, "completion_tokens": n + 1},
    },
}


@pytest.mark.parametrize("place", PLACES)
def test_places_of_the_fields(place: str, tmp_path: Path) -> None:
    check(read(tmp_path, [PLACES[place](sequence(row), PROMPT[row], DECODED[row]) for row in range(3)]))


def test_failed_requests_and_answers_without_routing_are_counted(tmp_path: Path) -> None:
    file = made.write_lines(tmp_path / "x.jsonl", made.vllm_batch(IDS))
    found = import_routing(file, SPEC)
    check(found)
    assert found.remarks == (
        f"Left out: 2 of 6 requests (failed); the first is {file}, row 1.",
        f"Left out: 1 of 4 answers (routed_experts is null, missing or zeros); the first is {file}, row 5.",
    )


WITHOUT: dict[str, dict[str, Any]] = {
    "null": {"choices": [{"finish_reason": "abort", "routed_experts": None}], "usage": {"prompt_tokens": 3, "completion_tokens": 0}},
    "missing": {"text": "", "meta_info": {"finish_reason": {"type": "abort"}, "prompt_tokens": 3, "completion_tokens": 0}},
    "both parts null": {"choices": [{"text": "", "routed_experts": None}], "prompt_routed_experts": None},
    "no answers": {"choices": [], "usage": {"prompt_tokens": 3}},
    "no tokens": {"choices": [{"routed_experts": made.npy_base64(IDS[:0])}], "usage": {"prompt_tokens": 1, "completion_tokens": 0}},
    "empty text": {"text": "", "meta_info": {"prompt_tokens": 1, "completion_tokens": 0, "routed_experts": ""}},
    "zeros": {"choices": [{"routed_experts": made.npy_base64(IDS[:5] * 0)}], "usage": {"prompt_tokens": 3, "completion_tokens": 3}},
    "nothing recorded": {"choices": [{"routed_experts": (IDS[:5] * 0 - 1).tolist()}], "usage": {"prompt_tokens": 3}},
    "no body": {"response": {"status_code": 200, "body": None}, "error": None},
    "no response": {"response": None, "error": None},
}


@pytest.mark.parametrize("kind", WITHOUT)
def test_answers_without_routing(kind: str, tmp_path: Path) -> None:
    found = read(tmp_path, [ROWS[0], WITHOUT[kind], *ROWS[1:]])
    check(found)
    assert len(found.remarks) == 1 and found.remarks[0].startswith("Left out: 1 of 4 answers") and "row 2" in found.remarks[0]


FAILED: dict[str, dict[str, Any]] = {
    "error": {"error": {"message": "too long", "code": 400}},
    "error object": {"object": "error", "message": "too long", "code": 400},
    "status": {"response": {"status_code": 429, "body": ROWS[0]}, "error": None},
    "status as text": {"status_code": "500", "response": ROWS[0]},
    "error beside a response": {"response": {"status_code": 200, "body": ROWS[0]}, "error": {"code": "batch_cancelled"}},
}


@pytest.mark.parametrize("kind", FAILED)
def test_failed_requests(kind: str, tmp_path: Path) -> None:
    found = read(tmp_path, [FAILED[kind], *ROWS, FAILED[kind]])
    check(found)
    assert len(found.remarks) == 1 and found.remarks[0].startswith("Left out: 2 of 5 requests (failed); the first is")


def test_several_answers_are_a_row_each(tmp_path: Path) -> None:
    """Of one prompt and of several, in the old form and in the new, one of them without routing."""
    other = made.make_ids((4,), seed=1)
    answers = [np.concatenate([sequence(0)[: PROMPT[0]], ids]) for ids in (sequence(0)[PROMPT[0] :], other)]
    new = {"choices": [{"index": 0, "routed_experts": made.npy_base64(ids)} for ids in answers], "usage": {"prompt_tokens": 3}}
    new["usage"]["completion_tokens"] = sum(len(ids) - 2 for ids in answers)  # type: ignore[index]
    old = {
        "prompt_routed_experts": sequence(0)[:3].tolist(),
        "choices": [{"index": 0, "routed_experts": ids[3:].tolist()} for ids in answers],
        "usage": new["usage"],
    }
    prompts = {  # of a list of prompts: the numbers of tokens are sums
        "choices": [
            {"prompt_token_ids": [5] * 3, "token_ids": [5] * (len(ids) - 2), "routed_experts": made.npy_base64(ids)} for ids in answers
        ],
        "usage": {"prompt_tokens": 6, "completion_tokens": new["usage"]["completion_tokens"]},  # type: ignore[index]
    }
    for response in (new, old, prompts):
        found = read(tmp_path, [response, ROWS[1]])
        assert found.arrays["prompt_tokens"].tolist() == [3, 3, 6] and found.arrays["decode_tokens"].tolist() == [2, 4, 3]
        assert (found.arrays["prefill_counts"][[0, 1]] == EARLY[0]).all()
        assert (found.arrays["decode_counts"][1] == made.count(other, (4,))[0]).all()
        assert found.remarks == (f"{tmp_path / 'x'}: 1 responses have several answers: each answer is a row with the prompt's routing.",)
    partly = {"choices": [new["choices"][0], {"routed_experts": None}], "usage": new["usage"]}  # type: ignore[index]
    found = read(tmp_path, [partly, ROWS[1]])
    check(found, [0, 1])
    assert "row 1, answer 2" in found.remarks[0]


def test_ids_of_a_response_are_those_of_its_first_answer(tmp_path: Path) -> None:
    """As SGLang's OpenAI API gives them."""
    response = {"choices": [{}, {}], "usage": {"prompt_tokens": 3, "completion_tokens": 9}, "sglext": {"routed_experts": raw(sequence(0))}}
    found = read(tmp_path, [response, made.sglang_lines(IDS)[1]])
    check(found, [0, 1])
    assert len(found.remarks) == 2


PREFILL_ONLY: dict[str, Callable[[Array, int], dict[str, Any]]] = {
    "one token": lambda ids, p: {
        "choices": [{"routed_experts": made.npy_base64(ids)}],
        "usage": {"prompt_tokens": p, "completion_tokens": 1},
    },
    "apart, null": lambda ids, p: {"choices": [{"routed_experts": None}], "prompt_routed_experts": made.npy_base64(ids)},
    "apart, empty": lambda ids, p: {
        "choices": [{"routed_experts": []}],
        "prompt_routed_experts": ids.tolist(),
        "usage": {"prompt_tokens": p, "completion_tokens": 1},
    },
    "apart, none": lambda ids, p: {
        "choices": [{"routed_experts": made.npy_base64(ids[:0])}],
        "prompt_routed_experts": made.npy_base64(ids),
    },
    "no choices": lambda ids, p: {"choices": [], "prompt_routed_experts": made.npy_base64(ids), "usage": {"prompt_tokens": p}},
    "SGLang": lambda ids, p: {"text": "", "meta_info": {"prompt_tokens": p, "completion_tokens": 1, "routed_experts": raw(ids)}},
    "no token": lambda ids, p: {
        "choices": [{"routed_experts": made.npy_base64(ids)}],
        "usage": {"prompt_tokens": p, "completion_tokens": 0},
    },
}


@pytest.mark.parametrize("kind", PREFILL_ONLY)
def test_responses_of_prefill_alone(kind: str, tmp_path: Path) -> None:
    found = read(tmp_path, [PREFILL_ONLY[kind](sequence(row)[: PROMPT[row]], PROMPT[row]) for row in range(3)])
    assert (found.arrays["prefill_counts"] == EARLY).all() and not found.arrays["decode_counts"].any()
    assert found.arrays["prompt_tokens"].tolist() == list(PROMPT) and not found.arrays["decode_tokens"].any()
    assert (found.routing.phases, found.routing.trace, found.remarks) == (("prefill",), "prefill", ())


@pytest.mark.parametrize("generated", [0, None])
def test_the_last_token_of_a_prompt_without_an_answer_has_no_routing(generated: int | None, tmp_path: Path) -> None:
    """As in SGLang, which leaves one token out also where none was generated."""
    rows = []
    for row in range(3):
        meta = {"prompt_tokens": PROMPT[row], "routed_experts": raw(sequence(row)[: PROMPT[row] - 1])}
        rows.append({"text": "", "meta_info": meta | ({} if generated is None else {"completion_tokens": generated})})
    found = read(tmp_path, rows)
    assert found.arrays["prompt_tokens"].tolist() == list(PROMPT)
    assert found.arrays["prefill_counts"][:, 0].sum(axis=1).tolist() == [(p - 1) * 2 for p in PROMPT]
    assert found.remarks == (f"{tmp_path / 'x'}: 3 of 12 tokens have no routing; they count for the lengths alone.",)


def test_a_lost_answer_counts_for_its_length(tmp_path: Path) -> None:
    rows = made.vllm_split_lines(IDS)
    rows[1] |= {"choices": [{"routed_experts": None}], "usage": {"prompt_tokens": 6, "completion_tokens": 4}}
    found = read(tmp_path, rows)
    assert found.arrays["decode_tokens"].tolist() == list(DECODED)
    assert not found.arrays["decode_counts"][1].any() and (found.arrays["decode_counts"][[0, 2]] == (COUNTS - EARLY)[[0, 2]]).all()
    assert "3 of 18 tokens have no routing" in found.remarks[0]


@pytest.mark.parametrize("field", ["routed_experts_start_len", "routed_experts_prompt_start", "start"])
def test_ids_from_a_later_token_on(field: str, tmp_path: Path) -> None:
    row = json.loads(json.dumps(ROWS[1]))
    if field == "start":
        ids = sequence(1)[4:].astype(np.uint8)
        row["choices"][0]["routed_experts"] = {
            "data": base64.b64encode(ids.tobytes()).decode(),
            "shape": list(ids.shape),
            "dtype": "uint8",
            "start": 4,
        }
    else:
        row["choices"][0] |= {"routed_experts": made.npy_base64(sequence(1)[4:]), field: 4}
    found = read(tmp_path, [ROWS[0], row, ROWS[2]])
    assert found.arrays["prompt_tokens"].tolist() == list(PROMPT) and found.arrays["decode_tokens"].tolist() == list(DECODED)
    assert found.arrays["prefill_counts"][1].sum(axis=1).tolist() == [4, 4]
    assert (found.arrays["decode_counts"] == COUNTS - EARLY).all()


def test_prompts_of_all_requests_lose_those_that_are_left_out(tmp_path: Path) -> None:
    """Rows and prompts stay together; prompts of the rows alone are taken too."""
    model = tmp_path / "model"
    FAMILIES["deepseek_v2"]().save_pretrained(model)
    rows = made.vllm_batch(IDS)
    rows[1]["response"]["body"]["choices"] *= 2
    rows[1]["response"]["body"]["usage"]["completion_tokens"] *= 2
    file = made.write_lines(tmp_path / "x.jsonl", rows)
    lengths = [9, 3, 9, 6, 9, 3]
    texts = made.write_lines(tmp_path / "p.jsonl", [{"prompt": f"text {row}", "n_prompt_tokens": n} for row, n in enumerate(lengths)])
    found = import_routing(file, SPEC, prompts=read_prompts(str(texts)))
    assert found.prompts is not None and found.prompts.texts == ("text 1", "text 1", "text 3", "text 5")
    profile = import_profile(str(model), file, tmp_path / "out", latency=made.latency(tmp_path), prompts=read_prompts(str(texts)))
    assert profile.record.dataset.sha256 == found.prompts.sha256 and profile.record.dataset.prompts == 4
    few = made.write_lines(tmp_path / "q.jsonl", [{"prompt": f"text {row}"} for row in range(4)])
    same = import_routing(file, SPEC, prompts=read_prompts(str(few)))
    assert same.prompts is not None and same.prompts.texts[-1] == "text 3"
    with pytest.raises(UsageError, match=r"it has 4 rows, and .* has 5 prompts"):
        import_routing(file, SPEC, prompts=read_prompts(str(made.write_lines(tmp_path / "r.jsonl", [{"prompt": "x"}] * 5))))


def test_remarks_are_said(tmp_path: Path) -> None:
    model = tmp_path / "model"
    FAMILIES["deepseek_v2"]().save_pretrained(model)
    remarks: list[str] = []
    file = made.write_lines(tmp_path / "x.jsonl", made.vllm_batch(IDS))
    import_profile(str(model), file, tmp_path / "out", latency=made.latency(tmp_path), say=remarks.append)
    assert [remark.split()[2] for remark in remarks] == ["2", "1"]

"""`remoe infer --data`: one document for each prompt, in their order; a prompt that fails does not keep the others from being asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.cli import app, infer, output
from remoe_cli.errors import ArtifactError, DeployError, InvokeError, RemoeError, UsageError
from remoe_cli.plan.cost.prices import FunctionPrices, MainPrices
from remoe_cli.runtime import client
from remoe_cli.runtime.answer import Generated
from remoe_cli.runtime.receipt import Prices, make_receipt

PRICES = Prices(
    catalog="local",
    main=MainPrices(rented=False, usd_per_s=1.0, usd_per_request=0.0, usd_per_read=0.0),
    function=FunctionPrices(usd_per_gb_second=1.0, usd_per_storage_gb_second=0.0, storage_free_mb=0.0, usd_per_call=0.0, usd_per_read=0.0),
)
RECEIPT = make_receipt(Generated((1,), (2, 3), "text", "length", (0.1, 0.11), ()), PRICES).model_dump(mode="json")
Asked = list[str]


class Target:
    def main_address(self, name: str) -> client.MainAddress:
        return client.Http("http://nowhere")


@pytest.fixture
def remoe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command over prompts "0", "1" and so on, against a server that fails as `failures` says."""

    def run(failures: dict[int, RemoeError], *options: str, prompts: int = 5) -> tuple[int, Asked, str, str]:
        asked: Asked = []

        def answer(endpoint: object, prompt: str, new: int, on_text: Callable[[str], None], **_: object) -> dict[str, Any]:
            asked.append(prompt)
            on_text(f"answer {prompt}")
            if (error := failures.get(int(prompt))) is not None:
                raise error
            return {"text": f"answer {prompt}", "finish_reason": "length", "receipt": RECEIPT}

        data = tmp_path / "prompts.jsonl"
        # A row that asks nothing comes first, so that rows and prompts are not counted alike.
        data.write_text('{"prompt": ""}\n' + "".join(f'{{"prompt": "{n}"}}\n' for n in range(prompts)))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["remoe", "infer", "d", *(options or ("--data", "prompts.jsonl", "--json", "--quiet"))])
        monkeypatch.setattr(infer, "pick", lambda *_: Target())
        monkeypatch.setattr(client, "answer", answer)
        monkeypatch.setattr(output, "_mode", output._Mode())
        code = app.run()
        printed = capsys.readouterr()
        return code, asked, printed.out, printed.err

    return run


LONG = UsageError("600 prompt tokens exceed the model's 512 positions.", "Shorten the prompt.")
BROKEN = InvokeError("The expert function f failed: MemoryError.", "Plan with more memory.")
OTHER = InvokeError("The expert function g failed: MemoryError.", "Plan with more memory.")
INTERNAL = RemoeError("IndexError: 7", "Please report it.")
GONE = DeployError("The main server ended before the answer was complete.", "Repeat the command.")


@pytest.mark.parametrize(
    "failures",
    [
        {},
        {1: LONG},
        {0: LONG, 4: LONG},
        {n: LONG for n in range(5)},
        {1: BROKEN, 3: BROKEN},
        {1: BROKEN, 2: OTHER, 3: INTERNAL, 4: LONG},
    ],
)
def test_errors_stand_in_their_place_and_the_rest_is_asked(failures: dict[int, RemoeError], remoe: Callable[..., Any]) -> None:
    code, asked, out, _ = remoe(failures)
    assert asked == ["0", "1", "2", "3", "4"]
    documents = [json.loads(line) for line in out.splitlines()]
    assert len(documents) == 5
    for number, document in enumerate(documents):
        if (error := failures.get(number)) is None:
            assert document["text"] == f"answer {number}"
        else:
            message = f"prompts.jsonl, row {number + 2}: {error.message}"
            assert document == {"error": {"kind": error.kind, "message": message, "hint": error.hint}, "row": number + 2}
    assert code == (1 if failures else 0)


def test_people_see_the_same(remoe: Callable[..., Any]) -> None:
    code, asked, out, err = remoe({1: LONG}, "--data", "prompts.jsonl")
    assert (code, asked) == (1, ["0", "1", "2", "3", "4"])
    assert "answer 1\nanswer 2\n" in out  # what came of an answer that failed is a line of its own
    assert out.count("Receipt") == 4
    assert f"error: prompts.jsonl, row 3: {LONG.message}\n  hint: Shorten the prompt." in err
    assert err.rstrip().endswith("1 of 5 prompts failed.")


def test_quiet_prints_the_text_alone(remoe: Callable[..., Any]) -> None:
    assert remoe({}, "--data", "prompts.jsonl", "-q", prompts=2) == (0, ["0", "1"], "answer 0\nanswer 1\n", "")


def test_an_answer_that_was_cut_is_marked_on_stderr(remoe: Callable[..., Any]) -> None:
    mark = "The answer was cut after 2 tokens (--max-new-tokens)."
    _, _, out, err = remoe({}, "--prompt", "0", "--max-new-tokens", "2")
    assert mark in err and "cut" not in out
    _, _, out, err = remoe({}, "--prompt", "0", "--max-new-tokens", "3")
    assert "after 2 tokens (that is the longest that the model or its plan has room for)" in err
    _, _, out, err = remoe({}, "--prompt", "0", "--max-new-tokens", "2", "--json")
    assert "cut" not in err and json.loads(out)["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("failures", "asked", "code"),
    [
        ({1: GONE}, 2, 1),
        ({0: LONG, 2: GONE}, 3, 1),
        ({2: ArtifactError("The model has changed.", "Profile again.")}, 3, 1),
        ({1: BROKEN, 2: BROKEN}, 3, 1),
    ],
)
def test_what_is_the_same_for_all_prompts_ends_the_command(
    failures: dict[int, RemoeError], asked: int, code: int, remoe: Callable[..., Any]
) -> None:
    ended, seen, out, _ = remoe(failures)
    assert (ended, len(seen)) == (code, asked)
    last = json.loads(out.splitlines()[-1])["error"]
    assert last["message"].startswith(f"prompts.jsonl, row {asked + 1}: ") and len(out.splitlines()) == asked


def test_one_prompt_is_its_own_error(remoe: Callable[..., Any]) -> None:
    for error in (LONG, BROKEN, GONE):
        code, _, out, _ = remoe({0: error}, "--prompt", "0", "--json")
        assert (code, json.loads(out)["error"]["message"]) == (error.exit_code, error.message)

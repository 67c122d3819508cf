"""Prompts from the hub: as much of a hub as that takes, and every way in which it cannot help."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from remoe_cli.demo_data import PROMPTS
from tests.support.paths import ROOT

# The client reads its address once, at import, so each address needs a process of its own; one asks all that it can, as it imports
# datasets for seconds. It prints one line for each (source, field, limit), with the seconds that took and what is imported by then.
_PROGRAM = """
import json, sys, time
from remoe_cli.errors import RemoeError
from remoe_cli.profile.prompts import read_prompts
for source, field, limit in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        result = {"texts": read_prompts(source, field, limit).texts}
    except RemoeError as error:
        result = {"kind": error.kind, "message": error.message, "hint": error.hint}
    result["seconds"] = time.monotonic() - start
    result["heavy"] = sorted({"torch", "transformers", "datasets", "pyarrow"} & sys.modules.keys())
    print(json.dumps(result))
"""

_SHA = "a" * 40
_DATASETS = {
    "o/n": {
        "data/train.jsonl": b"".join(b'{"id": %d, "prompt": "prompt %d"}\n' % (i, i) for i in range(300))
        + b'{"id": 300, "prompt": null}\n',
        "data/test.jsonl": b'{"id": 0, "prompt": "of the second split"}\n',
    },
    "o/chat": {
        "data/train.jsonl": b"".join(
            b'{"id": "%d", "conversations": [{"from": "human", "value": "question %d"}, {"from": "gpt", "value": "answer"}]}\n' % (i, i)
            for i in range(3)
        ),
    },
}


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as streaming datasets of .jsonl files takes."""

    def _answer(self) -> tuple[int, dict[str, str], bytes]:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        name = next((name for name in _DATASETS if f"/datasets/{name}/" in f"{path}/"), "")
        stored = _DATASETS.get(name, {})
        if stored and path in (f"/api/datasets/{name}", f"/api/datasets/{name}/revision/{_SHA}"):
            return 200, {}, json.dumps({"id": name, "sha": _SHA, "siblings": [{"rfilename": file} for file in stored]}).encode()
        if stored and path.startswith(f"/api/datasets/{name}/tree/{_SHA}"):
            files = [{"type": "file", "path": file, "size": len(body), "oid": "b" * 40} for file, body in stored.items()]
            folder = {"type": "directory", "path": "data", "oid": "c" * 40}
            return 200, {}, json.dumps(files if "data" in path.split("/") else [folder, *files]).encode()
        body = stored.get(path.removeprefix(f"/datasets/{name}/resolve/{_SHA}/"))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if body and wanted:
            first, last = int(wanted[1]), int(wanted[2])
            return 206, {"ETag": '"x"', "Content-Range": f"bytes {first}-{last}/{len(body)}"}, body[first : last + 1]
        code = {"o/gated": "GatedRepo", "o/broken": ""}.get(
            path.removeprefix("/api/datasets/"), "RepoNotFound" if "/api/" in path else "EntryNotFound"
        )
        return (403 if code == "GatedRepo" else 404 if code else 500), {"X-Error-Code": code} if code else {}, b""

    def do_GET(self) -> None:
        status, headers, body = self._answer()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


Question = tuple[str, str, int | None]
Result = dict[str, Any]


class Asker:
    """Reads prompts in another process, whose hub is the one above unless `endpoint` names another."""

    def __init__(self, hub: str, folder: Path) -> None:
        self.hub, self.folder = hub, folder

    def __call__(self, *questions: Question, endpoint: str | None = None, **environment: str) -> dict[Question, Result]:
        base = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
        ours = {
            "HF_ENDPOINT": endpoint or self.hub,
            "HF_HOME": str(self.folder / "cache"),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-c", _PROGRAM, json.dumps(questions)]
        done = subprocess.run(
            command, env=base | ours | environment, cwd=self.folder, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert not {"Retrying", "Traceback"} & set(re.findall(r"\w+", done.stderr)), done.stderr
        return dict(zip(questions, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield Asker(f"http://127.0.0.1:{server.server_address[1]}", tmp_path_factory.mktemp("hub"))
        server.shutdown()


STREAM: Question = ("o/n", "prompt", 250)
WHOLE: Question = ("o/n", "prompt", None)
NO_FIELD: Question = ("o/n", "text", None)
MISSING: Question = ("o/missing", "prompt", None)
GATED: Question = ("o/gated", "prompt", None)
BROKEN: Question = ("o/broken", "prompt", None)
CHAT: Question = ("o/chat", "prompt", None)


@pytest.fixture(scope="module")
def answers(ask: Asker) -> dict[Question, Result]:
    return ask(MISSING, GATED, BROKEN, STREAM, WHOLE, NO_FIELD, CHAT)


def test_a_hub_dataset_streams_its_first_split(answers: dict[Question, Result]) -> None:
    assert answers[STREAM]["texts"] == [f"prompt {i}" for i in range(250)]


def test_a_hub_dataset_has_the_same_formats_as_a_file(answers: dict[Question, Result]) -> None:
    assert answers[CHAT]["texts"] == [f"question {i}" for i in range(3)]


def test_a_hub_dataset_has_the_same_errors_as_a_file(answers: dict[Question, Result]) -> None:
    assert "o/n, row 301: the field 'prompt' is null" in answers[WHOLE]["message"]
    assert "o/n has no field 'text'; it has id, prompt" in answers[NO_FIELD]["message"]


def is_refusal(result: Result, message: str) -> None:
    assert result["seconds"] < 20  # with imports, on a busy machine; load_dataset alone would take 23 s
    assert result["kind"] == "Usage"
    assert result["hint"]
    assert message in result["message"]
    assert "\n" not in result["message"]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (MISSING, "neither a file here nor a dataset on the Hugging Face hub"),
        (GATED, "is a gated dataset"),
        (BROKEN, "is not a file here, and the Hugging Face hub cannot be reached"),
    ],
)
def test_a_dataset_that_cannot_be_had_is_refused_soon(question: Question, message: str, answers: dict[Question, Result]) -> None:
    is_refusal(answers[question], message)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"endpoint": "http://127.0.0.1:9"}, "is not a file here, and the Hugging Face hub cannot be reached"),
        ({"endpoint": "http://no-such-host.invalid"}, "is not a file here, and the Hugging Face hub cannot be reached"),
    ],
)
def test_a_hub_that_cannot_be_asked_says_so_soon(environment: dict[str, str], message: str, ask: Asker) -> None:
    is_refusal(ask(WHOLE, **environment)[WHOLE], message)


def test_a_text_file_imports_nothing_heavy(ask: Asker) -> None:
    question: Question = (str(PROMPTS), "prompt", 1)
    assert ask(question)[question]["heavy"] == []

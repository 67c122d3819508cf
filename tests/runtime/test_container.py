"""The SageMaker container: its program as SageMaker starts it, from the files of its image, with its share in moto's S3 over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from moto.server import ThreadedMotoServer

from remoe_cli.artifacts import read_json, sha256_file, write_json
from remoe_cli.deploy import main_files
from remoe_cli.deploy.aws import names
from remoe_cli.errors import ArtifactError, DeployError, RemoeError, UsageError
from remoe_cli.lambda_limits import PAYLOAD_LIMIT_BYTES
from remoe_cli.package.bundle import Manifest
from remoe_cli.package.image import write_context
from remoe_cli.package.partial_checkpoint import MANIFEST, MainManifest, seal
from remoe_cli.plan.document import Source
from remoe_cli.runtime import client, fetch, sequence, server
from remoe_cli.runtime.app import make_app
from remoe_cli.runtime.expected_cost import cost_model
from remoe_cli.runtime.limits import Limits
from remoe_cli.runtime.load_main import load_packaged
from remoe_cli.runtime.main_function import MainFunction
from tests.support.by_hand import PROMPT, PROMPT_IDS, ByHand, by_hand
from tests.support.sagemaker_front import ENDPOINT, sagemaker

BUCKET = "remoe-tiny-123456789012-us-east-1"
JSON = {"Content-Type": "application/json"}
LONG = {"prompt_token_ids": list(PROMPT_IDS), "max_new_tokens": 490}
# One for all, since each makes a TLS context, which takes longer than a ping.
HTTP = httpx.Client(trust_env=False, timeout=60, limits=httpx.Limits(max_connections=None))
AWS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": ""}


@dataclass(frozen=True)
class Stored:
    """The share of a model whose experts are all local, in a bucket; `environment` finds the bucket's server."""

    made: ByHand
    share: Path
    s3: Any
    environment: dict[str, str]
    uri: str

    def put(self, share: Path) -> str:
        """Put a share into the bucket as a deployment does, and return the URI of its manifest."""
        for file in read_json(share / MANIFEST, MainManifest).files:
            self.s3.upload_file(str(share / file.name), BUCKET, names.main_file_key(file.sha256, file.name))
        key = names.main_manifest_key(sha256_file(share / MANIFEST))
        self.s3.upload_file(str(share / MANIFEST), BUCKET, key)
        return f"s3://{BUCKET}/{key}"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    folder = tmp_path_factory.mktemp("stored")
    made = by_hand(folder, ())
    record = made.profile.record
    bundle = Manifest(plan=Source(path="", sha256=""), model=record.model, spec=record.spec, code_sha256="", functions=())
    config = main_files.server_config(made.plan, made.profile, made.catalog, bundle, str)
    main_files.write_main_files(config, made.plan_path, folder / "share")
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    environment = AWS | {"AWS_ENDPOINT_URL_S3": "http://{}:{}".format(*moto.get_host_and_port()), "NO_PROXY": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        s3 = boto3.client("s3", region_name="us-east-1")
        s3.create_bucket(Bucket=BUCKET)
        stored_files = Stored(made, folder / "share", s3, environment, "")
        yield Stored(made, folder / "share", s3, environment, stored_files.put(folder / "share"))
    s3.close()
    moto.stop()
    HTTP.close()


@contextmanager
def started(stored: Stored, image: Path, folder: Path, uri: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program, with nothing of this process's environment but what a container has; and its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "tmp").mkdir(parents=True)
    environment = stored.environment | {
        "PATH": os.environ["PATH"],
        "HOME": "/root",
        "TMPDIR": str(folder / "tmp"),
        "PYTHONPATH": str(image),
        "REMOE_MAIN": uri,
        "SAGEMAKER_BIND_TO_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "remoe_cli.runtime.container", "serve"]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image")
    write_context(folder / "context")
    return folder / "context"


def _ping(url: str) -> tuple[int, float]:
    begun = time.perf_counter()
    status = HTTP.get(f"{url}/ping").status_code
    return status, time.perf_counter() - begun


def _until_ready(url: str) -> int:
    """Wait for 200; returns how often the answer was 503."""
    for waited in range(1000):
        status, seconds = _ping(url)
        if status == 200:
            assert seconds < 2
            return waited
        assert status == 503
        time.sleep(0.1)
    raise AssertionError("the container is not ready")


def _post(url: str, **content: Any) -> tuple[int, Any]:
    response = HTTP.post(f"{url}/invocations", **content)
    return response.status_code, response.json()


def test_the_contract(stored: Stored, image: Path, tmp_path: Path, measured: Callable[[str], None]) -> None:
    begun = time.perf_counter()
    with started(stored, image, tmp_path, stored.uri) as (process, url):
        while True:
            try:
                status, body = _post(url, json=LONG)
                break
            except httpx.ConnectError:
                time.sleep(0.02)
        listening_s = time.perf_counter() - begun
        assert status == 503 and body["error"]["kind"] == "Deploy" and "still loading" in body["error"]["message"]
        sockets = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()]
        assert f"00000000:{int(url.rpartition(':')[2]):04X}" in sockets  # every interface, since SageMaker asks from outside
        assert _until_ready(url) > 1, "it answered 200 before it can have loaded anything"
        measured(f"container: listening after {listening_s:.1f} s, ready after {time.perf_counter() - begun:.1f} s")
        _answers(stored, url)
        _refuses(url)
        _through_sagemaker(stored, url)
        _pings_while_it_answers(url)
        _ends(process, url, measured)


def _answers(stored: Stored, url: str) -> None:
    status, answer = _post(url, json={"prompt": PROMPT, "max_new_tokens": 16})
    assert status == 200 and answer["token_ids"] == stored.made.tokens() and answer["finish_reason"] == "length"
    assert answer["prompt_token_ids"] == list(PROMPT_IDS)
    predict = cost_model(stored.made.plan, stored.made.profile, stored.made.catalog)
    assert answer["receipt"]["predicted"] == predict(20, 15).model_dump(mode="json")
    status, same = _post(url, json={"prompt_token_ids": PROMPT_IDS, "max_new_tokens": 16})
    assert status == 200 and same["token_ids"] == answer["token_ids"]
    with HTTP.stream("POST", f"{url}/invocations", json={"prompt": PROMPT, "max_new_tokens": 16, "stream": True}) as response:
        *pieces, last = map(json.loads, response.iter_lines())
    assert "".join(piece["text"] for piece in pieces) == answer["text"] and len(pieces) == 16
    assert last["answer"]["token_ids"] == answer["token_ids"]
    chat = {"model": "", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 16}
    for path in ("/openai/v1/chat/completions", "/v1/chat/completions", "/invocations"):
        document = HTTP.post(f"{url}{path}", json=chat).json()
        assert document["choices"][0]["message"]["content"] == answer["text"], path
    held = HTTP.get(f"{url}/main").json()
    assert held["expert_bytes_held"] == held["expert_bytes_of_model"] > 0


def _refuses(url: str) -> None:
    def reply(status: int, **content: Any) -> str:
        got, body = _post(url, headers=JSON, **content)
        assert (got, body["error"]["kind"]) == (status, "Usage") and body["error"]["hint"]
        return str(body["error"]["message"])

    assert "Invalid JSON" in reply(400, content=b"{")
    assert "either 'prompt' or 'prompt_token_ids'" in reply(400, json={})
    assert "exceed the model's 512 positions" in reply(400, json={"prompt": PROMPT, "max_new_tokens": 1000})
    padding = json.dumps({"prompt_token_ids": [1], "max_new_tokens": 1}).encode()
    limit = PAYLOAD_LIMIT_BYTES
    assert _post(url, content=padding.ljust(limit), headers=JSON)[0] == 200
    assert f"more than {limit} bytes" in reply(413, content=padding.ljust(limit + 1))
    assert f"more than {limit} bytes" in reply(413, content=iter([padding.ljust(limit // 2)] * 3))  # of unknown length


def _through_sagemaker(stored: Stored, url: str) -> None:
    with sagemaker(url) as runtime:
        pieces: list[str] = []
        answer = client.answer(client.SageMaker(ENDPOINT, runtime), PROMPT, 16, pieces.append)
        assert answer["token_ids"] == stored.made.tokens() and "".join(pieces) == answer["text"] and len(pieces) > 1
        with pytest.raises(UsageError, match="exceed the model's 512 positions"):
            client.answer(client.SageMaker(ENDPOINT, runtime), PROMPT, 1000, print)
        with pytest.raises(DeployError, match="The SageMaker endpoint other does not exist or is not yet in service"):
            client.answer(client.SageMaker("other", runtime), PROMPT, 16, print)
        with pytest.raises(DeployError, match=r"ended before the answer was complete \(ModelStreamError"):
            client.answer(client.SageMaker(ENDPOINT, runtime), f"{PROMPT} break", 16, print)


def _pings_while_it_answers(url: str) -> None:
    with ThreadPoolExecutor(50) as pool:
        asked = [pool.submit(_post, url, json=LONG | {"max_new_tokens": 450})]
        asked += [pool.submit(_post, url, json=LONG | {"max_new_tokens": 1}) for _ in range(49)]  # which wait
        pings = []
        while not asked[0].done():
            pings.append(_ping(url))
        assert [status for status, _ in pings] == [200] * len(pings) and len(pings) > 5
        assert max(seconds for _, seconds in pings) < 2
        assert {each.result()[0] for each in asked} == {200}


def _ends(process: subprocess.Popen[str], url: str, measured: Callable[[str], None]) -> None:
    with HTTP.stream("POST", f"{url}/invocations", json=LONG | {"stream": True}) as response:
        lines = response.iter_lines()
        assert "text" in json.loads(next(lines))
        begun = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        *_, last = map(json.loads, lines)
    assert last["answer"]["finish_reason"] == "cancelled" and 1 <= len(last["answer"]["token_ids"]) < 490
    assert process.wait(30) == 0
    measured(f"container: SIGTERM in mid-answer to its end {time.perf_counter() - begun:.2f} s")
    assert process.stdout is not None and "Traceback" not in process.stdout.read()


def test_a_share_that_is_not_right_ends_the_program_with_its_name(stored: Stored, image: Path, tmp_path: Path) -> None:
    uri = stored.put(_changed(stored, tmp_path / "share", lambda share: (share / "more.txt").write_text("as packaged")))
    wrong = next(f for f in read_json(tmp_path / "share" / MANIFEST, MainManifest).files if f.name == "more.txt")
    stored.s3.put_object(Bucket=BUCKET, Key=names.main_file_key(wrong.sha256, wrong.name), Body=b"changed now")
    with started(stored, image, tmp_path, uri) as (process, _):
        reply, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in reply
    assert f"error: s3://{BUCKET}/main/{wrong.sha256}/more.txt is not the file that the manifest names" in reply and "hint: " in reply


def _changed(stored: Stored, folder: Path, change: Callable[[Path], object]) -> Path:
    """A copy of the share with a change, sealed again."""
    folder.mkdir(parents=True)
    for path in stored.share.iterdir():
        os.link(path, folder / path.name)
    (folder / MANIFEST).unlink()
    change(folder)
    seal(folder)
    return folder


def test_files_are_fetched_in_ranges_checked_and_kept(stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "RANGE_BYTES", 50_000)
    folder = tmp_path / "files"
    more = "weights-0009.safetensors"
    other = stored.put(_changed(stored, tmp_path / "other", lambda share: (share / more).write_bytes(b"of another share")))
    assert more in {path.name for path in fetch.fetch(other, folder).iterdir()}
    assert fetch.fetch(stored.uri, folder) == folder
    kept = {path.name: (sha256_file(path), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert {name: digest for name, (digest, _) in kept.items()} == {p.name: sha256_file(p) for p in stored.share.iterdir()}
    assert (folder / "weights-0000.safetensors").stat().st_size > 3 * 50_000
    # What is right stays, what is wrong or too short is fetched again, what is of another share goes.
    damaged = folder / "weights-0000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (folder / f"{damaged.name}.0aB1c2D3").write_bytes(b"not downloaded to its end")
    fetch.fetch(stored.uri, folder)
    again = {path.name: (sha256_file(path), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert {name for name in kept if kept[name] != again[name]} == {damaged.name, MANIFEST}
    assert {name: digest for name, (digest, _) in again.items()} == {name: digest for name, (digest, _) in kept.items()}


def test_a_folder_with_files_of_others_is_not_used(stored: Stored, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    (tmp_path / "link").symlink_to(folder)
    for path, message in ((folder, "holds files that remoe did not make, such as thesis.tex"), (tmp_path / "link", "is a link")):
        with pytest.raises(UsageError, match=message):
            fetch.fetch(stored.uri, path)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("thesis.tex", "years of work")]


# s3transfer leaves the sockets of transfers that it cancels to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_cannot_be_fetched_is_named(stored: Stored, tmp_path: Path) -> None:
    def refused(kind: type[RemoeError], uri: str) -> str:
        with pytest.raises(kind) as raised:
            fetch.fetch(uri, tmp_path / "files")
        assert raised.value.hint
        return raised.value.message

    nothing = names.main_manifest_key("0" * 64)
    assert refused(DeployError, f"s3://{BUCKET}/{nothing}") == f"s3://{BUCKET}/{nothing} is missing."
    assert refused(DeployError, f"s3://no-such-bucket/{nothing}") == f"s3://no-such-bucket/{nothing} is missing."
    stored.s3.copy_object(Bucket=BUCKET, Key=nothing, CopySource=stored.uri.removeprefix("s3://"))
    assert "is not the manifest that its name says" in refused(ArtifactError, f"s3://{BUCKET}/{nothing}")

    uri = stored.put(_changed(stored, tmp_path / "share", lambda share: (share / "gone.txt").write_text("x")))
    gone = next(f for f in read_json(tmp_path / "share" / MANIFEST, MainManifest).files if f.name == "gone.txt")
    stored.s3.delete_object(Bucket=BUCKET, Key=names.main_file_key(gone.sha256, gone.name))
    assert refused(DeployError, uri) == f"s3://{BUCKET}/main/{gone.sha256}/gone.txt is missing."

    manifest = read_json(stored.share / MANIFEST, MainManifest)
    huge = manifest.model_copy(update={"files": (manifest.files[0].model_copy(update={"bytes": 10**18}), *manifest.files[1:])})
    write_json(tmp_path / "huge.json", huge)
    key = names.main_manifest_key(sha256_file(tmp_path / "huge.json"))
    stored.s3.upload_file(str(tmp_path / "huge.json"), BUCKET, key)
    assert "There is no room" in refused(DeployError, f"s3://{BUCKET}/{key}")

    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{BUCKET}/*"}
    stored.s3.put_bucket_policy(Bucket=BUCKET, Policy=json.dumps({"Version": "2012-10-17", "Statement": [deny]}))
    try:
        assert refused(DeployError, stored.uri) == f"{stored.uri} may not be read: access denied."
    finally:
        stored.s3.delete_bucket_policy(Bucket=BUCKET)


@pytest.fixture(scope="module")
def loaded(stored: Stored) -> MainFunction:
    return load_packaged(str(stored.share / MANIFEST))


def test_an_answer_ends_in_time_with_what_there_is(loaded: MainFunction, stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    put = sequence.Stream.put

    def slow_put(stream: Any, value: Any) -> None:  # so that 490 tokens take longer than the limits on any machine
        time.sleep(0.003)
        put(stream, value)

    monkeypatch.setattr(sequence.Stream, "put", slow_put)
    loading: Future[MainFunction] = Future()
    loading.set_result(loaded)
    with ThreadPoolExecutor(1) as model_thread:
        app = make_app(loading, model_thread, threading.Event(), Limits(whole_s=0.4, streamed_s=0.8))

        async def send(document: Any) -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app", timeout=60) as http:
                return await http.post("/invocations", json=document)

        def post(document: Any) -> httpx.Response:
            return asyncio.run(send(document))

        begun_s = time.monotonic()
        answer = post(LONG).json()
        assert begun_s + 0.4 <= loaded.engine.dispatcher.deadline_s <= time.monotonic() + 0.4  # calls get a part of that
        last = json.loads(post(LONG | {"stream": True}).text.splitlines()[-1])["answer"]
        whole = stored.made.tokens(len(last["token_ids"]))
        for part in (answer, last):
            assert part["finish_reason"] == "time-limit" and 1 < len(part["token_ids"]) < 490
            assert part["token_ids"] == whole[: len(part["token_ids"])]
        assert answer["receipt"]["total_s"] < last["receipt"]["total_s"]
        # A request whose turn comes too late is told so.
        model_thread.submit(time.sleep, 0.6)
        late = post(LONG)
        assert late.status_code == 503 and "no time left" in late.json()["error"]["message"]


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DeployError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            server.listen("127.0.0.1", port)

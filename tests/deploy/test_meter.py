"""Receipts against the twin's meter: the calls and milliseconds of all receipts are those that the functions were billed."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from remoe_cli.artifacts import read_json
from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.deploy.local import lifecycle, target
from remoe_cli.deploy.target import DeployOptions
from remoe_cli.errors import InvokeError, RemoeError, UsageError
from remoe_cli.function.codec import Batch
from remoe_cli.function.weights import read_head
from remoe_cli.plan.document import LayerPlan, MainSpec
from remoe_cli.runtime import client
from remoe_cli.runtime.invoke import make_client
from remoe_cli.runtime.last_resort import LastResort, ShardPlace
from remoe_cli.runtime.load_main import load_here
from remoe_cli.runtime.receipt import receipt_of
from remoe_cli.runtime.server_config import ServerConfig
from tests.support import api_server
from tests.support.by_hand import PROMPT, PROMPT_IDS, ByHand, by_hand, on_twin

HERE = target.LocalTarget(SILENT)
LAYERS = (
    LayerPlan(layer=0, remote=tuple(range(8)), memory_mb=1769, replicas=1, functions=((0, 1, 2, 3), (4, 5, 6, 7))),
    LayerPlan(layer=1, remote=tuple(range(8)), memory_mb=1769, replicas=2),
)
COUNTED = ("invocations", "billed_ms", "cold_starts")
ENDLESS = {"prompt": PROMPT, "max_new_tokens": 400, "stream": True}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ByHand]:
    whole = by_hand(tmp_path, LAYERS)
    plan = whole.plan.model_copy(update={"main": MainSpec(name="lambda-3538", memory_mb=3538)})
    with on_twin(replace(whole, plan=plan), tmp_path, monkeypatch) as made:
        yield made


@contextmanager
def damaged() -> Iterator[None]:
    """Meanwhile the experts of layer 1 that nobody has asked for yet are not those that were deployed."""
    shard = lifecycle.state_dir("m") / "bundle" / "layer-001.safetensors"
    right = shard.read_bytes()
    head = len(read_head(shard))
    with shard.open("r+b") as file:
        file.seek(head)
        file.write(bytes(len(right) - head))
    yield
    with shard.open("r+b") as file:
        file.write(right)


def ask(new_tokens: int = 8) -> dict[str, Any]:
    """The receipt of a question, answered or not."""
    try:
        return dict(client.answer(HERE.main_address("m"), PROMPT, new_tokens, lambda text: None)["receipt"])
    except RemoeError as error:
        receipt = receipt_of(error)
        assert receipt is not None
        return receipt.model_dump(mode="json") | {"error": error}


def by_function(lines: list[dict[str, Any]]) -> dict[str, Counter[str]]:
    sums: dict[str, Counter[str]] = {}
    for line in lines:
        sums.setdefault(line["name"], Counter()).update({key: line[key] for key in COUNTED})
    return sums


def test_the_receipts_of_a_main_function_on_lambda_are_the_meter(made: ByHand) -> None:
    """Loading that fails, loading, a warm answer, and a request that is refused."""
    HERE.deploy(made.plan_path, "m", DeployOptions(endpoint=Endpoint.aws_lambda))
    with damaged():
        broken = ask()
    assert isinstance(broken["error"], InvokeError) and "ShardDigestError" in broken["error"].message
    cold, warm, refused = ask(), ask(), ask(10_000)
    assert isinstance(refused["error"], UsageError) and refused["functions"] == []
    receipts = [broken, cold, warm, refused]
    status = HERE.status("m")
    assert by_function([line for receipt in receipts for line in receipt["functions"]]) == by_function(status["functions"])
    assert {key: sum(r["main"][key] for r in receipts) for key in COUNTED} == {key: status["main"][key] for key in COUNTED}
    # The client keeps them: the function is elsewhere. What it tells besides is no part of the answer.
    kept = list(HERE.receipts("m").receipts())
    assert [line.kind for line in kept] == ["failed", "answered", "answered", "failed"]
    assert [line.receipt.model_dump(mode="json") for line in kept] == [{k: v for k, v in r.items() if k != "error"} for r in receipts]
    told = [line.observed for line in HERE.receipts("m").observations()]
    assert len(told) == 2 and all(np.sum(each.prefill) == 2 * 2 * len(PROMPT_IDS) and each.tokens for each in told)
    # What functions were billed while the main function was loaded is in the receipts of the requests that waited for it.
    loading = [sum(line["loading_ms"] for line in receipt["functions"]) for receipt in receipts]
    assert loading[0] == broken["billed_ms"] > 0 and 0 < loading[1] < cold["billed_ms"] and loading[2:] == [0, 0]
    assert [r["answered"] for r in receipts] == [False, True, True, False]
    for receipt in receipts:
        assert receipt["main"]["basis"] == "report" and receipt["main"]["seconds"] == receipt["main"]["billed_ms"] / 1000
    # Money by hand: memory x billed time, and a fee for each call; the twin's logs and disk cost nothing.
    for receipt in (cold, warm):
        price, fee = 0.0000166667, 0.0000002
        calls_usd = sum(f["billed_ms"] / 1000 * 1769 / 1024 * price + f["invocations"] * fee for f in receipt["functions"])
        assert receipt["cost"]["functions_usd"] == pytest.approx(calls_usd, rel=1e-9)
        main_usd = receipt["main"]["billed_ms"] / 1000 * 3538 / 1024 * price + made.catalog.main.usd_per_request
        assert receipt["cost"]["total_usd"] == pytest.approx(calls_usd + main_usd, rel=1e-9)


def test_the_receipts_of_a_main_server_and_its_loading_are_the_meter(made: ByHand) -> None:
    """Loading belongs to no answer, and status says what it was; so does a client that leaves."""
    HERE.deploy(made.plan_path, "m", DeployOptions())
    before = HERE.status("m")
    assert before["main"]["spent"]["loading"]["billed_ms"] == sum(f["billed_ms"] for f in before["functions"]) > 0
    served, here = read_json(lifecycle.state_dir("m") / "server.json", ServerConfig), LastResort(str(lifecycle.state_dir("m") / "bundle"))
    for f in served.functions:  # what a function does not answer, the main server finds
        rows = Batch("float32", f.experts[:1], (1,), np.ones((1, served.spec.hidden_state_bytes // 4), np.float32))
        assert here.compute(ShardPlace.of(f), rows).data.any()
    with damaged():
        broken = ask()
    assert isinstance(broken["error"], InvokeError) and broken["billed_ms"] > 0
    receipts = [broken, ask(), ask()]
    assert [r["main"]["basis"] for r in receipts] == ["measured"] * 3 and receipts[1]["main_load_s"] == 0
    address = HERE.main_address("m")
    assert isinstance(address, client.Http)
    asked = ENDLESS
    with httpx.stream("POST", f"{address.url}/invocations", json=asked, trust_env=False, timeout=60) as response:
        assert "text" in json.loads(next(response.iter_lines()))
    give_up = time.monotonic() + 30
    while not HERE.status("m")["main"]["spent"]["cancelled"]["invocations"]:
        assert time.monotonic() < give_up
        time.sleep(0.05)
    status = HERE.status("m")
    spent = status["main"]["spent"]
    for key in ("invocations", "billed_ms"):
        assert spent["answers"][key] == sum(receipt[key] for receipt in receipts)
        metered = sum(f[key] for f in status["functions"])
        assert spent["loading"][key] + sum(receipt[key] for receipt in receipts) + spent["cancelled"][key] == metered
    kept = list(HERE.receipts("m").receipts())
    assert [line.kind for line in kept] == ["loading", "failed", "answered", "answered", "cancelled"]
    for key in COUNTED:
        assert sum(getattr(line.receipt, key) for line in kept) == sum(f[key] for f in status["functions"])
    assert spent["answers"]["usd"] == pytest.approx(sum(receipt["cost"]["functions_usd"] for receipt in receipts))
    shown = "\n".join(HERE.overview(status).above)
    for purpose in ("loading", "answers", "cancelled"):
        assert f"{spent[purpose]['billed_ms']} ms" in shown
    check_requests_that_are_answered_together(made, status["functions"])
    check_an_answer_that_destroy_ends()


def check_an_answer_that_destroy_ends() -> None:
    """Its client gets what there is of it, and its receipt is kept."""
    before = len(list(HERE.receipts("m").receipts()))
    address = HERE.main_address("m")
    assert isinstance(address, client.Http)
    with httpx.stream("POST", f"{address.url}/invocations", json=ENDLESS, trust_env=False, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        with ThreadPoolExecutor(1) as pool:
            gone = pool.submit(HERE.destroy, "m")
            last = json.loads([*lines][-1])
            gone.result()
    assert last["answer"]["finish_reason"] == "cancelled" and last["answer"]["token_ids"]
    kept = list(HERE.receipts("m").receipts())[before:]
    assert [line.kind for line in kept] == ["cancelled"]
    assert kept[0].receipt.billed_ms == last["answer"]["receipt"]["billed_ms"] > 0


def check_requests_that_are_answered_together(made: ByHand, before: list[dict[str, Any]]) -> None:
    """Another main function of the same functions answers four at a time; one client leaves, one has two answers, and one is refused."""
    status = HERE.status("m")
    main = load_here(lifecycle.state_dir("m") / "server.json", partial(make_client, status["endpoint"]))
    main = replace(main, config=main.config.model_copy(update={"concurrency": 4}))
    loading = main.spent.loading
    with api_server.serving(main) as url, ThreadPoolExecutor(8) as clients, httpx.Client(trust_env=False, timeout=60) as http:

        def ask_too(more: dict[str, Any]) -> dict[str, Any]:
            return dict(http.post(f"{url}/invocations", json={"prompt": PROMPT, "max_new_tokens": 40} | more).json())

        asked = [clients.submit(ask_too, more) for more in ({}, {}, {"n": 2}, {"prompt": "w5 w6"}, {"max_new_tokens": 9}, {"n": 99})]
        with http.stream("POST", f"{url}/invocations", json=ENDLESS) as response:
            assert "text" in json.loads(next(response.iter_lines()))
        *answers, refused = [each.result() for each in asked]
        assert "error" in refused
        give_up = time.monotonic() + 30
        while not main.spent.cancelled.invocations:
            assert time.monotonic() < give_up
            time.sleep(0.05)
    alike = [answers[0], answers[1], answers[2], answers[2]["others"][0], answers[4]]
    whole = made.tokens(40)
    assert [each["token_ids"] for each in alike] == [whole[: len(each["token_ids"])] for each in alike]
    after = HERE.status("m")["functions"]
    for key in ("invocations", "billed_ms"):
        metered = sum(f[key] for f in after) - sum(f[key] for f in before)
        spent = sum(answer["receipt"][key] for answer in answers) + getattr(main.spent.cancelled, key)
        assert getattr(loading, key) + spent == metered, key

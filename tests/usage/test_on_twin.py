"""Cost, calibration and drift of a deployment of the twin, from the receipts that it kept."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from remoe_cli.artifacts import read_json
from remoe_cli.cli import app
from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.local import target
from remoe_cli.deploy.target import DeployOptions
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.document import LayerPlan
from remoe_cli.profile.record import ProfileRecord, read_profile
from remoe_cli.runtime import client
from tests.support.by_hand import PROMPT, ByHand, by_hand, on_twin

RTT_MS = 30.0
REQUESTS, TOKENS = 8, 5
HERE = target.LocalTarget(SILENT)
LAYERS = (
    LayerPlan(layer=0, remote=tuple(range(8)), memory_mb=1769, replicas=1, functions=((0, 1, 2, 3), (4, 5, 6, 7))),
    LayerPlan(layer=1, remote=tuple(range(8)), memory_mb=1769, replicas=1),
)


def remoe(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["remoe", *arguments])
        code = app.run()
    return code, capsys.readouterr().out


def document(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    ended, printed = remoe(capsys, *arguments, "--json")
    assert ended == code, printed
    return json.loads(printed)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ByHand]:
    """A deployment that has answered, also two users by name, and a client that left."""
    folder = tmp_path_factory.mktemp("served")
    whole = by_hand(folder, LAYERS)
    with pytest.MonkeyPatch.context() as patch, on_twin(whole, folder, patch) as made:
        HERE.deploy(made.plan_path, "m", DeployOptions(rtt_ms=RTT_MS))
        address = HERE.main_address("m")
        assert isinstance(address, client.Http)
        for index in range(REQUESTS):
            words = PROMPT.split()[: 4 + 2 * index]
            asked = {
                "model": "",
                "messages": [{"role": "user", "content": " ".join(words)}],
                "max_completion_tokens": TOKENS,
                "temperature": 0,
            }
            asked |= {"user": ("ann", "=1+1")[index % 2]}
            answer = httpx.post(f"{address.url}/v1/chat/completions", json=asked, trust_env=False, timeout=60)
            assert answer.status_code == 200, answer.text
        asked = {"prompt": PROMPT, "max_new_tokens": 400, "stream": True}
        with httpx.stream("POST", f"{address.url}/invocations", json=asked, trust_env=False, timeout=60) as response:
            next(response.iter_lines())
        give_up = time.monotonic() + 30
        while not HERE.status("m")["main"]["spent"]["cancelled"]["invocations"]:
            assert time.monotonic() < give_up
            time.sleep(0.05)
        yield made


def test_receipts_add_up_to_the_twins_own_meter(made: ByHand, capsys: pytest.CaptureFixture[str]) -> None:
    status = HERE.status("m")
    cost = document(capsys, "cost", "m", "--by", "function")
    metered = {f["name"]: (f["invocations"], f["cold_starts"], f["billed_ms"]) for f in status["functions"]}
    rows = {row["of"]: row for row in cost["rows"]}
    of_main = rows.pop("main function")
    assert {name: (row["invocations"], row["cold_starts"], row["billed_ms"]) for name, row in rows.items()} == metered
    billed_ms = sum(ms for _, _, ms in metered.values())
    assert cost["meter"] == {"metered_ms": billed_ms, "kept_ms": billed_ms, "other_ms": 0}
    spent = status["main"]["spent"]
    assert cost["loading_ms"] == spent["loading"]["billed_ms"] > 0
    total = cost["total"]
    assert (total["requests"], total["answered"], total["cancelled"]) == (REQUESTS + 1, REQUESTS, 1) == (of_main["requests"], REQUESTS, 1)
    assert total["functions_usd"] == pytest.approx(sum(each["usd"] for each in spent.values()))


def test_rows_of_users_and_days_have_the_same_sum(made: ByHand, capsys: pytest.CaptureFixture[str]) -> None:
    by_user, by_day = (document(capsys, "cost", "m", "--by", by) for by in ("user", "day"))
    users = {row["of"]: row["requests"] for row in by_user["rows"]}
    assert users == {"ann": REQUESTS / 2, "=1+1": REQUESTS / 2, "": 1}  # loading is no request, and nobody's
    for each in (by_user, by_day):
        for figure in ("requests", "billed_ms", "generated_tokens"):
            assert sum(row[figure] for row in each["rows"]) == each["total"][figure] > 0
    code, printed = remoe(capsys, "cost", "m", "--by", "user", "--csv")
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert code == 0 and {row["user"] for row in rows} == {"ann", "'=1+1", ""}  # what a spreadsheet would compute is text
    assert sum(int(row["billed_ms"]) for row in rows) == by_user["total"]["billed_ms"]


def test_the_list_knows_since_when_and_no_cost_of_unknown_traffic(made: ByHand, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = document(capsys, "list")["deployments"]
    assert datetime.now(UTC) - datetime.fromisoformat(row["since"]) < timedelta(hours=1)
    assert (row["main"], row["usd_per_hour_at_rest"], row["usd_per_hour_of_traffic"]) == (made.plan.main.name, 0.0, None)
    (shown,) = (words for line in remoe(capsys, "list")[1].splitlines() if (words := line.split())[:1] == ["m"])
    assert shown[-2:] == ["$0", "unknown"]


def test_since_leaves_out_what_ended_before(made: ByHand, capsys: pytest.CaptureFixture[str]) -> None:
    assert document(capsys, "cost", "m", "--since", "2100-01-01")["total"]["requests"] == 0
    assert document(capsys, "cost", "m", "--since", "2020-01-01T00:00+02:00")["total"]["requests"] == REQUESTS + 1
    assert "is no time" in document(capsys, "cost", "m", "--since", "yesterday", code=2)["error"]["message"]
    assert document(capsys, "cost", "m", "--csv", code=2)["error"]["kind"] == "Usage"


def test_no_text_and_no_token_is_kept(made: ByHand) -> None:
    book = HERE.receipts("m")
    kept = "".join(path.read_text() for path in book.folder.glob("*.jsonl"))
    assert len(kept.splitlines()) > 2 * REQUESTS and "w1 w2" not in kept
    assert not {"text", "token_ids", "prompt_token_ids", "messages"} & {word for word in kept.split('"') if word.isidentifier()}
    assert all(path.stat().st_mode & 0o077 == 0 for path in book.folder.glob("*.jsonl")) and book.folder.stat().st_mode & 0o077 == 0


def test_calibrating_finds_the_round_trip(made: ByHand, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = made.profile.sha256
    found = document(capsys, "calibrate", "m", "-o", str(tmp_path / "new"))
    outside = found["times"]["a warm call, outside the function"]
    assert outside["old_s"] == read_catalog("local").function.warm_unbilled_s and 0.9 < outside["new_s"] / (RTT_MS / 1000) < 2
    assert found["calls"] > 100 and "Plan again" in found["verdict"] and found["again"]["saved"] > 0.01
    deployed, best = (found["again"][each]["cost_usd_per_request"] for each in ("deployed", "best"))
    assert found["again"]["saved"] == pytest.approx(1 - best / deployed)
    (told,) = (remark for remark in found["remarks"] if "while the main function was loaded" in remark)
    assert told.startswith("3 more functions started")
    new = read_profile(tmp_path / "new")
    assert made.profile.sha256 == before
    latency = {"invocation", "cold_start", "remote_expert"}
    old_record, new_record = (read_json(path / "profile.json", ProfileRecord) for path in (made.profile.path, new.path))
    assert old_record.latency.model_dump(exclude=latency) == new_record.latency.model_dump(exclude=latency)
    refused = document(capsys, "calibrate", "m", "-o", str(tmp_path / "new"), code=2)
    assert "new/profile.json exists already" in refused["error"]["message"]
    refused = document(capsys, "calibrate", "m", "-o", str(made.profile.path), code=2)
    assert "is the profile of the deployed plan" in refused["error"]["message"] and made.profile.sha256 == before


def test_served_routing_is_compared_with_the_profile(made: ByHand, capsys: pytest.CaptureFixture[str]) -> None:
    """The profile's routing was made up, so what is served differs from it in every layer."""
    found = document(capsys, "drift", "m")
    assert (
        found["drift"] and found["requests"] == REQUESTS + 1 and [each["layer"] for each in found["layers"]] == found["drifted"] == [0, 1]
    )
    whole = found["whole"]
    assert whole["low"] <= whole["bits"] <= whole["high"] <= 1 and whole["floor"] < whole["floor_p99"] < whole["bits"]
    code, printed = remoe(capsys, "drift", "m", "-v")
    assert code == 0 and "bits from the profile's" in printed and "noise floor" in printed
    profiled, planned = (line.split(maxsplit=1) for line in printed.splitlines()[-2:])
    assert (profiled[0], planned) == ("next", ["remoe", "plan DIR -o plans/NAME.json --remote-share 1"])


def test_receipts_outlive_the_deployment(made: ByHand, capsys: pytest.CaptureFixture[str]) -> None:
    """The last test: it destroys the deployment."""
    before = document(capsys, "cost", "m")
    gone = document(capsys, "destroy", "m")
    assert gone["receipts"] == str(HERE.receipts("m").folder)
    after = document(capsys, "cost", "m")
    assert after["total"] == before["total"] and after["storage_usd"] is None and after["meter"] is None
    assert "no deployment named 'n'" in document(capsys, "cost", "n", code=1)["error"]["message"]

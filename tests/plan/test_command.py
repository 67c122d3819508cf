"""`remoe plan` on the command line: one document, exit codes, and the same bytes whatever the hash seed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.profile.record import RoutingRef, read_profile, write_profile
from tests.plan.test_drafts import with_answers
from tests.support import forked
from tests.support.synthetic import synthetic_profile


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("p") / "profile"
    synthetic_profile(path, layers=2, experts=4, expert_mb=40, decode_tokens=20)
    return path


def plan(profile: Path, out: Path, *options: str, code: int = 0) -> dict[str, Any]:
    document: dict[str, Any] = forked.document("plan", str(profile), "--yes", "-o", str(out), *options, code=code)
    return document


def widest(screen: str, folder: Path) -> int:
    """The columns of a screen, without paths, which are never broken."""
    return max(len(line) for line in screen.splitlines() if str(folder) not in line)


def test_one_document_with_everything_in_it(profile: Path, tmp_path: Path) -> None:
    document = plan(profile, tmp_path / "a.json", "--explain", "--frontier")
    named = {"path", "objective", "cost_usd_per_request", "ttft_s", "tpot_s", "lower_bound_usd", "gap", "status", "verdict", "reason"}
    assert named | {"main", "layers", "baselines", "explanation", "frontier", "break_evens", "scenarios", "basis"} <= document.keys()
    assert {"remote", "memory_mb", "replicas"} <= document["layers"][0].keys()
    assert Path(document["frontier_picture"]).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "a.json").read_text()).items() <= document.items()


def test_several_requests_at_once(profile: Path, tmp_path: Path) -> None:
    one, four = (plan(profile, tmp_path / f"{n}.json", "--concurrency", str(n), "--explain", "--frontier") for n in (1, 4))
    assert four["concurrency"] == four["workload"]["concurrency"] == 4 and "concurrency" not in one
    assert four["cost_usd_per_request"] < one["cost_usd_per_request"]
    costs = [point["cost_usd"] for point in four["frontier"]]
    assert costs == sorted(costs, reverse=True) and costs[-1] == pytest.approx(four["cost_usd_per_request"], rel=1e-3)
    assert "--concurrency" in plan(profile, tmp_path / "a.json", "--concurrency", "2", "--solver", "paper", code=2)["error"]["hint"]
    plan(profile, tmp_path / "a.json", "--concurrency", "0", code=2)


def test_draft_tokens(profile: Path, tmp_path: Path) -> None:
    asked = with_answers(read_profile(profile), 0.8, tmp_path / "answers").path
    off, auto = (plan(asked, tmp_path / f"{said}.json", "--speculate", said) for said in ("off", "auto"))
    assert "speculate" not in off and auto["speculate"] != "off" and auto["workload"]["speculate"] == "auto"
    assert auto["cost_usd_per_request"] < off["cost_usd_per_request"] and auto["tpot_s"] < off["tpot_s"]
    assert "does not know how many" in plan(profile, tmp_path / "a.json", "--speculate", "4", code=2)["error"]["message"]
    assert "not 'auto', 'off' or a number" in plan(asked, tmp_path / "a.json", "--speculate", "many", code=2)["error"]["message"]


def test_the_same_bytes_whatever_the_hash_seed(profile: Path, tmp_path: Path) -> None:
    for seed in ("0", "1"):
        command = [sys.executable, "-m", "remoe_cli", "plan", str(profile), "-o", str(tmp_path / f"{seed}.json"), "--tpot", "0.5", "--json"]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.DEVNULL, timeout=120)
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()


def test_a_budget_out_of_reach_names_the_least_that_does(profile: Path, tmp_path: Path) -> None:
    error = plan(profile, tmp_path / "a.json", "--budget", "1e-12", "--minimize", "tpot", code=4)["error"]
    assert error["kind"] == "OverBudget" and not (tmp_path / "a.json").exists()
    found = re.search(r"the cheapest costs ([\d.e-]+) USD", error["message"])
    assert found
    document = plan(profile, tmp_path / "a.json", "--budget", found[1], "--minimize", "tpot")
    assert document["objective"] == "tpot" and document["cost_usd_per_request"] <= float(found[1]) * (1 + 1e-8)
    assert document["lower_bound_usd"] is None and document["lower_bound_s"] <= document["tpot_s"]


def test_all_targets_out_of_reach_are_named_together(profile: Path, tmp_path: Path) -> None:
    options = ("--ttft", "1e-6", "--tpot", "1e-6", "--budget", "1e-12")
    error = plan(profile, tmp_path / "a.json", *options, code=3)["error"]
    least = re.fullmatch(
        r"No plan meets a TTFT of 1e-06 s: the least TTFT is (\S+) s\. No plan meets a TPOT of 1e-06 s: the least TPOT is (\S+) s\. "
        r"No plan costs 1e-12 USD a request or less: the cheapest costs (\S+) USD\.",
        error["message"],
    )
    assert least and all(figure in error["hint"] for figure in least.groups())
    for option, figure in zip(("--ttft", "--tpot", "--budget"), least.groups(), strict=True):
        plan(profile, tmp_path / "a.json", option, figure)


def test_requests_from_a_file(profile: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"2023-11-16 18:{minute:02}:00,{100 + minute},{10 + minute}\n" for minute in range(30))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    workload = plan(profile, tmp_path / "a.json", "--requests", str(trace))["workload"]
    assert workload["requests_per_hour"] == pytest.approx(60)
    assert workload["n_in"] == pytest.approx(114.5, abs=1) and len(workload["kinds"]) == 4
    error = plan(profile, tmp_path / "b.json", "--requests", str(trace), "--n-in", "5", code=2)["error"]
    assert "both say how long" in error["message"]


def test_a_share_of_a_file_and_a_percentile(profile: Path, tmp_path: Path) -> None:
    """The plan names the length above which requests are refused, and how many that are."""
    trace = tmp_path / "trace.csv"
    trace.write_text("n_in,n_out\n" + "20,5\n" * 99 + "500,40\n")
    document = plan(profile, tmp_path / "a.json", "--requests", str(trace), "--cover", "0.99", "--ttft", "60", "--ttft-percentile", "95")
    assert document["workload"]["served"] == {"cover": 0.99, "share": 0.99, "tokens": 25, "n_in": 20, "n_out": 5}
    assert document["targets"]["ttft_at"] == {"n_in": 20, "cold": False} and [one["share"] for one in document["spread"]] == [
        0.5,
        0.95,
        0.99,
    ]
    screen = " ".join(
        forked.remoe("plan", str(profile), "-o", str(tmp_path / "b.json"), "--requests", str(trace), "--cover", "0.99").stdout.split()
    )
    assert "holds for requests of up to 26 tokens, with prompts of up to 20. Longer ones are refused: 1.00% of the file's." in screen
    for options, message in ((("--cover", "0.9"), "there is none"), (("--ttft-percentile", "95"), "--ttft, which is not given")):
        assert message in plan(profile, tmp_path / "c.json", *options, code=2)["error"]["message"]


def test_traffic_alone_does_not_hide_that_lengths_are_unknown(tmp_path: Path) -> None:
    """Rows of imported routing that are topics have no lengths of prompts: a plan that takes theirs has to say so."""
    made = synthetic_profile(tmp_path / "made")
    record = made.record.model_copy(update={"settings": None, "routing": RoutingRef(source="imported", row="topic")})
    write_profile(tmp_path / "topics", record, made.arrays)
    for options, unknown in (
        ((), "prompts and answers"),
        (("--requests-per-hour", "20"), "prompts and answers"),
        (("--requests-per-hour", "20", "--n-in", "9"), "answers"),
        (("--requests-per-hour", "20", "--n-in", "9", "--n-out", "9"), ""),
    ):
        document = plan(tmp_path / "topics", tmp_path / "a.json", *options)
        found = [note for note in document["notes"] if "does not know the lengths" in note]
        assert [unknown in note for note in found] == [True] * bool(unknown), (options, found)
        expected = (9 if "--n-in" in options else 40, 9 if "--n-out" in options else 15)
        assert (document["workload"]["n_in"], document["workload"]["n_out"]) == expected


def test_no_requests_an_hour_are_refused(profile: Path, tmp_path: Path) -> None:
    error = plan(profile, tmp_path / "a.json", "--requests-per-hour", "0", code=2)["error"]
    assert "without requests there is nothing to plan" in error["message"]


def test_the_screen_begins_with_money_and_the_verdict_and_shows_layers_only_with_verbose(profile: Path, tmp_path: Path) -> None:
    arguments = ("plan", str(profile), "-o", str(tmp_path / "a.json"), "--remote-share", "0.5", "--explain", "--frontier", "--yes")
    short, long = forked.remoe(*arguments), forked.remoe(*arguments, "-v")
    assert short.returncode == long.returncode == 0
    labels = [line.split("  ")[0] for line in short.stdout.splitlines()]
    assert labels[:2] == ["verdict", "why"] and labels.index("cost") < labels.index("TTFT")
    assert not re.search("^Layers", short.stdout, re.MULTILINE) and re.search("^Layers", long.stdout, re.MULTILINE)
    assert re.search("^Alternatives", short.stdout, re.MULTILINE)
    assert widest(long.stdout, tmp_path) <= 100
    assert not re.search(r"t_rem|MIX|certificate|\bturns?\b|\bflips?\b|\baway\b|reckon|\be\+\d", long.stdout)


def test_a_stored_plan_is_shown_as_it_was_when_made(profile: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    made = forked.remoe("plan", str(profile), "-o", str(file), "--remote-share", "0.5", "--requests-per-hour", "20")
    (profile / "arrays.safetensors").rename(tmp_path / "moved")  # neither the profile nor the catalog is read
    try:
        shown = forked.remoe("plan", "show", str(file))
    finally:
        (tmp_path / "moved").rename(profile / "arrays.safetensors")
    assert shown.stdout == made.stdout and "a month at 20 requests an hour" in shown.stdout
    document = forked.document("plan", "show", str(file))
    assert document == {"path": str(file)} | json.loads(file.read_text())


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_on_the_screen_is_split_within_a_word(profile: Path, tmp_path: Path, width: int) -> None:
    """The same words as on a very wide screen, in lines that fit."""
    arguments = (
        "plan",
        str(profile),
        "-o",
        str(tmp_path / "a.json"),
        "--explain",
        "--requests-per-hour",
        "20",
        "--catalog",
        "aws-us-east-1",
        "--yes",
    )
    wide, narrow = forked.remoe(*arguments, COLUMNS="400"), forked.remoe(*arguments, COLUMNS=str(width))
    wrapped = [line for line in narrow.stdout.splitlines() if str(tmp_path) not in line and "docs.aws.amazon.com" not in line]
    assert [line for line in wrapped if len(line) > width] == []
    assert sorted(narrow.stdout.replace("─", "").split()) == sorted(wide.stdout.replace("─", "").split())


def test_a_plan_without_remote_experts_says_why_it_shows_no_layers(profile: Path, tmp_path: Path) -> None:
    shown = forked.remoe("plan", str(profile), "-o", str(tmp_path / "a.json"), "-v", COLUMNS="72")
    assert "No expert is remote, so there is no table of layers." in shown.stdout and "moving experts out: not worth it" in shown.stdout
    assert widest(shown.stdout, tmp_path) <= 72

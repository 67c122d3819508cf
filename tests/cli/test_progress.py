"""Progress: lines at a steady beat where there is no terminal, a bar with the time left where there is one, nothing with --quiet."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable

import pytest

from remoe_cli.cli import output

BEAT_S = 0.05


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "HEARTBEAT_S", BEAT_S)
    monkeypatch.setattr(output, "_mode", output._Mode())


def work(capsys: pytest.CaptureFixture[str], *reports: tuple[float, float | None, str], rest_s: float = 4 * BEAT_S) -> list[str]:
    """Report each, then do something long without a report; returns the lines on stderr."""
    with output.progress("Long work") as report:
        for done, total, what in reports:
            report(done, total, what)
        time.sleep(rest_s)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_work_that_reports_nothing_prints_a_line_each_beat(capsys: pytest.CaptureFixture[str]) -> None:
    lines = work(capsys, rest_s=6 * BEAT_S)
    assert len(lines) >= 3 and all(re.fullmatch(r"Long work: \d+ s so far", line) for line in lines)
    time.sleep(3 * BEAT_S)
    assert capsys.readouterr().err == ""  # the beat ends with the context


def test_counted_work_says_how_much_is_done_and_how_long_the_rest_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with output.progress("Long work") as report:
        report(0, 8)
        time.sleep(2 * BEAT_S)
        report(2, 8)
        time.sleep(3 * BEAT_S)
        report(8, 8)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Long work: 0 of 8"
    assert re.fullmatch(r"Long work: 2 of 8, about \d+ s left", lines[-2])
    assert re.fullmatch(r"Long work: 8 done in \d+ s", lines[-1])


def test_quick_work_prints_only_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert work(capsys, (3, 3, ""), rest_s=0) == ["Long work: 3 done in 0 s"]
    assert work(capsys, rest_s=0) == []


def test_a_beat_waits_while_other_lines_come(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "HEARTBEAT_S", 1.0)
    with output.progress("Long work"):
        for _ in range(12):
            output.say("Another message")
            time.sleep(0.1)
    assert set(capsys.readouterr().err.splitlines()) == {"Another message"}


def test_each_named_thing_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = work(capsys, (1, 2, "queue"), (1, None, "topic"), rest_s=0)
    assert lines == ["[1/2] queue", "topic"]


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    output._set_quiet(True)
    assert work(capsys, (1, 2, "queue"), (2, 2, "")) == []


def test_work_that_fails_ends_the_beat_and_claims_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        with output.progress("Long work") as report:
            report(2, 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    time.sleep(3 * BEAT_S)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("first", "last", "now_s", "expected"),
    [
        ((0, 64), (16.5, 64), 100.0, "16 of 64, about 5 min left"),  # 100 s for 16.5, of which 47.5 are left
        ((0, 64), (16.5, 64), 200.0, "16 of 64, about 3 min left"),  # goes down while nothing is reported
        ((48, 64), (56, 64), 100.0, "56 of 64, about 2 min left"),  # what an earlier run did says nothing about the rate
        ((0, 64), (63, 64), 1e4, "63 of 64, about 1 s left"),
        ((0, 64), (64, 64), 100.0, "64 of 64"),
        ((48, 64), (48, 64), 100.0, "48 of 64"),
    ],
)
def test_the_time_left_is_that_of_this_runs_rate(
    first: tuple[float, float], last: tuple[float, float], now_s: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 0.0
    monkeypatch.setattr(output.time, "monotonic", lambda: clock)
    stage = output._Stage("Long work", of_bytes=False)
    stage.report(*first)
    clock = 100.0
    stage.report(*last)
    clock = max(now_s, clock)
    assert stage.state() == expected


def test_bytes_are_told_in_megabytes() -> None:
    stage = output._Stage("Uploading", of_bytes=True)
    stage.report(0, 93e6)
    assert stage.state() == "0 bytes of 93 MB"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (3600, "60 min"), (9000, "2.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert output._duration(seconds) == text


def test_a_terminal_shows_a_bar_that_leaves_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with output.progress("Long work") as report:
        report(0, 8)
        time.sleep(0.2)
        report(2, 8, "queue")
        time.sleep(0.3)
        report(8, 8)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(r"Long work \S+ +2 of 8, about \d+ s left  queue", drawn)
    assert re.search(r"Long work: 8 done in \d+ s\s*$", drawn)


@pytest.mark.alone
def test_an_answer_that_stalls_prints_a_line_and_one_that_flows_prints_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from remoe_cli.cli import infer
    from remoe_cli.runtime import client

    beat_s = 0.4
    monkeypatch.setattr(output, "HEARTBEAT_S", beat_s)
    lines: list[int] = []

    def answer(address: object, prompt: object, tokens: int, on_text: Callable[[str], None], **options: object) -> dict[str, object]:
        for _ in range(30):  # text comes for three beats
            time.sleep(beat_s / 10)
            on_text("a")
        lines.append(len(capsys.readouterr().err.splitlines()))
        time.sleep(3 * beat_s)
        lines.append(len(capsys.readouterr().err.splitlines()))
        return {}

    monkeypatch.setattr(client, "answer", answer)
    infer.ask(client.Http("http://nowhere"), "x", 1, None)
    assert lines[0] == 0 and lines[1] >= 2

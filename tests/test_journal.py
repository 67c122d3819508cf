"""Files of JSON lines that several processes append to: whole lines, torn lines, rotation, and what is not remoe's."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from threading import Thread

import pytest

from remoe_cli import journal
from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.journal import Journal
from tests.support.paths import ROOT

WRITERS, LINES = 4, 60


# In interpreters of their own, which import little.
WRITE = f"""
import json, sys
from pathlib import Path
from remoe_cli import journal
of = journal.Journal(Path(sys.argv[1]), "receipts", most_bytes=40_000)
for number in range({LINES}):
    journal.append(of, json.dumps({{"writer": int(sys.argv[2]), "number": number, "fill": "x" * 300}}))
"""


def numbers(of: Journal) -> list[int]:
    return [line["number"] for _, line in journal.lines(of)]


def test_lines_of_several_writers_do_not_mix(tmp_path: Path) -> None:
    """Files fill up meanwhile, so a writer may find that another one has renamed the file."""
    command = [sys.executable, "-c", WRITE, str(tmp_path / "r")]
    writers = [subprocess.Popen([*command, str(writer)], cwd=ROOT) for writer in range(WRITERS)]
    assert [writer.wait(60) for writer in writers] == [0] * WRITERS
    damaged: list[str] = []
    found = [line for _, line in journal.lines(Journal(tmp_path / "r", "receipts"), damaged.append)]
    assert not damaged and len(Journal(tmp_path / "r", "receipts").full()) >= 2
    for writer in range(WRITERS):
        of_writer = [line["number"] for line in found if line["writer"] == writer]
        assert sorted(of_writer) == list(range(LINES)) and all(a < b for a, b in pairwise(of_writer))


def test_a_writer_waits_for_another_and_then_takes_the_new_file(tmp_path: Path) -> None:
    """The other one has filled the file meanwhile, and renamed it."""
    of = Journal(tmp_path / "r", "receipts")
    journal.append(of, "{}")
    descriptor = os.open(of.path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    writer = Thread(target=journal.append, args=(of, '{"number": 1}'))
    writer.start()
    writer.join(0.3)
    assert writer.is_alive()
    of.path.rename(of.folder / "receipts-000001.jsonl")
    os.close(descriptor)
    writer.join(10)
    assert of.path.read_text() == '{"number": 1}\n' and of.full()[0].read_text() == "{}\n"


def test_a_line_whose_writer_died_is_left_out_and_the_next_is_whole(tmp_path: Path) -> None:
    of = Journal(tmp_path / "r", "receipts")
    for number in range(2):
        journal.append(of, json.dumps({"number": number}))
    with of.path.open("a") as file:
        file.write('{"number": 2, "fi')
    damaged: list[str] = []
    assert [line["number"] for _, line in journal.lines(of, damaged.append)] == [0, 1]
    assert damaged == [f"{of.path}:3"]
    journal.append(of, json.dumps({"number": 3}))
    damaged.clear()
    assert [(where, line["number"]) for where, line in journal.lines(of, damaged.append)][-1] == (f"{of.path}:4", 3)
    assert damaged == [f"{of.path}:3"]


def test_full_files_are_kept_until_there_are_too_many(tmp_path: Path) -> None:
    of = Journal(tmp_path / "r", "receipts", most_bytes=100, files=3)
    for number in range(40):
        journal.append(of, json.dumps({"number": number}))
        found = numbers(of)
        assert found == list(range(found[0], number + 1))
    assert numbers(of)[0] > 0 and len(list(of.folder.glob("*.jsonl"))) == 3
    assert all(path.stat().st_size <= 100 for path in of.folder.glob("*.jsonl"))


def test_only_the_owner_reads_what_is_kept(tmp_path: Path) -> None:
    os.umask(before := os.umask(0o000))
    of = Journal(tmp_path / "r", "receipts")
    journal.append(of, "{}")
    os.umask(before)
    assert of.path.stat().st_mode & 0o777 == 0o600 and of.folder.stat().st_mode & 0o077 == 0


def test_what_remoe_did_not_make_is_neither_written_nor_read(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for place in ("thesis.txt", "mine", "link"):
        with pytest.raises(UsageError):
            journal.append(Journal(tmp_path / place, "receipts"), "{}")
    of = Journal(tmp_path / "r", "receipts")
    journal.append(of, "{}")
    of.path.unlink()
    of.path.symlink_to(thesis)
    with pytest.raises(UsageError, match="is not a file of remoe"):
        journal.append(of, "{}")
    with pytest.raises(ArtifactError, match="it is a link"):
        list(journal.lines(of))
    assert thesis.read_text() == "years of work" and [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]

"""destroy and status say what is so: with damaged records, without a folder, on another host, for two at once."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from remoe_cli import recognise
from remoe_cli.artifacts import read_json, write_json
from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.local import lifecycle, place, processes
from remoe_cli.deploy.local.config import ChildrenRecord, HostRecord, SupervisorRecord
from remoe_cli.deploy.local.target import LocalTarget
from remoe_cli.errors import DeployError, HeldError, UsageError
from tests.deploy.local.test_lifecycle import MAIN, assert_gone, config, everything, invoke, root, start, until, with_main
from tests.support import forked

__all__ = ["root"]  # a fixture
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + MAIN.replace("os._exit(0)", "pass")


def stubborn(root: Path) -> dict[str, Any]:
    """A deployment with a worker, and with a main server that no end of its parent ends."""
    (root / "stubborn.py").write_text(STUBBORN)
    started = start(config(root, [sys.executable, str(root / "stubborn.py")]))
    invoke(started["endpoint"], 1)
    return started


def alive(found: Any) -> list[int]:
    return [process.pid for process in found[0] if processes.is_alive(process)]


def damage(*names: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes(b'{"schema_version": 7, ')

    return act


def unreadable(folder: Path) -> None:
    for name in ("supervisor.json", "children.json"):
        (folder / name).unlink()
        (folder / name).mkdir()  # root could read a file without permissions


@pytest.mark.parametrize(
    ("harm", "number"),
    [
        (damage("supervisor.json", "children.json", "twin.json", "host.json"), signal.SIGSTOP),
        (unreadable, signal.SIGKILL),
        (shutil.rmtree, signal.SIGSTOP),
        (shutil.rmtree, signal.SIGKILL),
    ],
    ids=["damaged records", "unreadable records", "folder is gone", "folder and supervisor are gone"],
)
def test_destroy_ends_what_no_record_tells_of(root: Path, harm: Callable[[Path], None], number: signal.Signals) -> None:
    started = stubborn(root)
    folder = lifecycle.state_dir("t")
    found = everything(folder)
    # A supervisor that does not run cannot help; the main server lives on.
    os.kill(started["pid"], number)
    until(lambda: processes.is_stopped(started["pid"]) or processes.start_time(started["pid"]) is None)
    harm(folder)
    assert alive(found)
    assert lifecycle.destroy("t") == []
    assert_gone(found)
    assert lifecycle.destroy("t") is None


def test_destroy_ends_the_processes_of_a_folder_that_it_does_not_know_and_leaves_the_files(root: Path) -> None:
    stubborn(root)
    folder = lifecycle.state_dir("t")
    found = everything(folder)
    damage("supervisor.json", "children.json", "twin.json", "host.json", ".remoe")(folder)
    with pytest.raises(UsageError, match="holds files that remoe did not make"):
        lifecycle.destroy("t")
    assert not alive(found) and (folder / "twin.json").exists()


def test_what_another_program_wrote_ends_no_process(root: Path) -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as bystander:
        folder = lifecycle.state_dir("t")
        folder.mkdir(parents=True)
        process = processes.reference(bystander.pid)
        assert process
        record = ChildrenRecord(children=(process,)).model_dump_json().replace("remoe.twin-children", "other.twin-children")
        (folder / "thesis.tex").write_text("years of work")
        (folder / "supervisor.json").write_text(
            SupervisorRecord(process=process, endpoint="http://127.0.0.1:1", groups=()).model_dump_json()
        )
        (folder / "children.json").write_text(record)
        with pytest.raises(UsageError, match="holds files that remoe did not make"):
            lifecycle.destroy("t")
        assert bystander.poll() is None
        bystander.kill()
    shutil.rmtree(folder)


def test_a_supervisor_ends_with_its_processes_when_its_folder_is_gone(root: Path) -> None:
    started = start(with_main(root))
    invoke(started["endpoint"], 1)
    folder = lifecycle.state_dir("t")
    found = everything(folder)
    shutil.rmtree(folder)
    until(lambda: not alive(found))
    assert [group for group in found[1] if group.exists()] == [] and not folder.exists()


def test_a_supervisor_ends_when_its_folder_is_another_one(root: Path) -> None:
    start(config(root))
    folder = lifecycle.state_dir("t")
    found = everything(folder)
    folder.rename(root / "moved")
    folder.mkdir()
    until(lambda: not alive(found))
    assert list(folder.iterdir()) == []


def test_destroying_nothing_is_no_error(root: Path) -> None:
    assert lifecycle.destroy("t") is None
    run = forked.remoe("destroy", "nobody")
    assert (run.returncode, run.stderr) == (0, "")
    assert " ".join(run.stdout.split()) == "There is no deployment named 'nobody' here: no file, and no process on this machine."
    gone = {"name": "nobody", "target": "local", "state": "absent", "left": [], "kept": [], "receipts": None}
    assert forked.document("destroy", "nobody") == gone
    start(config(root))
    assert " ".join(forked.remoe("destroy", "tt").stdout.split()).endswith(" on this machine. There are: t.")


def test_two_who_destroy_at_once_both_end_well(root: Path) -> None:
    start(with_main(root))
    found = everything(lifecycle.state_dir("t"))

    def destroy() -> str:
        try:
            return "nothing" if lifecycle.destroy("t") is None else "destroyed"
        except HeldError:
            return "held"

    with ThreadPoolExecutor(3) as pool:
        ends = sorted(each.result() for each in [pool.submit(destroy) for _ in range(3)])
    assert ends.count("destroyed") == 1 and set(ends) <= {"destroyed", "held", "nothing"}
    assert_gone(found)


def test_destroy_says_when_it_cannot_know_the_machine(root: Path) -> None:
    said: list[str] = []
    target = LocalTarget(replace(SILENT, say=said.append))
    for name, known in (("t", True), ("u", False)):
        start(config(root, name=name))
        if not known:
            (lifecycle.state_dir(name) / "host.json").unlink()
        assert target.destroy(name)["state"] == "destroyed"
        assert [line for line in said if "on which machine" in line] == ([] if known else said)
    assert len(said) == 1


def move(folder: Path, **changed: str) -> None:
    """Say that a deployment was started at another place."""
    record = read_json(folder / "host.json", HostRecord)
    write_json(folder / "host.json", HostRecord(place=record.place.model_copy(update=changed)), recognise.ANY)


def test_a_deployment_of_another_host_is_left_alone(root: Path) -> None:
    started = start(config(root))
    folder = lifecycle.state_dir("t")
    move(folder, host="elsewhere", machine="another", boot="another")
    for action in (lambda: lifecycle.destroy("t"), lambda: start(config(root))):
        with pytest.raises(DeployError, match=f"runs on the host 'elsewhere', and this is '{socket.gethostname()}'"):
            action()
    status = lifecycle.status("t")
    assert status["state"] == "elsewhere" and "'elsewhere'" in status["hint"]
    with pytest.raises(DeployError, match="it is elsewhere"):
        LocalTarget(SILENT).main_address("t")
    assert processes.start_time(started["pid"]) and (folder / "twin.json").exists()
    move(folder, **place.here().model_dump())


def test_a_deployment_of_another_container_of_this_machine_is_left_alone_while_it_runs(root: Path) -> None:
    started = start(config(root))
    folder = lifecycle.state_dir("t")
    move(folder, pid_namespace="pid:[1]", host="a-container")
    with pytest.raises(DeployError, match="another container of this machine, on the host 'a-container'"):
        lifecycle.destroy("t")
    assert lifecycle.status("t")["state"] == "elsewhere" and processes.start_time(started["pid"])
    os.kill(started["pid"], signal.SIGKILL)  # as when that container is gone
    until(lambda: lifecycle.status("t")["state"] == "dead")
    assert lifecycle.destroy("t") == []


def test_after_a_reboot_its_process_ids_are_others(root: Path) -> None:
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        folder = lifecycle.state_dir("t")
        folder.mkdir(parents=True)
        process = processes.reference(bystander.pid)
        assert process
        write_json(folder / "children.json", ChildrenRecord(children=(process,)))
        write_json(folder / "host.json", HostRecord(place=place.here().model_copy(update={"boot": "earlier"})))
        assert lifecycle.status("t")["state"] == "dead"
        assert lifecycle.destroy("t") == [] and bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_lock_and_a_pipe_of_whoever_deploys_are_free_afterwards(root: Path) -> None:
    lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT)
    os.set_inheritable(lock, True)  # as `flock lock remoe deploy ...` leaves it
    fcntl.flock(lock, fcntl.LOCK_EX)
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    started = start(with_main(root))
    invoke(started["endpoint"], 1)
    os.close(lock)
    os.close(writer)
    with (root / "lock").open() as again:
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.set_blocking(reader, False)
    assert os.read(reader, 1) == b""  # its end: nobody has it open
    os.close(reader)

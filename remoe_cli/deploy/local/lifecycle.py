"""Start, describe and destroy deployments of the local twin.

Each deployment has one directory, which holds everything about it: twin.json, supervisor.json, children.json, logs/, the files that
`start` was given, and the mark that says which these are (owned.py). A lock on the directory (flock) keeps two commands apart. A file
that remoe did not make is never deleted: `start` refuses the directory, and `destroy` leaves the file.
"""

from __future__ import annotations

import fcntl
import http.client
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from remoe_cli import bounded, cages, owned, recognise, settings
from remoe_cli.artifacts import read_json, write_json
from remoe_cli.deploy.console import SILENT, Console
from remoe_cli.deploy.local import processes
from remoe_cli.deploy.local.config import NAME_FORM, ChildrenRecord, MainConfig, ProcessRef, SupervisorRecord, TwinConfig
from remoe_cli.deploy.local.logs import last_lines
from remoe_cli.errors import ArtifactError, DeployError, HeldError, UsageError

FRONT_WAIT_S = 30.0
SHUTDOWN_WAIT_S = 10.0
_KIND = "deployment"
# Written while a deployment runs; the last is the folder in which workers run.
_WHILE_RUNNING = re.compile(r"(twin|supervisor|children)\.json|logs/(supervisor|main)\.log|logs/functions/[^/]+/[^/]+\.log|bundle/code/.+")
_BEFORE_RUNNING = re.compile(r"(plan|server)\.json|(bundle|main)/.+")  # of a deployment that was never recorded whole
_RECORDS = (("twin.json", "remoe.twin"), ("children.json", "remoe.twin-children"), ("plan.json", "remoe.plan"))


def state_root() -> Path:
    """Return the directory of all deployments, in $REMOE_STATE_DIR or the user's state directory."""
    return settings.state_dir() / "deployments"


def names() -> list[str]:
    """List the names of all deployments, running, dead or half made."""
    root = state_root()
    return sorted(entry.name for entry in root.iterdir() if _is_deployment(entry)) if root.is_dir() else []


def state_dir(name: str) -> Path:
    """Return the directory of deployment `name`, which need not exist.

    Raises: UsageError for a name that cannot be one.
    """
    if not re.fullmatch(NAME_FORM, name):
        raise UsageError(f"{name!r} cannot be the name of a deployment.", "Use lower-case letters, digits and hyphens, 50 at most.")
    return state_root() / name


def refuse_foreign(name: str) -> None:
    """Refuse a name whose directory holds files that remoe did not make.

    The name of a deployment that runs is not refused.

    Raises: UsageError for such a name, and for one that cannot be one.
    """
    folder = state_dir(name)
    owned.refuse_place(folder)
    if folder.is_dir() and not ((record := _record(folder)) and processes.is_alive(record.process)):
        owned.refuse_foreign(folder, _foreign(folder))


def start(
    name: str,
    prepare: Callable[[Path], TwinConfig],
    console: Console = SILENT,
    main_wait_s: float = 900.0,
) -> dict[str, Any]:
    """Start a deployment and return its status once the front and the main server answer.

    `prepare` gets the deployment's directory, writes files into it, and returns what to run. When anything fails, nothing is left.

    Raises: HeldError when the name is taken, UsageError when it cannot be a name or its directory holds files that remoe did not make,
    DeployError when something does not start.
    """
    folder = state_dir(name)
    refuse_foreign(name)
    with _locked(folder, make=True):
        if (record := _record(folder)) and processes.is_alive(record.process):
            raise HeldError(f"A deployment named '{name}' is running.", f"Run 'remoe destroy {name}', or choose another name.")
        refuse_foreign(name)
        _end_everything(folder)
        if not owned.read_mark(folder):
            owned.write_mark(folder, _KIND)  # first, so that an interruption leaves no files without it
        _delete_files(folder)
        owned.write_mark(folder, _KIND)
        try:
            config = prepare(folder)
            owned.write_mark(folder, _KIND, sealed=True)
            write_json(folder / "twin.json", config)
            with console.progress("Starting the supervisor"):
                _await_front(folder, _spawn_supervisor(folder))
            if isinstance(config.main, MainConfig):
                with console.progress("Loading the main server"):
                    _await_main(folder, config.main.port, main_wait_s)
            return _live_status(folder)
        except BaseException:
            _end_everything(folder)
            _delete(folder)
            raise


def status(name: str) -> dict[str, Any]:
    """Return the status document of a deployment.

    Where no supervisor answers, `state` is "deploying" or "dead", and `hint` says what to do.

    Raises: DeployError for an unknown name.
    """
    folder = known_dir(name)
    try:
        return _live_status(folder)
    except DeployError as error:
        state, hint = "dead", error.hint
    try:
        with _locked(folder, make=False):
            pass
    except HeldError as error:
        state, hint = "deploying", error.hint
    return {"name": name, "target": "local", "state": state, "endpoint": None, "main": None, "functions": [], "hint": hint}


def logs(name: str, function: str | None = None, lines: int = 50) -> dict[str, list[str]]:
    """Return the last `lines` lines of each log, by source, or only of `function`.

    Sources are `supervisor`, `main` and the functions that have run. Streams of one function follow each other in the order of their last
    line.

    Raises: DeployError for an unknown name or source.
    """
    folder = known_dir(name) / "logs"
    sources = {path.stem: [path] for path in (folder / "supervisor.log", folder / "main.log") if path.exists()}
    if (folder / "functions").is_dir():
        for entry in sorted((folder / "functions").iterdir()):
            sources[entry.name] = sorted(entry.iterdir(), key=lambda path: path.stat().st_mtime)
    if function is not None and function not in sources:
        message = f"Deployment '{name}' has no log of '{function}'; there are: {', '.join(sources)}."
        raise DeployError(message, "A function logs from its first call on.")
    chosen = sources if function is None else {function: sources[function]}
    return {source: [line for path in paths for line in last_lines(path, lines)][-lines:] for source, paths in chosen.items()}


def destroy(name: str) -> list[Path]:
    """End every process of a deployment and remove its groups and files, in whatever state it is.

    The files that are kept are returned: these are the files in its directory that remoe did not make.

    Raises: DeployError for an unknown name or when a process survives, HeldError while another process deploys or destroys it.
    """
    folder = known_dir(name)
    with _locked(folder, make=False):
        record = _record(folder)
        if record and processes.is_alive(record.process):
            with suppress(OSError, http.client.HTTPException):
                _call(_port(record), "POST", "/remoe/shutdown")
                processes.await_end([record.process], SHUTDOWN_WAIT_S)
        _end_everything(folder)
        return _delete(folder)


def _end_everything(folder: Path) -> None:
    """Kill what is left: first the supervisor, which starts others, then its children and groups."""
    record = _record(folder)
    left: tuple[ProcessRef, ...] = processes.end([record.process]) if record else ()
    with suppress(ArtifactError):
        left += processes.end(read_json(folder / "children.json", ChildrenRecord).children)
    groups = [Path(group) for group in record.groups] if record else []
    kept = [group for group in groups if not cages.remove(group)]
    if left or kept:
        what = ", ".join([f"process {process.pid}" for process in left] + [f"group {group}" for group in kept])
        message = f"The deployment in {folder} could not be ended completely: {what} is left."
        raise DeployError(message, "End it by hand, then run the command again.")


def _spawn_supervisor(folder: Path) -> ProcessRef:
    """Start the supervisor in its own session, and record it before it has written anything itself."""
    log = folder / "logs" / "supervisor.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "remoe_cli.deploy.local.supervisor", str(folder)],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    supervisor = processes.reference(pid)
    if supervisor is None:
        raise _log_error("The supervisor ended at once", log)
    write_json(folder / "children.json", ChildrenRecord(children=(supervisor,)))
    return supervisor


def _await_front(folder: Path, supervisor: ProcessRef) -> None:
    give_up = time.monotonic() + FRONT_WAIT_S
    while not _record(folder):
        if not processes.is_alive(supervisor):
            raise _log_error("The supervisor ended before it served", folder / "logs" / "supervisor.log")
        if time.monotonic() > give_up:
            raise _log_error(f"The supervisor did not serve within {FRONT_WAIT_S:.0f} s", folder / "logs" / "supervisor.log")
        time.sleep(0.02)


def _await_main(folder: Path, port: int, wait_s: float) -> None:
    give_up = time.monotonic() + wait_s
    while True:
        main = _live_status(folder)["main"]
        if main["restarts"] or main["state"] not in ("starting", "running"):
            raise _log_error("The main server ended before it was ready", folder / "logs" / "main.log")
        with suppress(OSError, http.client.HTTPException):
            if main["state"] == "running" and _call(port, "GET", "/ping")[0] == 200:
                return
        if time.monotonic() > give_up:
            raise _log_error(f"The main server was not ready within {wait_s:.0f} s", folder / "logs" / "main.log")
        time.sleep(0.05)


def _live_status(folder: Path) -> dict[str, Any]:
    record = _record(folder)
    if record and processes.is_alive(record.process):
        with suppress(OSError, ValueError, http.client.HTTPException):
            document: dict[str, Any] = bounded.parse_json(_call(_port(record), "GET", "/remoe/status")[1])
            return {**document, "endpoint": record.endpoint}
    hint = f"Run 'remoe destroy {folder.name}', then deploy again."
    raise _log_error(f"The supervisor of deployment '{folder.name}' is gone", folder / "logs" / "supervisor.log", hint)


def _log_error(what: str, log: Path, hint: str = "Nothing is left of it; fix what the log says and deploy again.") -> DeployError:
    lines = last_lines(log, 12)
    tail = f"; the last lines of its log are:\n{os.linesep.join(lines)}" if lines else "; its log is empty."
    return DeployError(f"{what}{tail}", hint)


def _record(folder: Path) -> SupervisorRecord | None:
    with suppress(ArtifactError):
        return read_json(folder / "supervisor.json", SupervisorRecord)
    return None


def _port(record: SupervisorRecord) -> int:
    return int(record.endpoint.rpartition(":")[2])


def _call(port: int, method: str, path: str) -> tuple[int, bytes]:
    """Call a server on loopback, past any proxy that the environment names."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, bounded.read_stream(response, bounded.RESPONSE)
    finally:
        connection.close()


def known_dir(name: str) -> Path:
    """Return the directory of a deployment that exists.

    Raises: DeployError when there is none of this name, UsageError for a name that cannot be one.
    """
    folder = state_dir(name)
    owned.refuse_place(folder)
    if folder.is_dir() and not _is_deployment(folder):
        owned.refuse_foreign(folder, _foreign(folder))
    if not folder.is_dir():
        known = names()
        others = f"there are: {', '.join(known)}" if known else "no deployment runs here"
        raise DeployError(f"There is no deployment named '{name}'; {others}.", "Make one with 'remoe deploy PLAN --target local'.")
    return folder


def _is_deployment(folder: Path) -> bool:
    """Return whether remoe made this directory for a deployment; one that was killed at its very start has left no file in it."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    mark = owned.read_mark(folder)
    return (mark is not None and mark.kind == _KIND) or not owned.foreign_files(folder, lambda name: False) or _has_records(folder)


def _has_records(folder: Path) -> bool:
    """Return whether the directory is a deployment of a version of remoe without marks."""
    return any((folder / name).is_file() and recognise.document(schema).recognises(folder / name) for name, schema in _RECORDS)


def _foreign(folder: Path) -> list[str]:
    """List the files in a directory that remoe did not make for a deployment."""
    if not _is_deployment(folder):
        return owned.foreign_files(folder, lambda name: False)
    mark = owned.read_mark(folder)
    prepared = set(mark.files) if mark and mark.files is not None else None

    def ours(name: str) -> bool:
        return bool(_WHILE_RUNNING.fullmatch(name)) or (name in prepared if prepared is not None else bool(_BEFORE_RUNNING.fullmatch(name)))

    return owned.foreign_files(folder, ours)


def _delete_files(folder: Path) -> list[Path]:
    """Delete what remoe made of a deployment except the mark, and return what is kept; the directory itself stays, as it is the lock."""
    kept = [folder / name for name in _foreign(folder)]
    for _, path in list(owned.files_of(folder)):
        if path not in kept and path != folder / owned.MARK:
            path.unlink()
    for parent, _, _ in os.walk(folder, topdown=False):
        if Path(parent) != folder:
            with suppress(OSError):  # it holds what is kept
                os.rmdir(parent)
    return kept


def _delete(folder: Path) -> list[Path]:
    """Delete what remoe made of a deployment, its directory too unless it holds other files; return these."""
    kept = _delete_files(folder)
    (folder / owned.MARK).unlink(missing_ok=True)
    if not kept:
        folder.rmdir()
    return kept


@contextmanager
def _locked(folder: Path, make: bool) -> Iterator[None]:
    """Hold the lock of a deployment's directory. Raises: HeldError when another process has it."""
    descriptor = _lock(folder, make)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path, make: bool) -> int:
    while True:
        if make:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            raise DeployError(f"The deployment '{folder.name}' was just removed by another process.", "Nothing is left to do.") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            message = f"Another process is deploying or destroying '{folder.name}'."
            raise HeldError(message, "Wait until it is done, then try again.") from None
        with suppress(FileNotFoundError):
            if folder.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)  # the directory was removed between open and lock

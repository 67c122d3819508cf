"""Start, describe and destroy deployments of the local twin.

Each deployment has one directory, which holds everything about it: twin.json, host.json, supervisor.json, children.json, logs/, scratch/,
the files that `start` was given, and the mark that says which these are (folder.py). A lock on the directory (flock) keeps two commands
apart. Its processes carry its name (place.py), so that they are found when no file tells of them.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from remoe_cli import bounded, cages, owned, settings
from remoe_cli.artifacts import read_json, write_json
from remoe_cli.deploy.console import SILENT, Console
from remoe_cli.deploy.local import folder as folders
from remoe_cli.deploy.local import place, processes
from remoe_cli.deploy.local.config import NAME_FORM, ChildrenRecord, HostRecord, MainConfig, ProcessRef, SupervisorRecord, TwinConfig
from remoe_cli.deploy.local.logs import last_lines
from remoe_cli.errors import ArtifactError, DeployError, HeldError, NoDeploymentError, UsageError
from remoe_cli.runtime import peers

FRONT_WAIT_S = 30.0
SHUTDOWN_WAIT_S = 10.0
_ANSWER_S = 5.0  # a supervisor answers in milliseconds
_ROUNDS = 5  # of looking for processes that were started while others were ended


class _Down(DeployError):
    """A deployment does not answer. `state` is the one that status shows."""

    def __init__(self, state: str, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.state = state


def state_root() -> Path:
    """Return the directory of all deployments, in $REMOE_STATE_DIR or the user's state directory."""
    return settings.state_dir() / "deployments"


def names() -> list[str]:
    """List the names of all deployments, running, dead or half made, and of folders that cannot be read."""
    root = state_root()
    return sorted(entry.name for entry in root.iterdir() if _may_be(entry)) if root.is_dir() else []


def _may_be(entry: Path) -> bool:
    """Return whether an entry is a deployment, or could be one if it could be read."""
    try:
        return bool(re.fullmatch(NAME_FORM, entry.name)) and folders.is_deployment(entry)
    except OSError:
        return True


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
    if folder.is_dir() and not _supervisor(folder):
        owned.refuse_foreign(folder, folders.foreign(folder))


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
    with folders.locked(folder, make=True):
        place.refuse_elsewhere(folder)
        if _supervisor(folder):
            raise HeldError(f"A deployment named '{name}' is running.", f"Run 'remoe destroy {name}', or choose another name.")
        refuse_foreign(name)
        _end_everything(folder)
        if not owned.read_mark(folder):
            owned.write_mark(folder, folders.KIND)  # first, so that an interruption leaves no files without it
        folders.delete_files(folder)
        owned.write_mark(folder, folders.KIND)
        try:
            config = prepare(folder)
            owned.write_mark(folder, folders.KIND, sealed=True)
            write_json(folder / "twin.json", config)
            write_json(folder / place.RECORD, HostRecord(place=place.here()))
            with console.progress("Starting the supervisor"):
                _await_front(folder, _spawn_supervisor(folder))
            if isinstance(config.main, MainConfig):
                with console.progress("Loading the main server"):
                    _await_main(folder, main_wait_s)
            return _live_status(folder)
        except BaseException:
            _end_everything(folder)
            folders.delete(folder)
            raise


def status(name: str) -> dict[str, Any]:
    """Return the status document of a deployment.

    Where no supervisor answers, `state` is deploying, dead, stopped, silent or elsewhere, and `hint` says what to do.

    Raises: NoDeploymentError for an unknown name.
    """
    folder = known_dir(name)
    try:
        place.refuse_elsewhere(folder)
        return _live_status(folder)
    except _Down as error:
        state, hint = error.state, error.hint
    except DeployError as error:
        state, hint = "elsewhere", f"{error.message} {error.hint}"
    if state == "dead":
        try:
            with folders.locked(folder, make=False):
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


def destroy(name: str) -> list[Path] | None:
    """End every process of a deployment and remove its groups and files, in whatever state it is.

    The files that are kept are returned: these are the files in its directory that remoe did not make. None: there was nothing.

    Raises: DeployError when it runs on another host or a process survives, HeldError while another process deploys or destroys it.
    """
    folder = state_dir(name)
    owned.refuse_place(folder)
    if not folder.is_dir() or not folders.is_deployment(folder):
        found = bool(place.labelled(folder))
        _end_everything(folder, believed=False)
        if folder.is_dir():
            owned.refuse_foreign(folder, folders.foreign(folder))
        return [] if found else None
    folders.refuse_others(folder)
    try:
        with folders.locked(folder, make=False):
            place.refuse_elsewhere(folder)
            if record := _supervisor(folder):
                with suppress(ProcessLookupError):
                    os.kill(record.process.pid, signal.SIGTERM)
                processes.await_end([record.process], SHUTDOWN_WAIT_S, unless_stopped=True)
            _end_everything(folder)
            return folders.delete(folder)
    except folders.Removed:
        return None


def _end_everything(folder: Path, believed: bool = True) -> None:
    """Kill what is left: first the supervisor, which starts others, then all its processes and groups.

    Unless the folder's files are `believed`, only what carries its label is ended: another program may have written them.
    """
    left: tuple[ProcessRef, ...] = ()
    record = _record(folder) if believed else None
    if believed and place.processes_are_known(folder):
        left = processes.end([record.process]) if record else ()
        with suppress(ArtifactError):
            left += processes.end(read_json(folder / "children.json", ChildrenRecord).children)
    for _ in range(_ROUNDS):
        if not (found := place.labelled(folder)):
            break
        processes.end(found)
    groups = [Path(group) for group in record.groups] if record else cages.named(place.label(folder))
    kept = [group for group in groups if not cages.remove(group)]
    left = tuple(dict.fromkeys((*filter(processes.is_alive, left), *place.labelled(folder))))
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
        # -P: nothing is imported from the current folder, which others may have written.
        [sys.executable, "-P", "-m", "remoe_cli.deploy.local.supervisor", str(folder)],
        place.environment(folder),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
            *((os.POSIX_SPAWN_CLOSE, descriptor) for descriptor in _inherited()),
        ],
        setsid=True,
    )
    supervisor = processes.reference(pid)
    if supervisor is None:
        raise _log_error("The supervisor ended at once", log)
    write_json(folder / "children.json", ChildrenRecord(children=(supervisor,)))
    return supervisor


def _inherited() -> list[int]:
    """List what a child would inherit besides 0 to 2: locks and pipes of whoever runs this command."""
    found = []
    for entry in os.listdir("/dev/fd"):
        with suppress(OSError):  # the one of this listing is closed by now
            if int(entry) > 2 and os.get_inheritable(int(entry)):
                found.append(int(entry))
    return found


def _await_front(folder: Path, supervisor: ProcessRef) -> None:
    give_up = time.monotonic() + FRONT_WAIT_S
    while not _record(folder):
        if not processes.is_alive(supervisor):
            raise _log_error("The supervisor ended before it served", folder / "logs" / "supervisor.log")
        if time.monotonic() > give_up:
            raise _log_error(f"The supervisor did not serve within {FRONT_WAIT_S:.0f} s", folder / "logs" / "supervisor.log")
        time.sleep(0.02)


def _await_main(folder: Path, wait_s: float) -> None:
    give_up = time.monotonic() + wait_s
    while (main := _live_status(folder)["main"])["state"] != "running":
        if main["restarts"] or main["state"] not in ("starting", "loading", "stopped"):
            raise _log_error("The main server ended before it was ready", folder / "logs" / "main.log")
        if time.monotonic() > give_up:
            raise _log_error(f"The main server was not ready within {wait_s:.0f} s", folder / "logs" / "main.log")
        time.sleep(0.05)


def _live_status(folder: Path) -> dict[str, Any]:
    """Ask the supervisor. Raises: _Down when it does not answer."""
    destroy = f"'remoe destroy {folder.name}'"
    if (record := _supervisor(folder)) is None:
        error = _log_error(f"The supervisor of deployment '{folder.name}' is gone", folder / "logs" / "supervisor.log")
        raise _Down("dead", error.message, f"Run {destroy}, then deploy again.")
    pid = record.process.pid
    if processes.is_stopped(pid):
        hint = f"Run 'kill -CONT {pid}' to let it go on, or {destroy} to end it."
        raise _Down("stopped", f"The supervisor of deployment '{folder.name}' is stopped (process {pid}).", hint)
    try:
        document: dict[str, Any] = bounded.parse_json(_ask_status(int(record.endpoint.rpartition(":")[2])))
        return {**document, "endpoint": record.endpoint}
    except (OSError, ValueError, http.client.HTTPException, DeployError) as error:
        message = f"The supervisor of deployment '{folder.name}' does not answer (process {pid}): {error}"
        raise _Down("silent", message, f"Try again; {destroy} ends it.") from None


def _log_error(what: str, log: Path) -> DeployError:
    lines = last_lines(log, 12)
    tail = f"; the last lines of its log are:\n{os.linesep.join(lines)}" if lines else "; its log is empty."
    with suppress(OSError):
        if not os.statvfs(log.parents[1]).f_bavail:
            tail += " The disk is full."
    return DeployError(f"{what}{tail}", "Nothing is left of it; fix what the log says and deploy again.")


def _record(folder: Path) -> SupervisorRecord | None:
    with suppress(ArtifactError):
        return read_json(folder / "supervisor.json", SupervisorRecord)
    return None


def _supervisor(folder: Path) -> SupervisorRecord | None:
    """Return the record of a supervisor that lives here; None when there is none."""
    record = _record(folder)
    return record if record and place.processes_are_known(folder) and processes.is_alive(record.process) else None


def _ask_status(port: int) -> bytes:
    """Get the status of a supervisor of this user on loopback, past any proxy that the environment names."""
    peers.require_own_listener("127.0.0.1", port)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_S)
    try:
        connection.request("GET", "/remoe/status")
        return bounded.read_stream(connection.getresponse(), bounded.RESPONSE)
    finally:
        connection.close()


def known_dir(name: str) -> Path:
    """Return the directory of a deployment that exists.

    Raises: NoDeploymentError when there is none of this name, UsageError for a name that cannot be one.
    """
    folder = state_dir(name)
    owned.refuse_place(folder)
    if folder.is_dir() and not folders.is_deployment(folder):
        owned.refuse_foreign(folder, folders.foreign(folder))
    if not folder.is_dir():
        known = names()
        others = f"there are: {', '.join(known)}" if known else "no deployment runs here"
        raise NoDeploymentError(f"There is no deployment named '{name}'; {others}.", "Make one with 'remoe deploy PLAN --target local'.")
    folders.refuse_others(folder)
    return folder

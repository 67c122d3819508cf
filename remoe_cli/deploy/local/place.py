"""Where a deployment's processes run, and how they are found when no record tells of them.

A deployment's folder may be on a home that several machines share, or in a container's volume. There its process ids say nothing here.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import site
import socket
from contextlib import suppress
from pathlib import Path

from remoe_cli.artifacts import read_json
from remoe_cli.deploy.local.config import HostRecord, Place, ProcessRef
from remoe_cli.deploy.local.processes import reference
from remoe_cli.errors import ArtifactError, DeployError

LABEL = "REMOE_DEPLOYMENT"  # in the environment of every process of a deployment: its folder
LOCK = "supervisor.lock"
RECORD = "host.json"


def here() -> Place:
    return Place(
        host=socket.gethostname(),
        machine=_content(Path("/etc/machine-id")),
        boot=_content(Path("/proc/sys/kernel/random/boot_id")),
        pid_namespace=_link(Path("/proc/self/ns/pid")),
    )


def hold(folder: Path) -> int:
    """Take the lock that says, to all processes of this kernel, that the supervisor lives.

    Its descriptor is returned, and holds it.

    Raises: DeployError when another supervisor has it.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DeployError(f"Another supervisor runs the deployment in {folder}.", "Destroy it first.") from None
    return descriptor


def recorded(folder: Path) -> Place | None:
    """Return where a deployment was started; None when its folder does not say."""
    with suppress(ArtifactError):
        return read_json(folder / RECORD, HostRecord).place
    return None


def refuse_elsewhere(folder: Path) -> None:
    """Refuse a deployment whose processes run where this process does not see them.

    Raises: DeployError that names the place.
    """
    place, own = recorded(folder), here()
    if place is None or place == own:
        return
    hint = f"Run the command there. If that place does not exist any more, delete the folder {folder} first."
    if place.boot != own.boot and (place.host, place.machine) != (own.host, own.machine):
        raise DeployError(f"The deployment '{folder.name}' runs on the host '{place.host}', and this is '{own.host}'.", hint)
    if place.boot == own.boot and place.pid_namespace != own.pid_namespace and _is_held(folder):
        raise DeployError(f"The deployment '{folder.name}' runs in another container of this machine, on the host '{place.host}'.", hint)


def processes_are_known(folder: Path) -> bool:
    """Return whether the process ids in a deployment's records are of this place and boot."""
    place, own = recorded(folder), here()
    return place is None or (place.boot, place.pid_namespace) == (own.boot, own.pid_namespace)


def label(folder: Path) -> str:
    """Name the control group of a deployment; no other deployment has it, in whatever state directory."""
    return f"remoe-{folder.name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"


def labelled(folder: Path) -> tuple[ProcessRef, ...]:
    """Find the processes of this user that carry a deployment's label, whatever its files say."""
    wanted = os.fsencode(f"{LABEL}={folder.resolve()}")
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if entry.stat().st_uid == os.geteuid() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(reference(int(entry.name)))
    return tuple(process for process in found if process and process.pid != os.getpid())


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a deployment's own programs: this process's, and the label.

    Where the folder of user packages belongs to somebody else, Python does not use it.
    """
    own = dict(os.environ) | {LABEL: str(folder.resolve())}
    with suppress(OSError):
        if site.ENABLE_USER_SITE and os.stat(site.getusersitepackages()).st_uid == os.geteuid():
            return own
    return own | {"PYTHONNOUSERSITE": "1"}


def _is_held(folder: Path) -> bool:
    with suppress(OSError):
        descriptor = os.open(folder / LOCK, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""

"""The files of a deployment's folder: which of them are remoe's, who may touch them, and their end.

A file that remoe did not make is never deleted. The folder belongs to one user, and nobody else may even look into it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from remoe_cli import owned, recognise
from remoe_cli.errors import DeployError, HeldError

KIND = "deployment"
# Written while a deployment runs; the last is the folder in which workers run.
_WHILE_RUNNING = re.compile(
    r"(twin|supervisor|children|host)\.json|supervisor\.lock|logs/(supervisor|main)\.log|logs/functions/[^/]+/[^/]+\.log|bundle/code/.+"
)
_BEFORE_RUNNING = re.compile(r"(plan|server)\.json|(bundle|main)/.+")  # of a deployment that was never recorded whole
_RECORDS = (("twin.json", "remoe.twin"), ("children.json", "remoe.twin-children"), ("plan.json", "remoe.plan"))
_SCRATCH = re.compile(r"\d{8}T\d{6}-[0-9a-f]{12}")  # the folder of one worker, which is all its own


class Removed(DeployError):
    """Another process has removed the directory meanwhile."""


def is_deployment(folder: Path) -> bool:
    """Return whether remoe made this directory for a deployment.

    One that was killed at its very start has left no file in it.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    mark = owned.read_mark(folder)
    return (mark is not None and mark.kind == KIND) or not owned.foreign_files(folder, lambda name: False) or _has_records(folder)


def _has_records(folder: Path) -> bool:
    """Return whether the directory is a deployment of a version of remoe without marks."""
    return any((folder / name).is_file() and recognise.document(schema).recognises(folder / name) for name, schema in _RECORDS)


def foreign(folder: Path) -> list[str]:
    """List the files in a directory that remoe did not make for a deployment."""
    if not is_deployment(folder):
        return owned.foreign_files(folder, lambda name: False)
    mark = owned.read_mark(folder)
    prepared = set(mark.files) if mark and mark.files is not None else None

    def ours(name: str) -> bool:
        return bool(_WHILE_RUNNING.fullmatch(name)) or (name in prepared if prepared is not None else bool(_BEFORE_RUNNING.fullmatch(name)))

    within = tuple(f"scratch/{scratch.name}/" for scratch in _scratch_folders(folder))  # any kind of file may be there
    return [name for name in owned.foreign_files(folder, ours) if not name.startswith(within)]


def _scratch_folders(folder: Path) -> list[Path]:
    """List the folders that workers had instead of /tmp. No link is followed."""
    scratch = folder / "scratch"
    if scratch.is_symlink() or not scratch.is_dir():
        return []
    return [Path(entry.path) for entry in os.scandir(scratch) if _SCRATCH.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]


def refuse_others(folder: Path) -> None:
    """Refuse the folder of another user, whose files could name any process.

    Raises: DeployError for such a folder.
    """
    if folder.stat().st_uid != os.geteuid():
        raise DeployError(f"{folder} belongs to another user.", "Run the command as that user, or set REMOE_STATE_DIR.")


def delete_files(folder: Path) -> list[Path]:
    """Delete what remoe made of a deployment except the mark, and return what is kept.

    The directory itself stays, as it is the lock.
    """
    for scratch in _scratch_folders(folder):
        shutil.rmtree(scratch)
    kept = [folder / name for name in foreign(folder)]
    for _, path in list(owned.files_of(folder)):
        if path not in kept and path != folder / owned.MARK:
            path.unlink()
    for parent, _, _ in os.walk(folder, topdown=False):
        if Path(parent) != folder:
            with suppress(OSError):  # it holds what is kept
                os.rmdir(parent)
    return kept


def delete(folder: Path) -> list[Path]:
    """Delete what remoe made of a deployment, its directory too unless it holds other files; return these."""
    kept = delete_files(folder)
    (folder / owned.MARK).unlink(missing_ok=True)
    if not kept:
        folder.rmdir()
    return kept


@contextmanager
def locked(folder: Path, make: bool) -> Iterator[None]:
    """Hold the lock of a deployment's directory.

    Raises: HeldError when another process has it, Removed when there is no such directory any more.
    """
    descriptor = _lock(folder, make)
    try:
        refuse_others(folder)
        if os.fstat(descriptor).st_mode & 0o077:
            os.fchmod(descriptor, 0o700)
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
            raise Removed(f"The deployment '{folder.name}' was just removed by another process.", "Nothing is left to do.") from None
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

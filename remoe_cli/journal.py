"""Files of JSON lines to which several processes append, and which stay bounded.

A line is written whole, under a lock on the file, so that those of several writers do not mix. A writer that dies within a line leaves it
without an end. The next writer ends it, and readers leave it out and say so. A file that is full is renamed with a number, and a new one
begins; where there are too many, the oldest is deleted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remoe_cli import bounded, owned
from remoe_cli.errors import ArtifactError, UsageError

KIND = "receipts"
_LINE = bounded.Limit(8 * bounded.MIB)
_HINT = "Move it elsewhere: remoe then makes its own."


@dataclass(frozen=True)
class Journal:
    """The files `name.jsonl` and, before it, `name-000001.jsonl` and so on, of a folder.

    most_bytes   of one file, but for its last line
    files        how many of them are kept; the oldest lines go with the file that is one too many
    """

    folder: Path
    name: str
    most_bytes: int = 64 * bounded.MIB
    files: int = 16

    @property
    def path(self) -> Path:
        """The file to which lines are appended now."""
        return self.folder / f"{self.name}.jsonl"

    def full(self) -> list[Path]:
        """List the files that are full, the oldest first."""
        form = re.compile(rf"{re.escape(self.name)}-(\d{{6,}})\.jsonl")
        found = [(int(match[1]), path) for path in self.folder.glob(f"{self.name}-*.jsonl") if (match := form.fullmatch(path.name))]
        return [path for _, path in sorted(found)]


def append(journal: Journal, text: str) -> None:
    """Append one line.

    Raises: UsageError for a folder or a file that remoe did not make, OSError for a full disk and its like.
    """
    content = text.encode() + b"\n"
    _own_folder(journal.folder)
    while True:
        with _locked(journal.path) as descriptor:
            if not _is(journal.path, descriptor):
                continue  # another writer has renamed it meanwhile
            size = os.fstat(descriptor).st_size
            if size and size + len(content) > journal.most_bytes:
                _begin_another(journal)
                continue
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                content = b"\n" + content  # ends a line whose writer died
            while content:
                content = content[os.write(descriptor, content) :]
            return


def lines(journal: Journal, damaged: Callable[[str], None] = lambda where: None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the content of each line that is there now, the oldest first.

    `damaged` is called with the place of a line that is no whole JSON object.

    Raises: ArtifactError for what is no file, and for a file that is larger than any that `append` makes.
    """
    seen: set[tuple[int, int]] = set()
    most = bounded.Limit(journal.most_bytes + _LINE.bytes)
    # The current one first: it may be renamed while the others are read.
    opened = [(journal.path, _open(journal.path, most))]
    try:
        opened = [*((path, _open(path, most)) for path in journal.full()), *opened]
        for path, file in opened:
            if file is None or (identity := _identity(file.fileno())) in seen:
                continue
            seen.add(identity)
            yield from _lines_of(path, file, damaged)
    finally:
        for _, file in opened:
            if file is not None:
                file.close()


def _lines_of(path: Path, file: Any, damaged: Callable[[str], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of one file as far as it is written now: a writer may be within its next line."""
    fcntl.flock(file, fcntl.LOCK_SH)
    left = os.fstat(file.fileno()).st_size
    fcntl.flock(file, fcntl.LOCK_UN)
    number = 0
    while left > 0 and (line := file.readline(min(left, _LINE.bytes))):
        number, left = number + 1, left - len(line)
        try:
            entry = bounded.parse_json(line, _LINE) if line.endswith(b"\n") else None
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            yield f"{path}:{number}", entry
        else:
            damaged(f"{path}:{number}")


def _open(path: Path, most: bounded.Limit) -> Any:
    try:
        if path.is_symlink():
            raise bounded.LimitError(errno.ELOOP, "it is a link, and remoe does not follow links")
        bounded.check_bytes(path.lstat().st_size, most)
        return bounded.open_file(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.", _HINT) from None


def _identity(descriptor: int) -> tuple[int, int]:
    state = os.fstat(descriptor)
    return state.st_dev, state.st_ino


def _is(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        state = path.lstat()
        return (state.st_dev, state.st_ino) == _identity(descriptor)
    return False


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Open a file to append to it, and hold its lock."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UsageError(f"{path} is not a file of remoe.", _HINT)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _own_folder(folder: Path) -> None:
    """Make the folder, for its owner only, where there is none."""
    owned.refuse_place(folder)
    if (mark := owned.read_mark(folder)) and mark.kind == KIND:
        return
    if folder.exists():
        owned.refuse_foreign(folder, owned.foreign_files(folder, lambda name: False))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    owned.write_mark(folder, KIND)


def _begin_another(journal: Journal) -> None:
    """Rename the current file, whose lock is held, and delete the oldest ones."""
    full = journal.full()
    number = int(full[-1].stem.rpartition("-")[2]) + 1 if full else 1
    journal.path.rename(journal.folder / f"{journal.name}-{number:06d}.jsonl")
    for path in journal.full()[: -journal.files + 1 or None]:
        path.unlink()

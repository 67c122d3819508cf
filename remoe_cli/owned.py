"""What remoe may replace and delete: only what remoe made.

Every file and folder that it writes goes through this module.

A file is replaced when it is empty, or when its own content says that remoe made such a file (recognise.py). A folder carries a mark: the
file `.remoe` names the kind of folder and the files that remoe put into it. It is replaced when it holds these files and no others, as they
were. Links, devices and pipes are never followed or replaced.

New content is built beside the old one, under a name such as `.plan.json.remoe-1a2b3c4d`, and renamed. So an interruption leaves the old
content or the new one. Who builds holds a lock on what is built; what an interruption has left has no lock, and the next call removes it.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remoe_cli import bounded
from remoe_cli.errors import UsageError
from remoe_cli.recognise import ANY, NONE, Made, document, read_object

MARK = ".remoe"
_HINT = "Move that elsewhere, or give an empty or new folder."
_SCHEMA = "remoe.folder/1"
_TEMPORARY = ".remoe-"
_ASIDE = "old"  # after _TEMPORARY: the old folder, where the system cannot swap two folders at once
_LEFT_BEHIND = re.compile(r"\..+\.remoe-(old|[a-z0-9_]{8})")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


# Files


def refuse_file(path: Path, made: Made) -> None:
    """Refuse a path where writing a file would replace something that remoe did not make.

    Raises: UsageError for such a path, and for one where no file can be written.
    """
    hint = "Give another name."
    _refuse_parent(path, hint)
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise UsageError(f"{path} is a link, and remoe does not replace links.", hint)
    if stat.S_ISDIR(mode):
        raise UsageError(f"{path} is a folder, not a file.", hint)
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} is a device or a pipe, not a file.", hint)
    if path.stat().st_size and not _recognised(path, made):
        raise UsageError(f"{path} exists, and it is not a {made.what} that remoe made.", f"{hint[:-1]}, or move the file away.")


def is_made(path: Path, made: Made) -> bool:
    """Return whether there is a file that is no link, and that remoe made."""
    return not path.is_symlink() and path.is_file() and _recognised(path, made)


@contextmanager
def writing(path: Path, made: Made, like: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a temporary path beside `path`.

    On success the file there replaces `path`; on failure it is removed. It has the rights that the umask leaves, but none that the file
    before it, or one of the files `like` from which its content comes, does not give.

    Raises: UsageError where `refuse_file` does.
    """
    refuse_file(path, made)
    place = _place(path)
    like = [*like, *([place] if place.exists() else [])]
    clean(path)
    temporary, descriptor = _temporary(place, tempfile.mkstemp)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(_rights(0o666, like))
        refuse_file(path, made)
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file to a new path, with no more rights than the file has.

    Raises: OSError for a source that is no file or cannot be read, UsageError where `refuse_file` does.
    """
    with bounded.open_file(source) as file, writing(target, NONE, [source]) as temporary, temporary.open("wb") as out:
        shutil.copyfileobj(file, out)


def _rights(most: int, like: Iterable[Path]) -> int:
    """Return the rights `most` without those that the umask, or one of the files `like`, does not give; the owner keeps his."""
    rights = most & ~_umask()
    for path in like:
        rights &= stat.S_IMODE(path.stat().st_mode) | stat.S_IRUSR | stat.S_IWUSR | (most & stat.S_IXUSR)
    return rights


def _umask() -> int:
    """Return the umask of this process; os.umask would have to change it, and other threads write files meanwhile."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(next(line for line in status.splitlines() if line.startswith("Umask:")).split()[1], 8)
    except (OSError, StopIteration):
        os.umask(mask := os.umask(0o077))
        return mask


def delete_file(path: Path, made: Made) -> None:
    """Delete a file if there is one.

    Raises: UsageError when remoe did not make it.
    """
    refuse_file(path, made)
    path.unlink(missing_ok=True)


# Folders


@dataclass(frozen=True)
class Mark:
    """The content of a folder's `.remoe`.

    kind    what the folder is, in the words of messages, such as "package"
    files   by name within the folder, the size in bytes and the time of last change in ns; None while remoe still writes the folder
    """

    kind: str
    files: Mapping[str, tuple[int, int]] | None


def read_mark(folder: Path) -> Mark | None:
    """Read a folder's mark; None when it has none."""
    path = folder / MARK
    if path.is_symlink() or not path.is_file():
        return None
    try:
        data = read_object(path)
        if data["schema_version"] != _SCHEMA:
            return None
        files = data["files"]
        return Mark(str(data["kind"]), files if files is None else {name: (size, time_ns) for name, (size, time_ns) in files.items()})
    except (OSError, KeyError, ValueError, TypeError, AttributeError):
        return None


def write_mark(folder: Path, kind: str, sealed: bool = False) -> None:
    """Mark a folder as remoe's; with `sealed`, also record the files that it holds now."""
    files = {name: _state(path) for name, path in files_of(folder) if name != MARK} if sealed else None
    text = json.dumps({"schema_version": _SCHEMA, "kind": kind, "files": files}, indent=1) + "\n"
    with writing(folder / MARK, ANY if read_mark(folder) else document("remoe.folder")) as temporary:
        temporary.write_text(text, encoding="utf-8")


def files_of(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield everything in a folder but folders, by name within it. Links are yielded, and not followed."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from ((f"{entry.name}/{name}", path) for name, path in files_of(Path(entry.path)))
            else:
                yield entry.name, Path(entry.path)


def foreign_files(folder: Path, ours: Callable[[str], bool]) -> list[str]:
    """List the files in a folder that are not remoe's.

    remoe's are the mark, what interruptions have left, and the regular files whose name is `ours`.
    """
    mark = MARK if read_mark(folder) else None
    return [
        name
        for name, path in files_of(folder)
        if path.is_symlink() or not path.is_file() or not (name == mark or _LEFT_BEHIND.fullmatch(path.name) or ours(name))
    ]


def refuse_foreign(folder: Path, foreign: Iterable[str]) -> None:
    """Refuse a folder that holds files that remoe did not make, if it does.

    Raises: UsageError that names the first of `foreign`.
    """
    if (name := next(iter(foreign), None)) is not None:
        raise UsageError(f"{folder} holds files that remoe did not make, such as {name}.", _HINT)


def refuse_place(folder: Path) -> None:
    """Refuse a path that cannot be a folder of remoe, whatever is in it.

    Raises: UsageError for a link, for a file, and where no folder can be made.
    """
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link, and remoe does not follow links.", "Give the folder itself.")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a folder.", _HINT)
    _refuse_parent(folder, "Give another folder.")


def refuse_folder(folder: Path, kind: str, earlier: Callable[[Path], Iterable[str]] = lambda folder: ()) -> None:
    """Refuse a folder that `new_folder` may not replace.

    `earlier` lists the files of a folder that a version of remoe without marks has made.

    Raises: UsageError for a folder that holds more than remoe's files of this kind, or other ones, and where no folder can be made.
    """
    refuse_place(folder)
    if not folder.exists():
        return
    mark = read_mark(folder)
    if mark and mark.kind != kind:
        raise UsageError(f"{folder} holds something else that remoe made: {mark.kind}, not {kind}.", _HINT)
    states = (mark and mark.files) or {}
    refuse_foreign(folder, foreign_files(folder, set(states if mark else earlier(folder)).__contains__))
    for name, state in states.items():
        with suppress(FileNotFoundError):
            if _state(folder / name) != state:
                raise UsageError(f"{folder / name} has been changed since remoe made it.", _HINT)
    place = _place(folder)
    if place in (here := Path.cwd(), *here.parents) or os.path.ismount(place):
        raise UsageError(f"{folder} is the current folder or a mount point, which cannot be replaced.", "Give a new folder in it.")


@contextmanager
def new_folder(folder: Path, kind: str, earlier: Callable[[Path], Iterable[str]] = lambda folder: ()) -> Iterator[Path]:
    """Yield an empty folder beside `folder`.

    On success it takes the place of `folder`; on failure it is removed.

    Raises: UsageError where `refuse_folder` does.
    """
    refuse_folder(folder, kind, earlier)
    place = _place(folder)
    clean(folder)
    fresh, descriptor = _temporary(place, tempfile.mkdtemp)
    try:
        write_mark(fresh, kind)
        yield fresh
        write_mark(fresh, kind, sealed=True)
        fresh.chmod(_rights(0o777, [place] if place.exists() else []))
        refuse_folder(folder, kind, earlier)
        _put(fresh, place, kind)
    finally:
        if fresh.exists():  # unfinished, or the old one
            delete_folder(fresh)
        os.close(descriptor)


def require_empty(folder: Path) -> None:
    """Make a folder if there is none, to write files into it that need no further check.

    Raises: UsageError for a folder that holds anything but a mark.
    """
    refuse_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    refuse_foreign(folder, foreign_files(folder, lambda name: False))


def delete_folder(folder: Path) -> None:
    """Delete a folder that holds nothing but what remoe made.

    The mark goes last, so that the rest of an interrupted deletion is still known as remoe's.
    """
    with os.scandir(folder) as entries:
        for entry in [entry for entry in entries if entry.name != MARK]:
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
    (folder / MARK).unlink(missing_ok=True)
    folder.rmdir()


def clean(path: Path) -> None:
    """Remove what interrupted runs have left beside `path`, and put back a folder that one has set aside."""
    place = _place(path)
    if not place.parent.is_dir():
        return
    aside = place.with_name(f".{place.name}{_TEMPORARY}{_ASIDE}")
    if not place.exists() and read_mark(aside):
        aside.rename(place)
    with os.scandir(place.parent) as entries:
        left = [
            Path(entry.path)
            for entry in entries
            if entry.name.startswith(f".{place.name}{_TEMPORARY}") and _LEFT_BEHIND.fullmatch(entry.name) and not entry.is_symlink()
        ]
    for each in left:
        with suppress(OSError), _unlocked(each) as free:
            if not free:
                continue
            if each.is_file():
                each.unlink()
            elif read_mark(each) or not foreign_files(each, lambda name: False):
                delete_folder(each)


def _put(fresh: Path, place: Path, kind: str) -> None:
    """Put a folder at `place`. What was there is then at `fresh`, or gone."""
    if not place.exists() or not any(place.iterdir()):
        fresh.rename(place)
        return
    if not read_mark(place):
        write_mark(place, kind, sealed=True)  # so that it is known as remoe's if this is interrupted
    if _exchanged(fresh, place):
        return
    aside = place.with_name(f".{place.name}{_TEMPORARY}{_ASIDE}")
    try:
        place.rename(aside)
        fresh.rename(place)
    except BaseException:
        if not place.exists():
            aside.rename(place)
        raise
    delete_folder(aside)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two folders at once; return whether the system can do that."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


# Both


def _place(path: Path) -> Path:
    """Return where a path is, without following a link at its end."""
    return path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()


def _refuse_parent(path: Path, hint: str) -> None:
    parent = next(parent for parent in _place(path).parents if parent.exists())
    if not parent.is_dir():
        raise UsageError(f"{path} cannot be written, because {parent} is not a folder.", hint)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path} cannot be written, because you may not write to {parent}.", hint)


def _recognised(path: Path, made: Made) -> bool:
    try:
        return made.recognises(path)
    except OSError:
        return False


def _temporary(place: Path, make: Callable[..., Any]) -> tuple[Path, int]:
    """Make a file or folder beside `place`, and return its path and a descriptor that holds its lock."""
    place.parent.mkdir(parents=True, exist_ok=True)
    while True:
        made = make(dir=place.parent, prefix=f".{place.name}{_TEMPORARY}")
        descriptor, name = made if isinstance(made, tuple) else (os.open(made, os.O_RDONLY | os.O_DIRECTORY), made)
        with suppress(OSError):  # a file system without locks: there, nothing that is left behind is removed
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.exists(name):  # no `clean` was faster than the lock
            return Path(name), descriptor
        os.close(descriptor)


@contextmanager
def _unlocked(path: Path) -> Iterator[bool]:
    """Yield whether nobody holds the lock on `path`, which is held meanwhile."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _state(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_size, found.st_mtime_ns

"""Digests are remembered for files that have not changed, and only for those."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from remoe_cli import digests
from remoe_cli.digests import sha256_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REMOE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, as they are."""
    names: list[str] = []
    real = digests._sha256
    monkeypatch.setattr(digests, "_sha256", lambda path, count: names.append(path.name) or real(path, count))
    return names


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all files had been there for long."""
    monkeypatch.setattr(digests, "_SETTLED_S", -60.0)


def make(folder: Path, **contents: bytes) -> list[Path]:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def expected(paths: list[Path]) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


@pytest.mark.usefixtures("settled")
def test_a_file_is_read_once(tmp_path: Path, read: list[str]) -> None:
    paths = make(tmp_path, a=b"one", b=os.urandom(20 << 20), c=b"")
    assert sha256_of(paths) == expected(paths) and sorted(read) == ["a", "b", "c"]
    assert sha256_of(reversed(paths)) == expected(paths)[::-1] and len(read) == 3
    paths[0].rename(tmp_path / "moved")  # which changes its time, so it is read again
    assert sha256_of([tmp_path / "moved", *paths[1:]]) == expected([tmp_path / "moved", *paths[1:]]) and read[3:] == ["moved"]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "another file in its place"])
def test_a_change_is_noticed_whatever_is_put_back(tmp_path: Path, read: list[str], in_place: bool) -> None:
    (path,) = make(tmp_path, a=b"0" * 1000)
    before, (first,) = path.stat(), sha256_of([path])
    if in_place:
        with path.open("r+b") as file:
            file.seek(500)
            file.write(b"1")
    else:
        (other,) = make(tmp_path, b=b"0" * 500 + b"1" + b"0" * 499)
        other.rename(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert sha256_of([path]) == expected([path]) != [first] and read == ["a", "a"]


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path, read: list[str]) -> None:
    """A second change within the resolution of the file system's times could not be told from it."""
    paths = make(tmp_path, a=b"one")
    assert sha256_of(paths) == sha256_of(paths) and read == ["a", "a"]


@pytest.mark.usefixtures("settled")
def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]) -> None:
    (path,) = make(tmp_path, a=b"one")
    counted = digests._sha256

    def change(path: Path, count: object) -> str:
        digest = counted(path, count)  # type: ignore[arg-type]
        time.sleep(0.02)
        path.write_bytes(b"two")
        return digest

    monkeypatch.setattr(digests, "_sha256", change)
    sha256_of([path])
    monkeypatch.setattr(digests, "_sha256", counted)
    assert sha256_of([path]) == [hashlib.sha256(b"two").hexdigest()]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("content", [b"", b"garbage", b"[" * 100_000, b'{"schema_version": "remoe.digests/1", "files": {"a": 1}}'])
def test_a_damaged_cache_costs_time_only(tmp_path: Path, cache: Path, content: bytes) -> None:
    cache.mkdir()
    (cache / "digests.json").write_bytes(content)
    paths = make(tmp_path, a=b"one")
    assert sha256_of(paths) == expected(paths) == sha256_of(paths)
    if content == b"garbage":  # it is not remoe's
        assert (cache / "digests.json").read_bytes() == content


@pytest.mark.usefixtures("settled")
def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REMOE_CACHE_DIR", str(tmp_path / "file"))
    paths = make(tmp_path, a=b"one")
    assert sha256_of(paths) == expected(paths)


@pytest.mark.usefixtures("settled")
def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]) -> None:
    monkeypatch.setattr(digests, "_REMEMBERED", 3)
    paths = make(tmp_path, a=b"1", b=b"2", c=b"3", d=b"4")
    for path in paths:
        sha256_of([path])
    sha256_of(paths[1:])
    assert len(read) == 4
    sha256_of(paths[:1])
    assert len(read) == 5


def test_only_long_work_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, reported = make(tmp_path, a=b"1" * 1000, b=b"2" * 500), list[tuple[float, float | None]]()
    sha256_of(paths, lambda done, total, what="": reported.append((done, total)))
    assert reported == []
    monkeypatch.setattr(digests, "_PATIENCE_S", -1.0)
    sha256_of(paths, lambda done, total, what="": reported.append((done, total)))
    assert len(reported) == 2 and reported[-1] == (1500, 1500)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sha256_of([tmp_path / "nowhere"])

"""What remoe replaces and deletes: its own files and folders, whole, at whatever point it is interrupted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import save_file

from remoe_cli import owned, recognise
from remoe_cli.artifacts import Document, arrays_beside, sha256_file, write_arrays, write_json
from remoe_cli.errors import UsageError
from remoe_cli.report.picture import save_picture
from tests.support.trees import tree


class Note(Document):
    """A document of this test."""

    schema_version: str = "remoe.note/1"
    text: str


class Other(Document):
    """Another one."""

    schema_version: str = "remoe.other/1"


@pytest.mark.parametrize(
    "content",
    [
        b"years of work",
        b"{}",
        b'{"schema_version": "mine/1"}',
        b'{"schema_version": ["remoe.note/1"]}',
        b"[" * 100_000,
        b'{\n "schema_version": "remoe.notes/1"\n}',
        b"\xff\xfe\x00",
    ],
)
def test_a_document_replaces_only_its_kind(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "note.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"note\.json exists, and it is not a note that remoe made\."):
        write_json(path, Note(text="new"))
    assert tree(tmp_path) == {"note.json": content}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{\n "schema_version": "remoe.note/1",\n "text": "old"\n}',
        b'{"text": "sorted by jq", "schema_version": "remoe.note/0"}',
        b'{\n "schema_version": "remoe.note/1",\n "te',  # cut off
        b'{\n "sche',
    ],
)
def test_a_document_of_its_kind_is_replaced_even_if_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "note.json"
    path.write_bytes(content)
    write_json(path, Note(text="new"))
    assert path.read_text() == '{\n "schema_version": "remoe.note/1",\n "text": "new"\n}\n'
    assert list(tree(tmp_path)) == ["note.json"]


def test_a_document_does_not_replace_another_kind(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", Other())
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="is not a note that remoe made"):
        write_json(tmp_path / "a.json", Note(text="new"))
    assert tree(tmp_path) == before


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


def put_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")


def put_link(path: Path) -> None:
    target = path.with_name("target.json")
    write_json(target, Note(text="of remoe, but not here"))
    path.symlink_to(target)


def put_dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def put_link_to_folder(path: Path) -> None:
    put_folder(path.with_name("folder"))
    path.symlink_to(path.with_name("folder"))


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (put_fifo, "is a device or a pipe"),
        (put_folder, "is a folder, not a file"),
        (put_link, "is a link"),
        (put_dangling, "is a link"),
        (put_link_to_folder, "is a link"),
    ],
)
def test_what_is_no_file_is_not_replaced(tmp_path: Path, put: Callable[[Path], None], said: str) -> None:
    put(tmp_path / "note.json")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=said):
        write_json(tmp_path / "note.json", Note(text="new"))
    with pytest.raises(UsageError, match=said):
        owned.delete_file(tmp_path / "note.json", recognise.ANY)
    assert tree(tmp_path) == before


def test_a_file_where_a_folder_must_be_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for path in (tmp_path / "thesis.tex" / "note.json", tmp_path / "thesis.tex" / "deeper" / "note.json"):
        with pytest.raises(UsageError, match=r"cannot be written, because .*thesis\.tex is not a folder"):
            owned.refuse_file(path, recognise.ANY)
        with pytest.raises(UsageError, match=r"cannot be written, because .*thesis\.tex is not a folder"):
            owned.refuse_folder(path, "package")


def test_arrays_replace_only_arrays_of_remoe(tmp_path: Path) -> None:
    path, arrays = tmp_path / "a.safetensors", {"x": np.arange(3)}
    save_file(arrays, str(path))
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="is not a prediction that remoe made"):
        write_arrays(path, {"x": np.arange(4)}, "prediction")
    assert tree(tmp_path) == before
    # An earlier version named them by their digest in the document beside them.
    (tmp_path / "a.json").write_text(f'{{"arrays_sha256": "{sha256_file(path)}"}}')
    write_arrays(path, {"x": np.arange(4)}, "prediction", arrays_beside(tmp_path / "a.json", "prediction"))
    write_arrays(path, {"x": np.arange(5)}, "prediction", arrays_beside(tmp_path / "a.json", "prediction"))
    write_arrays(path, {"x": np.arange(6)}, "prediction")
    with pytest.raises(UsageError, match="is not a profile that remoe made"):
        write_arrays(path, arrays, "profile")
    for content in (b"\xff" * 8 + b"{}", b"\x02\0\0\0\0\0\0\0[]", b"short"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="is not a prediction that remoe made"):
            write_arrays(path, arrays, "prediction")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_pictures_replace_only_pictures_of_remoe(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    figure = Figure()
    figure.subplots().plot([1, 2])
    save_picture(figure, path)
    save_picture(figure, path)  # its own
    figure.savefig(path)  # by somebody who uses matplotlib too
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="is not a picture that remoe made"):
        save_picture(figure, path)
    assert tree(tmp_path) == before
    with pytest.raises(UsageError, match=r"cannot be written as '\.gif'"):
        save_picture(figure, tmp_path / "a.gif")


def build(folder: Path, text: str, kind: str = "package") -> None:
    with owned.new_folder(folder, kind) as fresh:
        (fresh / "inner").mkdir()
        (fresh / "inner" / "a.txt").write_text(text)
        (fresh / "b.txt").write_text(text)


def texts(folder: Path) -> dict[str, Any]:
    return {name: content for name, content in tree(folder).items() if name != owned.MARK}


def test_a_folder_is_built_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text in ("one", "two", "three"):
        build(out, text)
        assert texts(out) == {"inner/a.txt": text.encode(), "b.txt": text.encode()}
    assert os.listdir(tmp_path) == ["out"]
    mark = owned.read_mark(out)
    assert mark and mark.kind == "package" and mark.files and sorted(mark.files) == ["b.txt", "inner/a.txt"]


def foreign_file(out: Path) -> None:
    (out / "inner" / "notes.txt").write_text("mine")


def foreign_link(out: Path) -> None:
    put_folder(out.parent / "mine")
    (out / "link").symlink_to(out.parent / "mine")


def replaced_by_link(out: Path) -> None:
    (out / "b.txt").rename(out.parent / "b.txt")
    (out / "b.txt").symlink_to(out.parent / "b.txt")


def edited(out: Path) -> None:
    (out / "b.txt").write_text("my own settings")


def unmarked(out: Path) -> None:
    (out / owned.MARK).unlink()


def marked_by_hand(out: Path) -> None:
    (out / owned.MARK).write_text('{"schema_version": "remoe.folder/1", "kind": "package", "files": {"b.txt": 3}}')


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (foreign_file, r"holds files that remoe did not make, such as inner/notes\.txt\."),
        (foreign_link, r"holds files that remoe did not make, such as link\."),
        (replaced_by_link, r"holds files that remoe did not make, such as b\.txt\."),
        (edited, r"b\.txt has been changed since remoe made it\."),
        (unmarked, r"holds files that remoe did not make, such as b\.txt\."),
        (marked_by_hand, r"holds files that remoe did not make, such as \.remoe\."),
    ],
)
def test_a_folder_with_anything_of_the_users_is_refused(tmp_path: Path, change: Callable[[Path], None], said: str) -> None:
    build(tmp_path / "out", "one")
    change(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=said) as raised:
        build(tmp_path / "out", "two")
    assert raised.value.hint == "Move that elsewhere, or give an empty or new folder."
    assert tree(tmp_path) == before


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "out", "one")
    with pytest.raises(UsageError, match="holds something else that remoe made: package, not image context"):
        build(tmp_path / "out", "two", "image context")


def test_a_link_to_a_folder_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "real", "one")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    before = tree(tmp_path)
    for path in (tmp_path / "out", tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="is a link, and remoe does not follow links"):
            build(path, "two")
    assert tree(tmp_path) == before


def test_the_current_folder_is_refused_even_if_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (Path(), Path("../here"), tmp_path):
        with pytest.raises(UsageError, match=r"holds files|is the current folder"):
            build(path, "one")
    build(Path("new"), "one")
    assert sorted(texts(tmp_path)) == ["here/new/.remoe", "here/new/b.txt", "here/new/inner/a.txt"]


def test_an_empty_folder_is_fine_and_what_fails_leaves_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    def fail() -> None:
        with owned.new_folder(tmp_path / "out", "package") as fresh:
            (fresh / "half").write_text("x")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == []
    build(tmp_path / "out", "one")
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_that_appears_while_the_folder_is_built_stays(tmp_path: Path) -> None:
    build(tmp_path / "out", "one")

    def rebuild() -> None:
        with owned.new_folder(tmp_path / "out", "package") as fresh:
            (fresh / "b.txt").write_text("two")
            (tmp_path / "out" / "notes.txt").write_text("mine")

    with pytest.raises(UsageError, match=r"such as notes\.txt"):
        rebuild()
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine" and (tmp_path / "out" / "b.txt").read_text() == "one"
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_of_an_earlier_version_is_known_by_its_own_list(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "inner").mkdir(parents=True)
    (out / "inner" / "a.txt").write_text("old")

    def rebuild() -> None:
        with owned.new_folder(out, "package", lambda folder: ["inner/a.txt"]) as fresh:
            (fresh / "b.txt").write_text("new")

    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"such as notes\.txt"):
        rebuild()
    (out / "notes.txt").unlink()
    rebuild()
    assert texts(out) == {"b.txt": b"new"} and os.listdir(tmp_path) == ["out"]

"""JSON files: what is written is read back, and lists of numbers take one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remoe_cli.artifacts import read_arrays, write_arrays, write_json
from remoe_cli.errors import ArtifactError
from tests.support.damage import flip

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(content=st.dictionaries(st.text(), JSON, max_size=4))
def test_what_is_written_is_read_back(content: dict[str, Any], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    write_json(path, content)
    assert json.loads(path.read_text(encoding="utf-8")) == content


def test_numbers_share_a_line_and_texts_that_look_like_lists_stay(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ids": [1, 2, -3.5e-7], "nested": [[1], [2, 3]], "text": "[\n 1,\n 2\n]"})
    text = (tmp_path / "a.json").read_text()
    assert ' "ids": [1, 2, -3.5e-07],\n' in text
    assert "  [2, 3]\n" in text
    assert json.loads(text)["text"] == "[\n 1,\n 2\n]"


def test_arrays_are_read_back_or_not_at_all(tmp_path: Path) -> None:
    arrays = {"a": np.arange(5), "none": np.empty((0, 3), dtype=np.float32), "bits": np.array([[True], [False]]), "one": np.float32(2)}
    write_arrays(tmp_path / "one", arrays, "test")
    write_arrays(tmp_path / "two", dict(reversed(arrays.items())), "test")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    read = read_arrays(tmp_path / "one")
    assert read.keys() == arrays.keys() and all((read[name] == array).all() for name, array in arrays.items())
    flip(tmp_path / "one", (tmp_path / "one").stat().st_size - 9)
    with pytest.raises(ArtifactError, match="one is damaged: its arrays are not those that were written"):
        read_arrays(tmp_path / "one")

"""JSON files: what is written is read back, and lists of numbers take one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from remoe_cli.artifacts import write_json

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

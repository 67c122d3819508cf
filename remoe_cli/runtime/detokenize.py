"""Turn tokens into text as they come, in the same time for each, however long the answer is.

What a token adds to a text depends on the tokens before it: a character may be made of several, and some decoders leave out the space at
the beginning of a text. So the tokens since the last two settled places are decoded again, and no more.

Source: vLLM's incremental detokenizer, and DecodeStream of the tokenizers library.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_INCOMPLETE = "\ufffd"  # what decoders write for a part of a character


@dataclass
class Detokenizer:
    """The text of the tokens so far.

    skip_special   whether it is without the tokenizer's special tokens
    text           whole characters, to which later tokens only add
    pending        what follows them while its last character is not complete; it may still change
    """

    tokenizer: Any
    skip_special: bool
    text: str = ""
    pending: str = ""
    _window: list[int] = field(default_factory=list)  # the tokens that are decoded again
    _settled: int = 0  # how many of them were there at the last settled place
    _before: str = ""  # what of the window's text is in `text`

    @property
    def whole(self) -> str:
        return self.text + self.pending

    def put(self, token: int) -> None:
        """Take one more token."""
        self._window.append(token)
        decoded = self._decode(self._window)
        self.pending = decoded[len(self._before) :]
        if decoded.endswith(_INCOMPLETE):
            return
        self.text, self.pending, self._before = self.whole, "", decoded
        # The next window begins here. Without any text it would begin later for a decoder that leaves out a first space.
        newest = self._window[self._settled :]
        if shown := self._decode(newest):
            self._window, self._settled, self._before = newest, len(newest), shown

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=self.skip_special)
        return text

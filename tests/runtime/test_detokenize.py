"""Text as it comes is the text of all tokens: for each kind of decoder, whatever the tokens and where stop strings begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from remoe_cli.model.generation import visible
from remoe_cli.runtime.answer import Piece
from remoe_cli.runtime.detokenize import Detokenizer
from remoe_cli.runtime.sequence import Stream

SPECIAL = ["<|begin|>", "<|end|>"]
WORDS = ["\u2581the", "\u2581", "a", "\u2581\u2581b", "\u20ac", "\ufffd", ".", "\u2581<|"]


def _byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_tokens(["<tool_call>", "\u00e9\n", " the"])
    return made


def _byte_fallback() -> Tokenizer:
    """As in Llama 2 and Mixtral: a first space is left out."""
    words = [*(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    made = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1, right=0)]
    )
    return made


def _metaspace() -> Tokenizer:
    made = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(WORDS)}, merges=[]))
    made.decoder = decoders.Metaspace()
    return made


def _words() -> Tokenizer:
    """Without a decoder: a space is between two tokens."""
    return Tokenizer(models.WordLevel({word: number for number, word in enumerate(("a", "b", "#", "##"))}, unk_token="a"))


def _tokenizer(made: Tokenizer) -> Any:
    made.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=SPECIAL[1])


TOKENIZERS = {
    name: _tokenizer(make())
    for name, make in {"byte level": _byte_level, "byte fallback": _byte_fallback, "metaspace": _metaspace, "words": _words}.items()
}


def _stream(tokenizer: Any, stop: Sequence[str], skip: bool) -> tuple[Stream, list[Piece]]:
    pieces: list[Piece] = []
    return Stream(tokenizer, stop, pieces.append, None, skip), pieces


@given(data=st.data(), skip=st.booleans())
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_comes_is_the_text_of_all_tokens(kind: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    # Mostly characters, as whole tokens or in bytes; and any token at all.
    written = st.sampled_from(["\u20ac", "\U0001f600", " the", "a", "\u00e9\n", "<tool_call>", *SPECIAL])
    several = written.map(lambda text: list(tokenizer.encode(text, add_special_tokens=False)))
    any_token = st.integers(0, len(tokenizer) - 1).map(lambda token: [token])
    ids = [token for some in data.draw(st.lists(several | any_token, max_size=24)) for token in some]
    stop = data.draw(st.lists(st.sampled_from(["a", "the", "e\u20ac", "\u20ac", "a <", "<|end|>", "b ##", ". "]), max_size=2))
    stream, pieces = _stream(tokenizer, stop, skip)
    made = Detokenizer(tokenizer, skip)
    for count, token in enumerate(ids, 1):
        made.put(token)
        stream.put(token)
        whole = tokenizer.decode(ids[:count], skip_special_tokens=skip)
        # A run of byte tokens that is no UTF-8 has as many U+FFFD as a decoder likes.
        if kind != "byte fallback" or "\ufffd" not in whole:
            assert made.whole == whole
            assert stream.at_stop is any(each in tokenizer.decode(ids[:count]) for each in stop)
            if not whole.endswith("\ufffd"):
                assert stream.text == visible(whole, stop, ended=None)
        if stream.at_stop:
            ids = ids[:count]
            break
    if ids:
        stream.finish(stopped=stream.at_stop)
    assert "".join(piece.text for piece in pieces) == stream.text
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    if kind != "byte fallback" or "\ufffd" not in whole:
        assert stream.text == visible(whole, stop, ended=stream.at_stop)


def test_a_token_of_a_long_answer_decodes_no_more_than_one_of_a_short_one() -> None:
    decoded: list[int] = []

    class Counting:
        def decode(self, ids: list[int], **options: Any) -> str:
            decoded.append(len(ids))
            return str(TOKENIZERS["byte level"].decode(ids, **options))

    stream, pieces = _stream(Counting(), ["###"], True)
    for token in TOKENIZERS["byte level"].encode("caf\u00e9 \U0001f600 " * 200):
        stream.put(token)
    stream.finish(stopped=False)
    assert max(decoded) <= 8 and stream.text == "caf\u00e9 \U0001f600 " * 200 and len(pieces) > 1000

"""Compare libraries that make an answer follow a JSON schema: what is installed, set up, and spent for each token.

    pip install --target FOLDER --no-deps outlines-core xgrammar apache-tvm-ffi
    PYTHONPATH=FOLDER python docs/measure/grammars.py [--vocabulary N]

The tokenizer is a byte-level BPE of N tokens, trained here on the sources of installed packages, as no large one comes with remoe. Each
library follows the same answer, a JSON document, and gives a mask for each of its tokens. Masks are the first of their state: a server
sees another schema with each client.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sysconfig
import time
from collections.abc import Callable
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SOURCES = 6000  # files
SCHEMAS: dict[str, tuple[dict[str, Any], Any]] = {
    "small": (
        {"type": "object", "properties": {"ok": {"type": "boolean"}, "why": {"type": "string"}}, "required": ["ok", "why"],
         "additionalProperties": False},
        {"ok": True, "why": "It is so."},
    ),
    "bounded strings": (
        {"type": "object", "properties": {"name": {"type": "string", "maxLength": 200}, "tags": {"type": "array", "maxItems": 20,
         "items": {"type": "string", "pattern": "^[a-z]{1,12}$"}}}, "required": ["name", "tags"], "additionalProperties": False},
        {"name": "A name of some length, as people have", "tags": ["one", "two", "three"]},
    ),
    "any JSON object": ({"type": "object"}, {"a": [1, 2.5, {"b": None}], "c": "text"}),
}  # fmt: skip


def large_tokenizer(vocabulary: int) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=32,
    )
    files = (path for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")) if not {"test", "tests"} & set(path.parts))
    made.train_from_iterator((path.read_text(errors="replace") for path in islice(files, SOURCES)), trainer)
    return made


def llguidance(tokenizer: Tokenizer) -> Callable[[dict[str, Any]], tuple[Callable[[], Any], Callable[[int], Any]]]:
    from llguidance import LLMatcher, LLTokenizer

    tokens = LLTokenizer(tokenizer.to_str(), eos_token=0)

    def begin(schema: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[int], Any]]:
        matcher = LLMatcher(tokens, LLMatcher.grammar_from_json_schema(schema))
        assert not matcher.is_error(), matcher.get_error()
        return matcher.compute_bitmask, matcher.consume_token

    return begin


def xgrammar(tokenizer: Tokenizer) -> Callable[[dict[str, Any]], tuple[Callable[[], Any], Callable[[int], Any]]]:
    import xgrammar

    size = tokenizer.get_vocab_size()
    vocabulary = [tokenizer.id_to_token(number) for number in range(size)]
    info = xgrammar.TokenizerInfo(vocabulary, xgrammar.VocabType.BYTE_LEVEL, vocab_size=size, stop_token_ids=[0])
    compiler = xgrammar.GrammarCompiler(info, max_threads=2, cache_enabled=False)
    mask = xgrammar.allocate_token_bitmask(1, size)

    def begin(schema: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[int], Any]]:
        matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
        return lambda: matcher.fill_next_token_bitmask(mask), matcher.accept_token

    return begin


def outlines_core(tokenizer: Tokenizer) -> Callable[[dict[str, Any]], tuple[Callable[[], Any], Callable[[int], Any]]]:
    from outlines_core import Guide, Index, Vocabulary
    from outlines_core.json_schema import build_regex_from_schema

    decoded: dict[bytes, list[int]] = {}
    of = {character: byte for byte, character in _bytes().items()}
    for text, number in tokenizer.get_vocab().items():
        if number:
            decoded.setdefault(bytes(of[character] for character in text), []).append(number)
    vocabulary = Vocabulary(0, decoded)

    def begin(schema: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[int], Any]]:
        guide = Guide(Index(build_regex_from_schema(json.dumps(schema)), vocabulary))
        return guide.get_tokens, lambda token: guide.advance(token, return_tokens=False)

    return begin


def _bytes() -> dict[int, str]:
    """The characters by which byte-level tokenizers write bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + at) for at, byte in enumerate(others)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocabulary", type=int, default=150_000)
    tokenizer = large_tokenizer(parser.parse_args().vocabulary)
    print(f"{tokenizer.get_vocab_size()} tokens\n")
    print("| library | version | installed MB | needs torch | set-up s |")
    print("| --- | --- | --- | --- | --- |")
    begins: dict[str, Any] = {}
    for name, setting_up in (("llguidance", llguidance), ("xgrammar", xgrammar), ("outlines-core", outlines_core)):
        if importlib.util.find_spec(name.replace("-", "_")) is None:
            print(f"| {name} | not installed | | | |")
            continue
        begun_s = time.perf_counter()
        begins[name] = setting_up(tokenizer)
        took_s = time.perf_counter() - begun_s
        size = sum(Path(str(file.locate())).stat().st_size for file in metadata.files(name) or () if Path(str(file.locate())).is_file())
        torch = "yes" if any(line.startswith("torch") and "extra ==" not in line for line in metadata.requires(name) or ()) else "no"
        print(f"| {name} | {metadata.version(name)} | {size / 1e6:.1f} | {torch} | {took_s:.2f} |")
    print("\n| schema | library | start ms | mask ms: median | mask ms: most |")
    print("| --- | --- | --- | --- | --- |")
    for of, (schema, document) in SCHEMAS.items():
        for name, begin in begins.items():
            try:
                begun_s = time.perf_counter()
                mask, advance = begin(schema)
                mask()
                started_ms, times_ms = (time.perf_counter() - begun_s) * 1e3, []
                for token in tokenizer.encode(json.dumps(document)).ids:
                    begun_s = time.perf_counter()
                    mask()
                    times_ms.append((time.perf_counter() - begun_s) * 1e3)
                    advance(token)
                print(f"| {of} | {name} | {started_ms:.1f} | {statistics.median(times_ms):.2f} | {max(times_ms):.2f} |")
            except Exception as error:
                print(f"| {of} | {name} | {type(error).__name__}: {str(error)[:80]} | | |")


if __name__ == "__main__":
    main()

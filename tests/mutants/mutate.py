"""Changes of valid inputs: of their bytes, of the numbers and texts in them, and of the tree that JSON is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
NUMBERS = (
    *(b"0", b"-1", b"1", b"0.5", b"-0.0", b"255", b"65536", b"2147483647", b"2147483648", b"-2147483649", b"9223372036854775808", b"1e18"),
    *(b"1e308", b"1e999", b"-1e999", b"1e-320", b"NaN", b"Infinity", b"-Infinity", b"inf", b"nan", b"9" * 30, b"9" * 5000),
    *(b"0x10", b"1_000"),
)
TEXTS = (
    *("", " ", "\0", "\n", "\r\n", "\x1b[2J", "\u2028", "\ufeff", "\u202e", "\ud800", "é", "\U0001f600", "../../etc/passwd", "/dev/zero"),
    *("true", "null", "None", "NaN", "{}", "[]", "'", '"', ",", ";", "a" * 5000, "s3://x/y", "layer", "\x7f", "%s%n", "__proto__"),
)
SCALARS: tuple[Any, ...] = (None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -1.5, 1e308, 1e-320)
VALUES: tuple[Any, ...] = (*SCALARS, [], {}, [[]], [0], {"": 0}, *TEXTS[:18])


def flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data))]


def remove(data: bytes, random: Random) -> bytes:
    first = random.randrange(len(data))
    return data[:first] + data[first + random.choice((1, 2, 7, 60)) :]


def double(data: bytes, random: Random) -> bytes:
    first = random.randrange(len(data))
    last = first + random.choice((1, 8, 60, 400))
    return data[:last] + data[first:last] * random.choice((1, 1, 50)) + data[last:]


def swap(data: bytes, random: Random) -> bytes:
    a, b, c, d = sorted(random.randrange(len(data) + 1) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def overwrite(data: bytes, random: Random) -> bytes:
    first, length = random.randrange(len(data)), random.choice((1, 2, 4, 8))
    new = random.choice((b"\0" * length, b"\xff" * length, random.randbytes(length)))
    return data[:first] + new + data[first + length :]


def number(data: bytes, random: Random) -> bytes:
    found = list(_NUMBER.finditer(data[:20_000]))
    if not found:
        return flip(data, random)
    chosen = random.choice(found)
    return data[: chosen.start()] + random.choice(NUMBERS) + data[chosen.end() :]


def text(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.choice(TEXTS).encode("utf-8", "surrogatepass") + data[at:]


def nest(data: bytes, random: Random) -> bytes:
    at, depth = random.randrange(len(data) + 1), random.choice((3, 70, 150, 2000))
    opening, closing = random.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return data[:at] + opening * depth + random.choice((b"", b"0" + closing * depth)) + data[at:]


def _nodes(value: Any, found: list[tuple[Any, Any]]) -> None:
    """All places of a tree: a list or an object, and a key or index in it."""
    for key in value if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            _nodes(value[key], found)


def tree(data: bytes, random: Random) -> bytes:
    """Change JSON: another value at a place, two values exchanged, one removed, doubled, renamed or nested."""
    lines = data.split(b"\n")
    line = random.randrange(len(lines))
    for part in (data, lines[line]):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict | list) and value:
            break
    else:
        return number(data, random)
    places: list[tuple[Any, Any]] = []
    _nodes(value, places)
    for _ in range(random.choice((1, 1, 1, 2))):
        holder, key = random.choice(places)
        if not (key in holder if isinstance(holder, dict) else key < len(holder)):
            continue
        other, at = random.choice(places)
        match random.randrange(7):
            case 0 | 1:
                holder[key] = random.choice(VALUES)
            case 2:
                holder[key] = json.loads(json.dumps(other[at])) if (at in other if isinstance(other, dict) else at < len(other)) else None
            case 3:
                del holder[key]
            case 4 if isinstance(holder, dict):
                holder[random.choice((*TEXTS, "layers", "schema_version", "prompt", "n_in"))] = holder.pop(key)
            case 4 | 5:
                holder[key] = [holder[key]] * random.choice((1, 2, 30))
            case _:
                nested = holder[key]
                for _ in range(random.choice((2, 60, 120, 900))):
                    nested = [nested] if random.random() < 0.5 else {"a": nested}
                holder[key] = nested
    try:
        new = json.dumps(value).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError):
        return flip(data, random)
    if part is data:
        return new
    lines[line] = new
    return b"\n".join(lines)


BYTES: tuple[Callable[[bytes, Random], bytes], ...] = (flip, cut, remove, double, swap, overwrite)
TEXT = (*BYTES, number, number, text, nest)
JSON = (*TEXT, tree, tree, tree, tree, tree, tree)

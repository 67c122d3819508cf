"""Text as a terminal may be sent it: characters that would steer the terminal are shown, not sent.

An answer, a name or a line of a log can hold escape sequences, which set the clipboard or rewrite the screen, and marks that turn the order
of letters around.
"""

from __future__ import annotations

import re

# Surrogates stand for bytes of a file's name that are not UTF-8.
SURROGATES = "\ud800-\udfff"
STEERING = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\U000e0000-\U000e007f"
_STEERING, _SURROGATES = re.compile(f"[{STEERING}]"), re.compile(f"[{SURROGATES}]")


def visible(text: str) -> str:
    r"""Replace characters that steer a terminal by their escapes; line ends and tabs stay.

    >>> visible("a\tb\n"), visible("\x1b]52;c;aGk=\x07"), visible("\u202egpj.exe"), visible("caf\udce9")
    ('a\tb\n', '\\x1b]52;c;aGk=\\x07', '\\u202egpj.exe', 'caf�')
    """
    return _SURROGATES.sub("\ufffd", _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text))


def is_utf8(text: str) -> bool:
    """Return whether an argument of the command line was UTF-8; Python stands surrogates for other bytes."""
    return not _SURROGATES.search(text)

"""Take secrets out of what is printed.

`redacted` is called where a message leaves the process, and nowhere else.

Two kinds of secrets are found. Values that this process can know: environment variables and files with a name of a secret, and what was
given to `hide`, such as what a credential_process printed. And whatever has the form of a secret, wherever it comes from.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from urllib.parse import quote, unquote

SHOWN = "***"
_LEAST = 8  # characters of a secret: shorter values are words, which stand in harmless sentences too
_MOST_BYTES = 1 << 20  # of a file with secrets

_NAMES = {"SECRET", "TOKEN", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS", "AUTHORIZATION", "KEY", "APIKEY", "COOKIE"}
_PLACES = {"FILE", "PATH", "DIR", "HOME", "SOCK", "ID", "URI", "URL", "PROCESS", "SOURCE", "ARN", "NAME"}  # a name's end: no secret itself
# Names of the files' fields, some of which have no line between their words.
_FIELD = re.compile(r"(?i)secret|token|password|passphrase|api_?key")
_LINE = re.compile(r"(?m)^\s*([A-Za-z_][\w. -]*?)\s*[=:]\s*(.+?)\s*$")
_JSON = re.compile(r'"(\w+)"\s*:\s*"([^"]*)"')

_SHAPES = (
    # Of an access key's id a part may be shown: it tells which key it is.
    (re.compile(r"\b((?:AKIA|ASIA)[A-Z0-9]{4})[A-Z0-9]{4,}"), rf"\1{SHOWN}"),
    (re.compile(r"(?i)((?:proxy-)?authorization['\"]?\s*[:=,]\s*(?:b?['\"])?)[^'\"\r\n]+"), rf"\1{SHOWN}"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/=_.~-]{16,}"), rf"\1 {SHOWN}"),
    (re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/?#\"'<>]*@"), rf"\1{SHOWN}@"),
    (
        re.compile(r"(?i)([?&](?:[\w-]*(?:signature|credential|token|secret|password|api_?key|accesskeyid)|sig|key)=)[^&\s\"'<>]+"),
        rf"\1{SHOWN}",
    ),
    (
        re.compile(
            r"(?i)((?:secret_?(?:access_?)?key|(?:session|security|access|refresh|id|auth)[-_]?token|password|passwd|api[-_]?key|client_?secret)"
            r"['\"]?\s*[:=]\s*b?['\"]?)[^\s\"',;&]{4,}"
        ),
        rf"\1{SHOWN}",
    ),
    (re.compile(r"(?i)([\"'](?:token|secret|password)[\"']\s*:\s*[\"'])[^\"']+"), rf"\1{SHOWN}"),
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), f"hf_{SHOWN}"),
    (re.compile(r"\b(?:gh[pousr]_|github_pat_|glpat-|xox[abprs]-|sk-)[A-Za-z0-9_-]{16,}"), SHOWN),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"), SHOWN),  # a JSON web token
    (re.compile(r"\b(?:IQoJ|FwoG|FQoG|AQoD)[A-Za-z0-9+/=]{32,}"), SHOWN),  # a session token of AWS
)
# A secret access key alone. A path or a hexadecimal digest of that length is none.
_SECRET_KEY = re.compile(r"(?<![A-Za-z0-9/+=])(?![/])(?=[^\s]*[A-Z])(?=[^\s]*[a-z])(?=[^\s]*\d)[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])")
_MOST_SLASHES = 2

_hidden: set[str] = set()


def hide(*texts: str | None) -> None:
    """Let these texts never be printed: what a program or a service gave as a secret."""
    _hidden.update(text for text in texts if text and len(text.strip()) >= _LEAST)


def redacted(text: str) -> str:
    """Return a text without secrets.

    >>> redacted("https://me:pw@host/x?X-Amz-Signature=0a1b2c by ASIAIOSFODNN7EXAMPLE with hf_abcdefghijklmnop")
    'https://***@host/x?X-Amz-Signature=*** by ASIAIOSF*** with hf_***'
    """
    for secret in sorted({form for known in _known() for form in _forms(known)}, key=len, reverse=True):
        text = text.replace(secret, SHOWN)
    for shape, shown in _SHAPES:
        text = shape.sub(shown, text)
    return _SECRET_KEY.sub(lambda found: found[0] if found[0].count("/") > _MOST_SLASHES else SHOWN, text)


def _known() -> Iterator[str]:
    yield from _hidden
    for name, value in os.environ.items():
        words = name.upper().split("_")
        if _NAMES & set(words) and words[-1] not in _PLACES:
            yield value
        if "://" in value and "@" in value:  # a proxy or an index of packages with a password
            user, _, password = value.partition("://")[2].rpartition("@")[0].partition(":")
            yield from (password or user, unquote(password or user), f"{user}:{re.split('[/?#]', password)[0]}")
    places = tuple((name, os.environ.get(name)) for name in ("HOME", *_FILES_OF_FIELDS, *_FILES_OF_ONE, "HF_HOME"))
    yield from _of_files(places)


def _forms(secret: str) -> Iterator[str]:
    """Yield a secret as it may stand in a message: escaped, quoted, and each line of several alone."""
    for part in {secret, secret.strip(), *secret.splitlines()}:
        if len(part) >= _LEAST:
            raw = part.encode(errors="surrogateescape")
            yield from {part, repr(part)[1:-1], ascii(part)[1:-1], repr(raw)[2:-1], json.dumps(part)[1:-1]}
            yield from {quote(raw, safe=""), quote(raw), " ".join(part.split())}


_FILES_OF_FIELDS = {
    "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials",
    "AWS_CONFIG_FILE": "~/.aws/config",
    "AWS_CREDENTIAL_FILE": "",
    "BOTO_CONFIG": "~/.boto",
}
_FILES_OF_ONE = {  # whose whole content is one secret
    "HF_TOKEN_PATH": "~/.cache/huggingface/token",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "",
}
_CACHES = ("~/.aws/sso/cache", "~/.aws/cli/cache", "~/.aws/login/cache")


@cache
def _of_files(places: tuple[tuple[str, str | None], ...]) -> tuple[str, ...]:
    """Read the secrets of files, once while the environment names the same ones."""
    given = dict(places)
    fields = [given[name] or default for name, default in _FILES_OF_FIELDS.items()]
    ones = [given[name] or default for name, default in _FILES_OF_ONE.items()]
    if given["HF_HOME"]:
        ones.append(f"{given['HF_HOME']}/token")
    found = [value for path in fields for value in _fields(path)]
    for folder in _CACHES:
        found += [value for path in _listed(folder) for value in _fields(str(path))]
    return (*found, *(_text(path).strip() for path in ones))


def _listed(folder: str) -> Iterable[Path]:
    try:
        return sorted(Path(os.path.expanduser(folder)).glob("*.json"))[:100]
    except OSError:
        return ()


def _fields(path: str) -> Iterator[str]:
    """Yield the values of a file's secret fields, even where the file cannot be parsed."""
    for name, value in (_JSON if path.endswith(".json") else _LINE).findall(_text(path)):
        if _FIELD.search(name) and not name.lower().endswith(("_file", "_process")):
            yield value


def _text(path: str) -> str:
    if not path:
        return ""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return file.read(_MOST_BYTES).decode(errors="replace")
    except (OSError, ValueError):
        return ""

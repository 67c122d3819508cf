"""Figures as data, each with its source: TOML files of which every field is named by exactly one `[[provenance]]` entry.

So no figure enters a plan or a profile without saying where it comes from. What the figures mean is the business of who reads them:
plan/catalog.py (menus and prices), profile/hardware.py (speeds).
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from remoe_cli import artifacts
from remoe_cli.errors import UsageError

T = TypeVar("T", bound=BaseModel)


class Provenance(artifacts.Part):
    """Where the fields named in `of` (such as `function.usd_per_request`) come from."""

    of: tuple[str, ...] = Field(min_length=1)
    date: date
    region: str = Field(min_length=1)
    source: str = Field(min_length=1)


def check_provenance(sides: Mapping[str, BaseModel], entries: Iterable[Provenance]) -> None:
    """Raises ValueError unless every field of every side (`side.field`) is named by exactly one entry, and nothing else is. A field that
    has its default need not be named: it says that there is no such thing."""
    fields = {f"{side}.{name}": (getattr(part, name), of) for side, part in sides.items() for name, of in type(part).model_fields.items()}
    needed = {field for field, (value, of) in fields.items() if value != of.default}
    named = Counter(field for entry in entries for field in entry.of)
    if wrong := sorted(needed - named.keys()):
        raise ValueError(f"no provenance for {', '.join(wrong)}")
    if wrong := sorted(named.keys() - fields.keys()) + sorted(field for field, times in named.items() if times > 1):
        raise ValueError(f"provenance for unknown or repeated {', '.join(wrong)}")


def shipped_names(package: str, folder: str) -> tuple[str, ...]:
    """Names of the files that come with remoe."""
    files = (resources.files(package) / folder).iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def read_sourced(what: str, kind: type[T], name: str, package: str, folder: str) -> T:
    """Read one by name (of those that come with remoe) or by path (anything with a `/` or that ends in `.toml`).

    `what` is the word for it in messages; `kind` has a field `file`, which is filled in with path and digest. Raises UsageError when
    there is no such file, or it is not TOML, or a field is unknown, missing or has a bad value.
    """
    names = shipped_names(package, folder)
    form = f"Mend the file; '{folder}/{names[0]}.toml' in {package} shows the form."
    is_path = "/" in name or name.endswith(".toml")
    if not is_path and name not in names:
        raise UsageError(f"There is no {what} named '{name}'.", f"Give the path of a .toml file, or one of: {', '.join(names)}.")
    try:
        data = Path(name).read_bytes() if is_path else (resources.files(package) / folder / f"{name}.toml").read_bytes()
    except OSError as error:
        raise UsageError(f"The {what} {name} cannot be read: {error.strerror}.", "Check the path.") from None
    try:
        tables: dict[str, Any] = tomllib.loads(data.decode("utf-8"))
    except ValueError as error:
        raise UsageError(f"The {what} {name} is not TOML: {error}.", form) from None
    if "file" in tables:
        raise UsageError(f"The {what} {name} has an unknown field 'file'.", "Take it out.")
    try:
        return kind.model_validate(tables | {"file": {"path": name, "sha256": artifacts.sha256_bytes(data)}})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise UsageError(f"The {what} {name} is wrong at '{where}': {first['msg']}.", form) from None

"""TOML files of figures in which every figure names its source.

Each field of a file is named by exactly one of its `[[provenance]]` entries, so no figure enters a plan or a profile without a source.
What the figures mean is known by the modules that read them: plan/catalog/catalog.py (menus and prices), profile/hardware.py (speeds)
and deploy/aws (quotas).
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

from remoe_cli import artifacts, bounded
from remoe_cli.errors import UsageError

T = TypeVar("T", bound=BaseModel)


class Provenance(artifacts.Part):
    """One source, and the fields in `of` (such as `function.usd_per_request`) whose figures come from it."""

    of: tuple[str, ...] = Field(min_length=1)
    date: date
    region: str = Field(min_length=1)
    source: str = Field(min_length=1)


def check_provenance(sections: Mapping[str, BaseModel], entries: Iterable[Provenance]) -> None:
    """Check that exactly one entry names each field (`section.field`) of the file.

    A field that has its default value needs no entry: it states that the file has no such figure.

    Raises: ValueError for a field without an entry, for an entry of an unknown field, and for a field with two entries.
    """
    fields = {
        f"{section}.{name}": (getattr(table, name), info)
        for section, table in sections.items()
        for name, info in type(table).model_fields.items()
    }
    needed = {field for field, (value, info) in fields.items() if value != info.default}
    named = Counter(field for entry in entries for field in entry.of)
    if missing := sorted(needed - named.keys()):
        raise ValueError(f"no provenance for {', '.join(missing)}")
    if wrong := sorted(named.keys() - fields.keys()) + sorted(field for field, times in named.items() if times > 1):
        raise ValueError(f"provenance for unknown or repeated {', '.join(wrong)}")


def shipped_names(package: str, folder: str) -> tuple[str, ...]:
    """List the names of the TOML files that come with remoe in this folder of a package."""
    files = (resources.files(package) / folder).iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def read_figures_file(what: str, name: str, package: str, folder: str) -> bytes:
    """Read a file by name, of those that come with remoe, or by path, with a `/` or ending in `.toml`.

    `what` is the word for such a file in messages.

    Raises: UsageError when there is no such file, or it cannot be read.
    """
    is_path = "/" in name or name.endswith(".toml")
    names = shipped_names(package, folder)
    if not is_path and name not in names:
        raise UsageError(f"There is no {what} named '{name}'.", f"Give the path of a .toml file, or one of: {', '.join(names)}.")
    try:
        return (
            bounded.read_bytes(Path(name), bounded.FIGURES)
            if is_path
            else (resources.files(package) / folder / f"{name}.toml").read_bytes()
        )
    except OSError as error:
        raise UsageError(f"The {what} {name} cannot be read: {error.strerror}.", "Check the path.") from None


def read_figures(what: str, kind: type[T], name: str, package: str, folder: str) -> T:
    """Read and check a file of figures as a `kind`, whose field `file` gets the file's path and digest.

    `what`, `name`, `package` and `folder` are those of `read_figures_file`.

    Raises: UsageError when the file cannot be read, is not TOML, or has a field that is unknown, missing or wrong.
    """
    data = read_figures_file(what, name, package, folder)
    hint = f"Correct the file. '{folder}/{shipped_names(package, folder)[0]}.toml' in {package} is an example."
    try:
        tables: dict[str, Any] = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else artifacts.escaped(str(error))
        raise UsageError(f"The {what} {name} is not TOML: {why}.", hint) from None
    if "file" in tables:
        raise UsageError(f"The {what} {name} has an unknown field 'file'.", "Remove this field.")
    try:
        return kind.model_validate(tables | {"file": {"path": name, "sha256": artifacts.sha256_bytes(data)}})
    except ValidationError as error:
        raise UsageError(f"The {what} {name} is wrong {artifacts.first_mistake(error)}.", hint) from None

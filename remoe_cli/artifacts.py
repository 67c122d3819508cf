"""Files that one stage writes for the next: JSON documents with a schema, and safetensors arrays.

Every write is atomic: a reader sees the old file or the new one, never half of one. A file that remoe did not make is not replaced
(owned.py). Every document names its schema, and a document of another schema is refused. What a profile or a plan is, is not known here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from remoe_cli import bounded, owned, recognise
from remoe_cli.errors import ArtifactError


class Part(BaseModel):
    """A part of a document. Unknown fields are refused, and so are numbers that JSON does not have."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# Numbers in documents. Each bound is far above what exists, and below what makes a program hang or overflow.
MOST_LAYERS, MOST_EXPERTS = 512, 16_384  # of a model
LayerIndex = Annotated[int, Field(ge=0, lt=MOST_LAYERS)]
ExpertId = Annotated[int, Field(ge=0, lt=MOST_EXPERTS)]
Experts = Annotated[tuple[ExpertId, ...], Field(max_length=MOST_EXPERTS)]  # of one layer
Replicas = Annotated[int, Field(ge=0, le=10_000)]  # of one function; AWS allows 1,000 of all by default
Concurrency = Annotated[int, Field(ge=1, le=256)]  # requests that one main function serves at once
Tokens = Annotated[int, Field(ge=0, le=10**9)]  # of a request
Bytes = Annotated[int, Field(ge=0, le=2**50)]
Megabytes = Annotated[int, Field(ge=0, le=2**30)]
Figure = Annotated[float, Field(ge=-1e18, le=1e18)]  # times, prices, rates and factors
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=255)]  # in the same folder
Positive = Annotated[float, Field(gt=0, le=1e18)]
NonNegative = Annotated[float, Field(ge=0, le=1e18)]


class Document(Part):
    """A JSON document. Each subclass sets its schema, such as `remoe.plan/1`."""

    schema_version: str


_NUMBERS = re.compile(r"\[\n\s*((?:[-+.\deE]+,\n\s*)*[-+.\deE]+)\n\s*\]")
D = TypeVar("D", bound=Document)
Arrays = Mapping[str, npt.NDArray[Any]]


def json_text(content: BaseModel | Mapping[str, Any]) -> str:
    """Write content as indented JSON: keys in their own order, each list of numbers on one line.

    The same content gives the same text.

    >>> print(json_text({"name": "a", "sizes": [1, 2]}), end="")
    {
     "name": "a",
     "sizes": [1, 2]
    }
    """
    data = content.model_dump(mode="json") if isinstance(content, BaseModel) else dict(content)
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    # A line end between brackets is never part of a string: there JSON writes it as \\n.
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def write_json(path: Path, content: BaseModel | Mapping[str, Any], replaces: recognise.Made | None = None) -> None:
    """Write the text that `json_text` gives, atomically.

    It replaces a file that `replaces` recognises; by default a document with the schema of `content`, or nothing where that has none.

    Raises: UsageError when the file exists and is another one.
    """
    schema = str(content.get("schema_version", "") if isinstance(content, Mapping) else getattr(content, "schema_version", ""))
    made = recognise.document(schema.partition("/")[0]) if schema else recognise.NONE
    with owned.writing(path, replaces or made) as temporary:
        temporary.write_text(json_text(content), encoding="utf-8")


def made_as(kind: type[Document]) -> recognise.Made:
    """Recognise documents of the type `kind`, in any version of its schema."""
    return recognise.document(str(kind.model_fields["schema_version"].default).partition("/")[0])


def read_json(path: Path, kind: type[D]) -> D:
    """Read a document of type `kind`.

    Raises: ArtifactError when it is missing, damaged or of another schema.
    """
    try:
        content = bounded.read_bytes(path, bounded.DOCUMENT)
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"There is no file {path}.", "Check the path, or make the file again.") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.", "Make the file again.") from None
    return parse_document(content, kind, str(path))


def parse_document(content: bytes, kind: type[D], name: str) -> D:
    """Decode a document of type `kind`, which messages call `name`.

    Raises: ArtifactError when it is damaged or of another schema.
    """
    try:
        data = bounded.parse_json(content, finite=True)
    except ValueError as error:
        raise ArtifactError(f"{name} cannot be read as JSON: {error}.", "Make the file again.") from None
    expected = kind.model_fields["schema_version"].default
    found = data.get("schema_version") if isinstance(data, dict) else None
    if found != expected:
        stated = found if found is None else shown(found)
        what = f"{name} has the schema {stated}, and this version of remoe reads {expected!r}."
        raise ArtifactError(what, "Make the file again with this version.")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ArtifactError(f"{name} is damaged {first_mistake(error)}.", "Make the file again.") from None


def first_mistake(error: ValidationError) -> str:
    """Say where the first mistake in a document is, and what it is."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(key) for key in islice(first["loc"], 12))
    return f"at {shown(where)}: {escaped(first['msg'])}" if where else f"as a whole: {escaped(first['msg'])}"


def is_none(value: object) -> bool:
    """Tell whether a field is left out of a document (`Field(exclude_if=is_none)`)."""
    return value is None


def is_empty(value: tuple[object, ...] | Mapping[Any, object]) -> bool:
    """Tell the same of a field that holds several things (`Field(exclude_if=is_empty)`)."""
    return not value


def is_one(value: object) -> bool:
    """Tell whether a number is left out of a document (`Field(exclude_if=is_one)`)."""
    return value == 1


def is_false(value: object) -> bool:
    """Tell whether a flag is left out of a document (`Field(exclude_if=is_false)`)."""
    return value is False


def is_zero(value: object) -> bool:
    """Tell whether a count is left out of a document (`Field(exclude_if=is_zero)`)."""
    return value == 0


def shown(value: object, most: int = 200) -> str:
    """Quote what `escaped` gives.

    >>> print(shown("two\\nlines"))
    'two\\nlines'
    """
    return f"'{escaped(value, most)}'"


def escaped(value: object, most: int = 200) -> str:
    """Write a value that a file holds for a message: cut, and with control characters escaped."""
    text = value if isinstance(value, str) else type(value).__name__ if isinstance(value, dict | list) else str(value)
    text = text if len(text) <= most else f"{text[:most]}..."
    return text if text.isprintable() else ascii(text)[1:-1]


def write_arrays(path: Path, arrays: Arrays, kind: str, replaces: recognise.Made | None = None) -> None:
    """Write named arrays of a kind, such as "prediction", as safetensors, atomically.

    The same arrays give the same bytes. The file replaces a file that `replaces` recognises; by default arrays of the same kind.

    Raises: UsageError when the file exists and is another one.
    """
    with owned.writing(path, replaces or recognise.arrays(kind)) as temporary:
        save_arrays(temporary, arrays, kind)


def save_arrays(path: Path, arrays: Arrays, kind: str) -> None:
    """Write named arrays to a path that `owned.writing` gave.

    The file's metadata say of which kind it is, and the digest of the arrays. They are one entry, because the safetensors library writes
    several in any order.

    Raises: OSError for a full disk and its like.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    stored = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
    try:
        save_file(stored, str(path), metadata={recognise.MAKER: f"{kind} {_digest(stored)}"})
    except SafetensorError as error:
        if (system := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(system[1]), os.strerror(int(system[1])), str(path)) from None


def arrays_beside(document: Path, kind: str) -> recognise.Made:
    """Recognise arrays of a kind by their metadata or by the document beside them.

    Earlier versions wrote no metadata; there the document has the digest of the file, `arrays_sha256`.
    """
    made = recognise.arrays(kind)

    def recognises(path: Path) -> bool:
        if made.recognises(path):
            return True
        try:
            return bool(bounded.read_json(document, bounded.DOCUMENT)["arrays_sha256"] == sha256_file(path))
        except (OSError, ValueError, KeyError, TypeError):
            return False

    return recognise.Made(made.what, recognises)


def check_arrays(path: Path) -> None:
    """Check that a file of arrays may be read: it is a file, and not too large.

    Raises: ArtifactError when it may not.
    """
    try:
        with bounded.open_file(path) as file:
            bounded.check_bytes(file.seek(0, 2), bounded.ARRAYS)
    except FileNotFoundError:
        raise ArtifactError(f"There is no file {path}.", "Make the profile or bundle again.") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.", "Make the file again.") from None


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read every array of a safetensors file.

    Raises: ArtifactError when it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    check_arrays(path)
    try:
        arrays = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} is damaged: {escaped(str(error))}.", "Make the file again.") from None
    _, _, digest = recognise.safetensors_metadata(path).get(recognise.MAKER, "").partition(" ")
    if digest and digest != _digest(arrays):
        raise ArtifactError(f"{path} is damaged: its arrays are not those that were written.", "Make the file again.")
    return arrays


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def sha256_bytes(data: bytes) -> str:
    """Digest bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Digest a file without loading it, in hexadecimal."""
    with bounded.open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

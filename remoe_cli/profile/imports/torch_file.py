"""Reading what torch.save wrote, as plain data: tensors, numbers, text, lists and dictionaries.

Such a file is a zip archive: data.pkl describes the object, data/0, data/1, ... hold the bytes of the tensors. `torch.load` reads it with
`weights_only`, which runs no code of the file, and `mmap`, which leaves the tensors in the file until they are used. What torch does not
check is checked here first: the archive is whole and not compressed, and its description is not too long and names nothing that takes
memory which the file does not have.
"""

from __future__ import annotations

import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

from remoe_cli.errors import UsageError
from remoe_cli.model.checkpoint import reason
from remoe_cli.profile.imports.checks import Array, refuse

_MOST_OPCODES, _MOST_DESCRIPTION_BYTES = 50_000_000, 2**30
# What weights_only admits, without bytearray, which takes as much memory as its argument says.
_PLAIN = re.compile(
    r"torch( |\._utils _rebuild_|\.storage |\.nn\.parameter |\.serialization _get_layout)\w*"
    r"|collections (OrderedDict|Counter)|_codecs encode|__builtin__ (set|complex)"
)
_HINT = "Save it again with tensors, numbers, text, lists and dictionaries only."


def is_torch_file(file: Path) -> bool:
    """Tell whether the file is a zip archive as torch.save writes it."""
    try:
        with zipfile.ZipFile(file) as archive:
            return bool(_descriptions(archive))
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def read_torch_file(file: Path) -> Any:
    """Read the object in the file, with its tensors on the CPU.

    Raises: UsageError for a damaged file, and for anything but plain data, which the message names.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            _check(file, archive)
        import torch

        with warnings.catch_warnings(action="ignore"):  # of other versions of torch.save
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # zipfile, pickletools and torch each fail in ways of their own on damaged files
        # torch puts a paragraph of advice, to load without weights_only, around what it refused.
        refused = str(error).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        raise refuse(file, f"torch.load(weights_only=True) cannot read it ({refused or reason(error)})") from None


def as_array(value: Any, axes: int, where: str) -> Array | None:
    """Give a tensor with so many axes as an array that shares its memory; None for anything else.

    Raises: UsageError for a tensor that has more values than are stored, or whose number type numpy does not have.
    """
    import torch

    if not isinstance(value, torch.Tensor) or value.ndim != axes:
        return None
    try:
        # A stride of 0 repeats values: a small file could fill all memory.
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise refuse(where, f"it has a tensor of shape {tuple(value.shape)}, which is more values than the file stores for it")
        array: Array = value.detach().numpy()
    except (TypeError, RuntimeError) as error:
        raise refuse(where, f"it has a tensor that is no array of numbers ({reason(error)})") from None
    return array


def _descriptions(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    return [member for member in archive.infolist() if member.filename.endswith("/data.pkl")]


def _check(file: Path, archive: zipfile.ZipFile) -> None:
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise refuse(file, "it is a compressed archive, which torch.save does not write", "Unpack it, or save it again.")
    if damaged := archive.testzip():
        raise refuse(file, f"its member {damaged} is damaged")
    descriptions = _descriptions(archive)
    if len(descriptions) != 1:
        raise refuse(file, f"it has {len(descriptions)} members named data.pkl, and a dump has one")
    most = f"{_MOST_DESCRIPTION_BYTES:,} bytes or {_MOST_OPCODES:,} instructions"
    too_large = refuse(file, f"its data.pkl is too large: the most is {most}", "Record fewer forward passes in one dump.")
    if descriptions[0].file_size > _MOST_DESCRIPTION_BYTES:
        raise too_large
    for count, (opcode, argument, _) in enumerate(pickletools.genops(archive.read(descriptions[0]))):
        if count > _MOST_OPCODES:
            raise too_large
        if opcode.name == "GLOBAL" and not _PLAIN.fullmatch(str(argument)):
            raise refuse(file, f"it holds a {str(argument).replace(' ', '.')}, which is not plain data", _HINT)

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
_MOST_TUPLES, _DEEPEST_TUPLES = 10_000, 50  # inside one tuple
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
    tuples = _Tuples()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(archive.read(descriptions[0]))):
        if count > _MOST_OPCODES:
            raise too_large
        if not tuples.fit(opcode, argument):
            raise refuse(file, f"it holds tuples inside each other that stand for more than {_MOST_TUPLES:,} tuples", _HINT)
        if opcode.name == "GLOBAL" and not _PLAIN.fullmatch(str(argument)):
            raise refuse(file, f"it holds a {str(argument).replace(' ', '.')}, which is not plain data", _HINT)


class _Tuples:
    """What the tuples of a pickle stand for, found without making them.

    A tuple that holds another one twice, which holds a third one twice, and so on, takes few bytes and, as the key of a dictionary, more
    time than there is: its hash goes through all that it stands for. The machine of the format is followed with the number of tuples in
    each value, and their depth; values that are no tuples hold none that a hash goes through.
    """

    def __init__(self) -> None:
        self._stack: list[tuple[int, int] | None] = []  # None: a mark
        self._memo: dict[object, tuple[int, int]] = {}

    def fit(self, opcode: pickletools.OpcodeInfo, argument: object) -> bool:
        """Follow one instruction; return whether no tuple stands for too many."""
        name, stack, memo = opcode.name, self._stack, self._memo
        if name == "MARK":
            stack.append(None)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = (stack[-1] if stack else None) or (0, 0)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo.get(argument, (0, 0)))
        elif name == "DUP":
            stack.append(stack[-1] if stack else (0, 0))
        else:
            popped = self._popped(opcode)
            if name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"):
                made = (1 + sum(count for count, _ in popped), 1 + max((depth for _, depth in popped), default=0))
                stack.append(made)
                return made[0] <= _MOST_TUPLES and made[1] <= _DEEPEST_TUPLES
            stack.extend((0, 0) for _ in opcode.stack_after)
        return True

    def _popped(self, opcode: pickletools.OpcodeInfo) -> list[tuple[int, int]]:
        before = [kind.name for kind in opcode.stack_before]
        popped: list[tuple[int, int]] = []
        if "mark" in before:
            while self._stack and (value := self._stack.pop()) is not None:
                popped.append(value)
            before = before[: before.index("mark")]
        for _ in before:
            popped.append((self._stack.pop() if self._stack else None) or (0, 0))
        return popped

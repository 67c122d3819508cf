"""Routing as arrays: .npz, .npy and .safetensors files.

    counts            [P, L, E]; or prefill_counts and decode_counts [P, L, E]
    n_tokens, prompt_tokens, decode_tokens   [P], optional beside counts
    ids               [T, L, k], also named topk_ids or routed_experts
    seq_offsets       [P + 1], where each sequence of ids begins, and the end; without it the file is one sequence
    prompt_tokens     [P], also named prompt_lens, optional: how many of each sequence's tokens are its prompt
    layers            [L], optional in both: the layers that the file holds

Arrays of other names are ignored. Sizes in a header are compared with the file's size before memory is taken for them. Compressed arrays
can be a thousand times as large as their file, so there is a limit for them.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from remoe_cli.bounded import open_file
from remoe_cli.errors import UsageError
from remoe_cli.model.checkpoint import reason
from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.imports.checks import Array, CountedRouting, Routing, TracedRouting, listed, refuse, whole
from remoe_cli.profile.record import Phase

_MOST_BYTES = 2**31  # of one array
_MOST_UNPACKED_BYTES = 2**28  # of all compressed arrays of a file,
_UNPACKED_BYTES, _UNPACKED_TIMES = 2**26, 20  # and if more than this, so many times the file's size: counts compress to a fifth or so
_COUNTS: dict[str, Phase | None] = {"counts": None, "prefill_counts": "prefill", "decode_counts": "decode"}
_IDS = ("ids", "topk_ids", "routed_experts")
_PROMPTS = ("prompt_tokens", "prompt_lens")
_OTHERS = ("n_tokens", "decode_tokens", "seq_offsets", "layers")


def is_arrays_file(start: bytes, file: Path) -> bool:
    """Tell whether a file begins like one of the three kinds."""
    # A safetensors file has the length of its header first: eight bytes, of which no sane header needs the last two.
    return start[:2] == b"PK" or start[:6] == b"\x93NUMPY" or (start[6:8] == b"\0\0" and start[8:9] == b"{")


def read_arrays_file(file: Path, spec: MoeSpec, model: str) -> Routing:
    """Read a file of one of the three kinds.

    Raises: UsageError when it is damaged, holds no routing, or holds more than one kind of it.
    """
    with open_file(file) as stream:
        start = stream.read(6)
    if start == b"\x93NUMPY":
        return _one_array(_guarded(file, lambda: _read_npy(file)), file, spec)
    arrays, names = _guarded(file, lambda: _read_npz(file) if start[:2] == b"PK" else _read_safetensors(file))
    return _from_arrays(arrays, names, ".npz" if start[:2] == b"PK" else ".safetensors", file)


def _from_arrays(arrays: Mapping[str, Array], names: list[str], kind: str, file: Path) -> Routing:
    named = [name for name in (*_COUNTS, *_IDS) if name in arrays]
    counts = [name for name in named if name in _COUNTS]
    if not named or (len(counts) != len(named) if counts else len(named) > 1) or ("counts" in counts and len(counts) > 1):
        raise refuse(
            file,
            f"it holds {', '.join(named) or 'no routing'} (it has the arrays {listed(names)})",
            f"Name one array counts, or one of {', '.join(_IDS)}, or prefill_counts and decode_counts.",
        )
    for name in ("layers", "seq_offsets"):
        if name in arrays and arrays[name].ndim != 1:
            raise refuse(f"{file}: {name}", f"its shape is {arrays[name].shape}, and a list is needed")
    layers = tuple(whole(arrays["layers"], f"{file}: layers").tolist()) if "layers" in arrays else None
    prompts = next((arrays[name] for name in _PROMPTS if name in arrays), None)
    if not counts:
        ids = arrays[named[0]]
        offsets = arrays.get("seq_offsets", np.array([0, len(ids) if ids.ndim else 0]))
        return TracedRouting(f"token ids ({kind})", ids, offsets, prompts, layers)
    lengths = arrays.get("n_tokens")
    if lengths is None and "seq_offsets" in arrays:
        lengths = np.diff(whole(arrays["seq_offsets"], f"{file}: seq_offsets").astype(np.int64))
    stated = {None: lengths, "prefill": prompts, "decode": arrays.get("decode_tokens")}
    tokens = {phase: array for phase, array in stated.items() if array is not None}
    return CountedRouting(f"counts ({kind})", {_COUNTS[name]: arrays[name] for name in counts}, tokens, layers)  # type: ignore[arg-type]


def _one_array(array: Array, file: Path, spec: MoeSpec) -> Routing:
    """Take a lone array as the ids of one sequence when its last axis is the top-k, else as counts."""
    if array.ndim == 3 and array.shape[2] == spec.top_k != spec.experts_per_layer:
        return TracedRouting("token ids (.npy)", array, np.array([0, len(array)]), None)
    return CountedRouting("counts (.npy)", {None: array}, {})


def _guarded(file: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except UsageError:
        raise
    except OSError as error:
        raise refuse(file, f"it cannot be read ({error.strerror or reason(error)})") from None
    except Exception as error:  # zipfile, zlib, numpy and safetensors each fail in ways of their own on damaged files
        raise refuse(file, f"it is damaged ({reason(error)})") from None


def _read_npy(file: Path) -> Array:
    with open_file(file) as stream:
        return read_npy_stream(stream, file.stat().st_size)


def _read_npz(file: Path) -> tuple[dict[str, Array], list[str]]:
    """Read the arrays of known names, and the names of all."""
    wanted = {f"{name}.npy" for name in (*_COUNTS, *_IDS, *_PROMPTS, *_OTHERS)}
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename in wanted]
        unpacked = sum(entry.file_size for entry in entries if entry.compress_type != zipfile.ZIP_STORED)
        most = min(_MOST_UNPACKED_BYTES, max(_UNPACKED_BYTES, _UNPACKED_TIMES * file.stat().st_size))
        if unpacked > most or any(entry.file_size > _MOST_BYTES for entry in entries):
            what = f"its arrays take {sum(entry.file_size for entry in entries):,} bytes when they are unpacked"
            limits = f"{most:,} for compressed arrays together, and {_MOST_BYTES:,} for one that is not compressed"
            raise refuse(file, f"{what}; the most is {limits}", "Save them with numpy.savez, or import the rows in several files.")
        for entry in entries:
            with archive.open(entry) as stream:
                arrays[entry.filename.removesuffix(".npy")] = read_npy_stream(stream, entry.file_size)
        return arrays, [name.removesuffix(".npy") for name in archive.namelist()]


def read_npy_stream(stream: IO[bytes], size: int) -> Array:
    """Read the array of a .npy stream of `size` bytes.

    Raises: ValueError when the header is not sound or does not fit the size.
    """
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(stream)
    taken = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or dtype.itemsize == 0 or any(axis < 0 for axis in shape) or taken > min(size, _MOST_BYTES):
        raise ValueError(f"an array {shape} of {dtype} does not fit {size} bytes")
    data = stream.read(taken)
    if len(data) != taken or stream.read(1):
        raise ValueError(f"an array {shape} of {dtype} is not what follows its header")
    flat: npt.NDArray[Any] = np.frombuffer(data, dtype=dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def _read_safetensors(file: Path) -> tuple[dict[str, Array], list[str]]:
    """Read the arrays of known names, and the names of all."""
    from safetensors import safe_open

    with safe_open(str(file), framework="numpy") as archive:  # checks the header against the file's size
        names = list(archive.keys())
        return {name: archive.get_tensor(name) for name in names if name in {*_COUNTS, *_IDS, *_PROMPTS, *_OTHERS}}, names

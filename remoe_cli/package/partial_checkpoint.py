"""A partial checkpoint: a folder with a model's non-expert weights and the local experts only.

share.json               the experts that it holds (model/checkpoint.py)
weights-NNNN.safetensors the kept tensors, their bytes as in the checkpoint, at most 1 GB a file unless one tensor is larger
config.json, ...         config, generation config, tokenizer and chat template, as in the checkpoint
main.json                a MainManifest, which names every other file by its sha256; `seal` writes it last

model/loader.py loads such a folder like a checkpoint. A deployment may put more files into it before it is sealed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from remoe_cli import artifacts, bounded, interrupts, owned, recognise
from remoe_cli.errors import ArtifactError
from remoe_cli.model.checkpoint import Checkpoint, HeldExperts
from remoe_cli.model.checkpoint_files import SHARE

if TYPE_CHECKING:
    from remoe_cli.model.loader import Keep

MANIFEST = "main.json"
_FILE_BYTES = 1 << 30
_COPY_BYTES = 8 << 20


class MainFile(artifacts.Part):
    """A file of the folder."""

    name: artifacts.FileName
    bytes: int = Field(ge=0, le=2**62)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class MainManifest(artifacts.Document):
    """All files of a main function, by name."""

    schema_version: str = "remoe.main/1"
    files: tuple[MainFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class _Piece:
    """A tensor to write: its entry in a safetensors header, and the ranges of its bytes in the source."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]

    @property
    def bytes(self) -> int:
        return sum(last - first for first, last in self.ranges)


def write_partial_checkpoint(
    checkpoint: Checkpoint, keep: Keep, folder: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Write a checkpoint with only the experts in `keep` into the empty folder `folder`.

    `keep` has the experts by hidden layer, ascending. It reads piece by piece, so memory stays small. `progress` is called with the bytes
    of weights done and their total.

    Raises: ModelError for a checkpoint that is not whole, UsageError for a folder that is not empty.
    """
    owned.require_empty(folder)
    from remoe_cli.model.adapters import rows_each
    from remoe_cli.model.experts import expert_layers
    from remoe_cli.model.loader import ExpertRows, read_config, select, skeleton, stored_names

    probe = skeleton(read_config(checkpoint))
    kept = {x.layer: tuple(keep.get(x.layer, ())) for x in expert_layers(probe)}
    tensors = select(checkpoint, probe, kept)
    rows = {
        stored: (tensor.rows, rows_each(tensor.source)) if isinstance(tensor, ExpertRows) else None
        for name, tensor in tensors.items()
        for stored in stored_names(name, tensor)
    }
    for source in checkpoint.settings_files:
        if source.name not in (SHARE, "config.json"):
            owned.copy_file(source, folder / source.name)
    with owned.writing(folder / "config.json", recognise.NONE, [checkpoint.path / "config.json"]) as temporary:
        temporary.write_text(artifacts.json_text(_config(checkpoint)), encoding="utf-8")
    artifacts.write_json(folder / SHARE, HeldExperts(experts=kept))
    plan = [(file, group) for file in checkpoint.weight_files for group in _groups(_pieces(file, rows))]
    total, done = sum(piece.bytes for _, group in plan for piece in group), 0
    for number, (file, group) in enumerate(plan):
        _write(folder / f"weights-{number:04d}.safetensors", file, group)
        done += sum(piece.bytes for piece in group)
        progress(done, total)


def seal(folder: Path) -> MainManifest:
    """Write the manifest of everything in `folder`, and return it."""
    files = sorted(path for path in folder.iterdir() if path.name not in (MANIFEST, owned.MARK))
    manifest = MainManifest(
        files=tuple(MainFile(name=path.name, bytes=path.stat().st_size, sha256=artifacts.sha256_file(path)) for path in files)
    )
    artifacts.write_json(folder / MANIFEST, manifest)
    return manifest


def files(folder: Path) -> list[str]:
    """List the files of a main function that is there already; none where there is no manifest."""
    try:
        return [MANIFEST, *(file.name for file in artifacts.read_json(folder / MANIFEST, MainManifest).files)]
    except ArtifactError:
        return []


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read config.json; if it names no number type, add that of the whole checkpoint's weights."""
    from remoe_cli.model.loader import model_dtype, read_config

    config: dict[str, Any] = bounded.read_json(checkpoint.path / "config.json", bounded.CONFIG)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    if not any(part.get(name) for part in parts for name in ("dtype", "torch_dtype")):
        config["dtype"] = str(model_dtype(read_config(checkpoint))).removeprefix("torch.")
    return config


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the JSON header of a safetensors file, and the offset of its data."""
    with bounded.open_file(file) as source:
        length = int.from_bytes(source.read(8), "little")
        bounded.check_bytes(length, bounded.INDEX)
        return bounded.parse_json(source.read(length), bounded.INDEX), 8 + length


def _pieces(file: Path, kept: Mapping[str, tuple[Sequence[int], int] | None]) -> Iterator[_Piece]:
    """Yield the kept tensors of a file, in the file's order, which aligns them.

    Of some only the given experts are kept, each of so many rows.
    """
    header, data = read_header(file)
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        experts, each = kept.get(name) or (None, 1)
        if name not in kept or experts == []:
            continue
        first, last = (data + offset for offset in entry["data_offsets"])
        shape: tuple[int, ...] = tuple(entry["shape"])
        ranges: tuple[tuple[int, int], ...] = ((first, last),)
        if experts is not None:
            expert_bytes = (last - first) // shape[0] * each
            ranges = tuple((start, start + expert_bytes) for start in (first + expert * expert_bytes for expert in experts))
            shape = (len(experts) * each, *shape[1:])
        yield _Piece(name, entry["dtype"], shape, ranges)


def _groups(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    """Group the pieces into files."""
    group: list[_Piece] = []
    for piece in pieces:
        if group and sum(p.bytes for p in (*group, piece)) > _FILE_BYTES:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _write(path: Path, source: Path, pieces: list[_Piece]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        header[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [end, end + piece.bytes]}
        end += piece.bytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with owned.writing(path, recognise.NONE, [source]) as temporary, temporary.open("wb") as out, bounded.open_file(source) as file:
        out.write(len(head).to_bytes(8, "little") + head)
        for first, last in (r for piece in pieces for r in piece.ranges):
            file.seek(first)
            while first < last:
                interrupts.check()
                first += out.write(file.read(min(_COPY_BYTES, last - first)))

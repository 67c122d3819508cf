"""Finding the files of a checkpoint: in a local folder, or in a repository on the Hugging Face hub.

Only safetensors files are read, so no code of a checkpoint runs. A partial checkpoint is a folder like a checkpoint's that holds only
some of the experts (package/partial_checkpoint.py writes it).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from remoe_cli.artifacts import Document, read_json
from remoe_cli.errors import ModelError, UsageError

INDEX = "model.safetensors.index.json"
SHARE = "share.json"
# Besides weights, what transformers reads of a model: its config, generation config, tokenizer and chat template.
SETTINGS = ["*.json", "*.jinja", "*.model", "*.txt"]
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


class HeldExperts(Document):
    """The file share.json of a partial checkpoint.

    experts   by hidden layer, the experts that the folder holds, ascending; a fused tensor has their rows, in this order
    """

    schema_version: str = "remoe.share/1"
    experts: dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found.

    name       the hub id, or the path of the folder
    path       the folder with config.json
    revision   the hub's commit, or `local:` and the start of a digest (see `_digest`)
    """

    name: str
    path: Path
    revision: str

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """List the safetensors files: those that the index names, else all.

        Some repositories hold the same weights a second time under other names, which the index does not list.

        Raises: ModelError when there is no file, or one of the index is missing.
        """
        index = self.path / INDEX
        files = sorted(self.path / name for name in _indexed(index)) if index.is_file() else sorted(self.path.glob("*.safetensors"))
        if not files:
            raise ModelError(
                f"{self.path} holds no .safetensors file. remoe reads no other weights.", "Convert the checkpoint to safetensors."
            )
        for file in files:
            if not file.is_file():
                raise ModelError(f"{self.path} has no {file.name}, which its index names.", "Check that the checkpoint is complete.")
        return tuple(files)

    def held(self) -> dict[int, tuple[int, ...]] | None:
        """Get the experts of a partial checkpoint, by hidden layer; None for a whole checkpoint."""
        file = self.path / SHARE
        return read_json(file, HeldExperts).experts if file.is_file() else None


def reason(error: Exception) -> str:
    """Put an error of a library on one line of at most 240 characters.

    >>> reason(KeyError("weight_map"))
    "KeyError: 'weight_map'"
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:240].rstrip(": ")


def _indexed(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} cannot be used: {reason(error)}", "Check that the checkpoint is complete.") from None


def find_named(model: str) -> Checkpoint:
    """Find the checkpoint of a folder or a hub id that the user named, and download it if needed.

    Raises: UsageError when there is no such checkpoint, ModelError when it cannot be downloaded.
    """
    return _find(model, None)


def find(model: str, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint that a file of remoe names, and download it if needed.

    `revision` is a commit of a hub model; it is ignored for a folder.

    Raises: ModelError when there is no such checkpoint, or it cannot be downloaded.
    """
    try:
        return _find(model, revision)
    except UsageError as error:
        raise ModelError(error.message, error.hint) from None


def _find(model: str, revision: str | None) -> Checkpoint:
    path = _local(model)
    if path is not None:
        return Checkpoint(str(path), path, f"local:{_digest(path)[:16]}")
    if Path(model).is_absolute() or model.count("/") != 1 or model.startswith((".", "~")):
        raise UsageError(
            f"There is no folder {model}, and it is not a hub id such as 'owner/name'.", "Check the path, or give a hub id OWNER/NAME."
        )
    return _fetch(model, revision)


def _local(model: str) -> Path | None:
    """Return the folder of a checkpoint on this machine; None where nothing has this name.

    Raises: UsageError for what is there and is no checkpoint. The hub is not asked about such names.
    """
    try:
        path = Path(model).expanduser()
        if not path.exists():
            if path.is_symlink():
                raise UsageError(f"{model} is a link to {path.readlink()}, which is not there.", "Give the folder of a checkpoint.")
            return None
        if path.is_dir():
            path = path.resolve()
            if (path / "config.json").is_file():
                return path
            inside = sorted(config.parent for pattern in ("*/config.json", "snapshots/*/config.json") for config in path.glob(pattern))
            raise UsageError(
                f"The folder {model} has no config.json.",
                f"Perhaps you mean {inside[0]}." if inside else "Give the folder of a transformers checkpoint.",
            )
    except (OSError, ValueError, RuntimeError) as error:  # rights, a name that no file can have, a user without a home
        raise UsageError(f"{model} cannot be looked up: {reason(error)}", "Check the path and your permissions.") from None
    if path.suffix.lower() == ".gguf":
        raise UsageError(f"{model} is a file; give the folder of the model's safetensors checkpoint.", "remoe reads no GGUF.")
    folder = path.parent
    hint = f"Its folder is {folder}." if (folder / "config.json").is_file() else "A model is the folder that holds config.json and weights."
    raise UsageError(f"{model} is a file; give its folder.", hint)


def _digest(folder: Path) -> str:
    """Digest config.json, and of each weight file its name, its size and 16 samples.

    Other weights are noticed so, and not all of them have to be read.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as weights:
            for sample in range(_SAMPLES):
                weights.seek(size * sample // _SAMPLES)
                digest.update(weights.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _fetch(model: str, revision: str | None) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # Folders inside a repository hold copies of the weights in other formats.
        folder = Path(
            snapshot_download(
                model, revision=revision, allow_patterns=["*.safetensors", *SETTINGS], ignore_patterns=["*/*"], etag_timeout=10
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"The model '{model}' cannot be downloaded from the hub: {reason(error)}",
            "Check the id and the network, or give a folder.",
        ) from None
    return Checkpoint(model, folder, folder.name)

"""Finding a checkpoint's files: a local folder, or a repository on the hub. Safetensors only; nothing is unpickled."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from remoe_cli.errors import ModelError

_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Checkpoint:
    """`path` is the folder with config.json; `revision` the hub commit, or `local:` and the start of config.json's sha256."""

    name: str
    path: Path
    revision: str

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors files; raises ModelError when there are none (pickled weights are not read)."""
        files = tuple(sorted(self.path.glob("*.safetensors")))
        if not files:
            raise ModelError(
                f"{self.path} holds no .safetensors file, and remoe reads no other weights.", "Convert the checkpoint to safetensors."
            )
        return files


def find(model: str) -> Checkpoint:
    """Resolve a folder or hub id; raises ModelError when it is neither or cannot be fetched."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"The folder {path} has no config.json.", "Give the folder of a transformers checkpoint.")
        digest = hashlib.sha256((path / "config.json").read_bytes()).hexdigest()
        return Checkpoint(str(path.resolve()), path.resolve(), f"local:{digest[:16]}")
    if path.is_absolute() or model.count("/") != 1 or model.startswith("."):
        raise ModelError(f"There is no folder {model}, and it is not a hub id such as 'owner/name'.", "Check the path.")
    return _fetch(model)


def _fetch(model: str) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model, allow_patterns=_PATTERNS, etag_timeout=10))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"The model '{model}' cannot be fetched from the hub: {reason}", "Check the id and the network, or give a local folder."
        ) from None
    return Checkpoint(model, folder, folder.name)

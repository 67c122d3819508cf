"""Finding the files of a checkpoint: in a local folder, or in a repository on the Hugging Face hub.

Only safetensors files are read, so no code of a checkpoint runs. A partial checkpoint is a folder like a checkpoint's that holds only
some of the experts (package/partial_checkpoint.py writes it).

The main function and the expert functions must hold weights of one and the same model. So every file of a checkpoint that is read counts
in its revision, and `find_profiled` compares that before the files are loaded.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from remoe_cli import bounded
from remoe_cli.artifacts import Document, Experts, LayerIndex, read_json
from remoe_cli.digests import sha256_of
from remoe_cli.errors import ArtifactError, ModelError, UsageError
from remoe_cli.model.checkpoint_files import INDEX, MORE_TEMPLATES, SETTINGS, SHARE, WEIGHTS, file_names, refuse_files
from remoe_cli.progress import Report, no_report

WHOLE = "model.safetensors"
_SAMPLED = re.compile(r"local:[0-9a-f]{16}")  # the revision of a folder in versions that read a small part of the weights
_SHOWN_DIGITS = 16
_REASON_CHARACTERS = 240


class HeldExperts(Document):
    """The file share.json of a partial checkpoint.

    experts   by hidden layer, the experts that the folder holds, ascending; a fused tensor has their rows, in this order
    """

    schema_version: str = "remoe.share/1"
    experts: dict[LayerIndex, Experts]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found.

    name    the hub id, or the path of the folder
    path    the folder with config.json
    known   its revision, where that need not be computed: the hub's commit, or that of packaged files
    """

    name: str
    path: Path
    known: str | None = None

    @cached_property
    def revision(self) -> str:
        """The hub's commit, or `local:` and the digest of all files that are read."""
        return self.known or self.identify()

    def identify(self, report: Report = no_report) -> str:
        """Read the files anew as far as they have changed, and return the revision.

        `report` is that of `digests.sha256_of`.

        Raises: ModelError for a file that cannot be read, and for a file of the hub's cache that is not the hub's.
        """
        files = self.files
        try:
            digests = sha256_of(files, report)
        except OSError as error:
            raise ModelError(f"The model {self.name} cannot be read: {reason(error)}", "Check the files and your rights to them.") from None
        if self.known is not None:
            _refuse_damaged(files, digests)
            return self.known
        lines = [f"{digest} {os.path.relpath(file, self.path)}\n" for file, digest in zip(files, digests, strict=True)]
        return f"local:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"

    def check(self, revision: str, report: Report = no_report) -> None:
        """Check that the files are those of `revision`.

        Raises: ArtifactError when they are not, and what `identify` raises.
        """
        if (found := self.identify(report)) == revision:
            return
        again = "Profile and plan again."
        if _SAMPLED.fullmatch(revision):
            raise ArtifactError(
                f"The profile of the model {self.name} is of an earlier version of remoe, which did not read all of the model's files.",
                again,
            )
        at, profiled = (text[: len("local:") + _SHOWN_DIGITS] for text in (found, revision))
        raise ArtifactError(
            f"The model {self.name} has changed since it was profiled: it is at revision {at}, the profile is of {profiled}.", again
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that are read of the checkpoint and are there, by name."""
        index = [self.path / INDEX] if self._is_indexed else []
        files = {*self._weights(), *index, *self.settings_files, *self.path.glob(MORE_TEMPLATES), self.path / SHARE}
        return tuple(sorted(file for file in files if file.is_file()))

    @property
    def settings_files(self) -> tuple[Path, ...]:
        """The configuration, tokenizer and chat template: how the model is used. By name."""
        files = {file for pattern in SETTINGS for file in self.path.glob(pattern) if file.is_file()}
        return tuple(sorted(file for file in files if file.name not in (INDEX, SHARE)))

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """List the safetensors files that transformers reads: one whole file, else those of the index.

        Where there is neither, all files are listed.

        Some repositories hold the same weights a second time under other names, or other weights beside them.

        Raises: ModelError when there is no file, or one of the index is missing.
        """
        files = self._weights()
        if not files:
            raise ModelError(
                f"{self.path} holds no .safetensors file. remoe reads no other weights.", "Convert the checkpoint to safetensors."
            )
        for file in files:
            if not file.is_file():
                raise ModelError(f"{self.path} has no {file.name}, which its index names.", "Check that the checkpoint is complete.")
        return tuple(files)

    @property
    def _is_indexed(self) -> bool:
        return not (self.path / WHOLE).is_file() and (self.path / INDEX).is_file()

    def _weights(self) -> list[Path]:
        if self._is_indexed:
            return sorted(self.path / name for name in _indexed(self.path / INDEX))
        whole = self.path / WHOLE
        return [whole] if whole.is_file() else sorted(self.path.glob("*.safetensors"))

    def held(self) -> dict[int, tuple[int, ...]] | None:
        """Get the experts of a partial checkpoint, by hidden layer; None for a whole checkpoint."""
        file = self.path / SHARE
        return read_json(file, HeldExperts).experts if file.is_file() else None


def reason(error: Exception) -> str:
    """Put an error of a library on one line of at most 240 characters, cut after a sentence or a word.

    >>> reason(KeyError("weight_map"))
    "KeyError: 'weight_map'"
    >>> reason(ValueError("It is too long. " + "Words " * 50))
    'ValueError: It is too long'
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    if len(text) <= _REASON_CHARACTERS:
        return text
    sentences, _, rest = text[:_REASON_CHARACTERS].rpartition(". ")
    return sentences or f"{rest.rpartition(' ')[0]} ..."


def _indexed(index: Path) -> set[str]:
    try:
        return file_names(bounded.read_json(index, bounded.INDEX)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} cannot be used: {reason(error)}", "Check that the checkpoint is complete.") from None


def find_named(model: str) -> Checkpoint:
    """Find the checkpoint of a folder or a hub id that the user named, and download it if needed.

    Raises: UsageError when there is no such checkpoint, ModelError when it cannot be downloaded.
    """
    return _find(model, None)


def find_settings(model: str) -> Checkpoint:
    """Find the settings of a checkpoint that the user named; its weights are not downloaded.

    Raises: what `find_named` raises.
    """
    return _find(model, None, weights=False)


def find(model: str, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint that a file of remoe names, and download it if needed.

    `revision` is a commit of a hub model; it is ignored for a folder.

    Raises: ModelError when there is no such checkpoint, or it cannot be downloaded.
    """
    try:
        return _find(model, revision)
    except UsageError as error:
        raise ModelError(error.message, error.hint) from None


def _find(model: str, revision: str | None, *, weights: bool = True) -> Checkpoint:
    path = _local(model)
    if path is not None:
        return Checkpoint(str(path), path)
    if Path(model).is_absolute() or model.count("/") != 1 or model.startswith((".", "~")):
        raise UsageError(
            f"There is no folder {model}, and it is not a hub id such as 'owner/name'.", "Check the path, or give a hub id OWNER/NAME."
        )
    return _fetch(model, revision, weights)


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
            # Bytes that are not UTF-8, which the library of tokenizers does not take.
            if any("\ud800" <= character <= "\udfff" for character in str(path)):
                raise UsageError(f"The path {path} is not UTF-8.", "Rename its folders.")
            if (path / "config.json").exists():
                refuse_files(path)
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


def find_profiled(model: str, revision: str, report: Report = no_report) -> Checkpoint:
    """Find the checkpoint that was profiled, and check that it is the same to the last byte.

    Whoever loads it should call its `check` again afterwards: its files may change meanwhile.

    Raises: ArtifactError when it is not the same, and what `find` and `Checkpoint.identify` raise.
    """
    checkpoint = find(model, None if revision.startswith("local:") else revision)
    checkpoint.check(revision, report)
    return checkpoint


def _refuse_damaged(files: Sequence[Path], digests: Sequence[str]) -> None:
    """Refuse files of the hub's cache that are not the hub's.

    The cache keeps each file under its digest and links to it: the sha256 of a large file, the one that git computes of a small one. Where
    the file system has no links, there is nothing to compare with.
    """
    if not any(file.is_symlink() for file in files):
        return
    for file, digest in zip(files, digests, strict=True):
        if not file.is_symlink():
            raise ModelError(f"{file} is not the hub's file: it was put in its place.", "Delete it, so that it is downloaded again.")
        blob = file.parent / file.readlink()
        if (len(blob.name) == 64 and digest != blob.name) or (len(blob.name) == 40 and _git_digest(blob) != blob.name):
            raise ModelError(f"{file} is damaged: it is not the file that the hub has.", f"Delete {blob}, so that it is downloaded again.")


def _git_digest(path: Path) -> str:
    head = f"blob {path.stat().st_size}\0".encode()
    with bounded.open_file(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.sha1(head, usedforsecurity=False)).hexdigest()


def _fetch(model: str, revision: str | None, weights: bool) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def download(commit: str | None, *names: str) -> Path:
        # Folders inside a repository hold copies of the weights in other formats.
        return Path(snapshot_download(model, revision=commit, allow_patterns=[*names], ignore_patterns=["*/*"], etag_timeout=10))

    try:
        folder = download(revision, *((WHOLE, INDEX) if weights else ()), *SETTINGS)
        if (
            weights and not (folder / WHOLE).is_file()
        ):  # the same weights may be there a second time, under names that the index does not have
            download(folder.name, *(_indexed(folder / INDEX) if (folder / INDEX).is_file() else [WEIGHTS]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"The model '{model}' cannot be downloaded from the hub: {reason(error)}",
            "Check the id and the network, or give a folder.",
        ) from None
    refuse_files(folder, in_cache=True)
    return Checkpoint(model, folder, folder.name)

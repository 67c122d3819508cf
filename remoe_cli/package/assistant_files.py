"""The files of an assistant beside those of a main function.

They lie in the same folder, so that one manifest names all, under names that nothing takes for files of the model: `config.json.assistant`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from remoe_cli import owned
from remoe_cli.model.checkpoint import Checkpoint
from remoe_cli.model.checkpoint_files import INDEX
from remoe_cli.profile.record import ModelRef

_SUFFIX = ".assistant"
_READ = {"config.json", "generation_config.json", INDEX}  # besides weights: an assistant gets tokens, and no text


def write_assistant(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the files of an assistant into the folder of a main function.

    Raises: ModelError for a checkpoint that is not whole.
    """
    for source in (*checkpoint.weight_files, *(file for file in checkpoint.files if file.name in _READ)):
        owned.copy_file(source, folder / f"{source.name}{_SUFFIX}")


@contextmanager
def packaged_assistant(folder: Path, reference: ModelRef | None) -> Iterator[Checkpoint | None]:
    """Show the assistant's files under their own names, while it is loaded."""
    if reference is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="remoe-assistant-") as view:
        for file in folder.glob(f"*{_SUFFIX}"):
            (Path(view) / file.name.removesuffix(_SUFFIX)).symlink_to(file.resolve())
        yield Checkpoint(reference.path, Path(view), reference.revision)

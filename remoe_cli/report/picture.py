"""Writing a picture whose metadata name remoe, so that it may be drawn again under the same name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from remoe_cli import owned, recognise
from remoe_cli.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".svg", ".pdf")


def refuse_picture(path: Path) -> None:
    """Refuse a path to which `save_picture` cannot write.

    Raises: UsageError for a suffix other than .png, .svg and .pdf, and where `owned.refuse_file` raises it.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"A picture cannot be written as '{path.suffix}'.", f"Give a name that ends in one of {', '.join(_SUFFIXES)}.")
    owned.refuse_file(path, recognise.PICTURE)


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure to a file in the format of its suffix.

    Raises: UsageError where `refuse_picture` does.
    """
    refuse_picture(path)
    kind = path.suffix[1:].lower()
    with owned.writing(path, recognise.PICTURE) as temporary:
        figure.savefig(temporary, format=kind, dpi=130, metadata={"Software" if kind == "png" else "Creator": recognise.MAKER})

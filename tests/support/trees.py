"""All that is below a folder, to compare it before and after."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def tree(folder: Path) -> dict[str, bytes | str]:
    """By name: the bytes of files, the targets of links, and what else there is; empty folders end in `/`."""
    found: dict[str, bytes | str] = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent) / name
            mode = path.lstat().st_mode
            key = str(path.relative_to(folder))
            if stat.S_ISLNK(mode):
                found[key] = f"-> {path.readlink()}"
            elif stat.S_ISREG(mode):
                found[key] = path.read_bytes()
            elif not stat.S_ISDIR(mode):
                found[key] = f"mode {mode:o}"
            elif not any(path.iterdir()):
                found[f"{key}/"] = b""
    return found

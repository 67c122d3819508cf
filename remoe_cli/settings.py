"""Where remoe keeps files. One environment variable moves each folder.

REMOE_CACHE_DIR    downloads and built models; may be deleted at any time
REMOE_STATE_DIR    deployments on this machine
REMOE_CONFIG_DIR   the user's own remoe.toml (cli/config_file.py)
REMOE_DEBUG=1      show tracebacks
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Return the folder of downloads and built models."""
    return Path(os.environ.get("REMOE_CACHE_DIR") or platformdirs.user_cache_path("remoe"))


def state_dir() -> Path:
    """Return the folder of deployments on this machine."""
    return Path(os.environ.get("REMOE_STATE_DIR") or platformdirs.user_state_path("remoe")).absolute()


def config_dir() -> Path:
    """Return the folder of the user's settings."""
    return Path(os.environ.get("REMOE_CONFIG_DIR") or platformdirs.user_config_path("remoe")).absolute()


FOLDERS = {
    "cache": ("REMOE_CACHE_DIR", cache_dir),
    "state": ("REMOE_STATE_DIR", state_dir),
    "config": ("REMOE_CONFIG_DIR", config_dir),
}


def debug() -> bool:
    """Tell whether to show tracebacks."""
    return os.environ.get("REMOE_DEBUG") == "1"

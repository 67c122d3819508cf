"""Where remoe keeps things. Each folder can be moved with one environment variable.

REMOE_CACHE_DIR   downloads and built models; can be deleted at any time
REMOE_STATE_DIR   deployments that stand on this machine
REMOE_DEBUG=1     show tracebacks
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    return Path(os.environ.get("REMOE_CACHE_DIR") or platformdirs.user_cache_path("remoe"))


def state_dir() -> Path:
    return Path(os.environ.get("REMOE_STATE_DIR") or platformdirs.user_state_path("remoe")).absolute()


def debug() -> bool:
    return os.environ.get("REMOE_DEBUG") == "1"

"""What a deployment tells a function about its shard."""

from __future__ import annotations

from pathlib import Path

from remoe_cli.artifacts import sha256_bytes
from remoe_cli.function.weights import read_head


def shard_environment(path: Path) -> dict[str, str]:
    """The environment of a function whose shard is on this machine's disk."""
    head = read_head(path)
    return {"REMOE_SHARD": str(path), "REMOE_SHARD_HEADER": f"{len(head)}:{sha256_bytes(head)}"}

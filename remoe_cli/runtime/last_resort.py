"""Compute the experts of a function that does not answer, in the main function.

They come from the function's own shard, which is read where the function reads it: on this machine's disk, or in S3. Its head and each
expert are checked against their digests, and the arithmetic is the function's own code, on experts in the function's form (ready.py). So a
row gets the same bits as from the function, where both have the same kind of processor and the same number of threads: numpy's BLAS may
add in another order otherwise, as it may between two instances of a function. On a machine that cannot compute packed experts they are made
ready, the log says so, and sums are in another order than the function's.

It is slower: an expert is read in the time of the token, and made ready unless it is packed. Few ready ones are kept, so that the main
function stays within the memory that the plan gives it. Packed ones take none.
"""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from remoe_cli.function.codec import Batch
from remoe_cli.function.errors import FunctionProcessorError, ShardDeniedError
from remoe_cli.function.expert_ffn import Expert, FfnSpec
from remoe_cli.function.packed import library
from remoe_cli.function.weights import Shard, ShardFile, ShardObject
from remoe_cli.runtime.server_config import ServedFunction

ROOM_BYTES = 64 << 20  # of experts that are kept ready; one that is larger is not kept
_log = logging.getLogger(__name__)


class LastResortError(Exception):
    """The main function cannot compute the experts either; the message says why."""


@dataclass(frozen=True)
class ShardPlace:
    """Where a shard is, below the place of all shards, and the size and digest of its head.

    form   in which its function computes the experts
    """

    where: str
    head_bytes: int
    head_sha256: str
    form: str = "ready"

    @classmethod
    def of(cls, function: ServedFunction) -> ShardPlace:
        """Look up the place of a function's shard."""
        return cls(function.shard, function.head_bytes, function.head_sha256, function.form)


def aws_environment(session: Any = None) -> Mapping[str, str]:
    """Return the environment with AWS credentials as they are now.

    They are those of `session`, or those that boto3 finds, of a role or a login too.

    Raises: ShardDeniedError when there are none.
    """
    import boto3

    session = session or boto3.Session(region_name=os.environ.get("AWS_REGION"))
    if (found := session.get_credentials()) is None:
        raise ShardDeniedError("there are no AWS credentials")
    now = found.get_frozen_credentials()
    given = {"AWS_ACCESS_KEY_ID": now.access_key, "AWS_SECRET_ACCESS_KEY": now.secret_key, "AWS_SESSION_TOKEN": now.token or ""}
    return os.environ | given | {"AWS_REGION": session.region_name or ""}


@dataclass
class LastResort:
    """Computes batches of any expert function of a deployment, in the form in which the function does.

    shards        the folder of all shards, or s3://BUCKET
    environment   has the credentials for S3; asked each time that a shard is opened
    room_bytes    of experts that are kept ready, of all functions; the least recently used go first
    """

    shards: str
    environment: Callable[[], Mapping[str, str]] = aws_environment
    room_bytes: int = ROOM_BYTES
    _opened: dict[ShardPlace, Shard] = field(default_factory=dict)
    _ready: OrderedDict[tuple[ShardPlace, int], Expert] = field(default_factory=OrderedDict)
    _closed_reads: int = 0
    _has_library: bool | None = None

    @property
    def reads(self) -> int:
        """Requests to S3 so far."""
        return self._closed_reads + sum(shard.reads for shard in self._opened.values())

    def compute(self, place: ShardPlace | None, batch: Batch) -> Batch:
        """Compute a batch as the function with the shard at `place` would.

        Raises: LastResortError, which says why it cannot.
        """
        if place is None:
            raise LastResortError("nobody knows where its shard is")
        start = time.perf_counter()
        ends = np.cumsum(batch.rows)
        try:
            shard = self._open(place, batch)
            parts = [
                self._expert(place, shard, e).run(batch.data[end - n : end])
                for e, n, end in zip(batch.experts, batch.rows, ends, strict=True)
            ]
        except Exception as error:  # whatever it is: the call that failed has to be named, and what it was billed kept
            if place in self._opened:  # it is opened again the next time, with credentials that are read again
                shard = self._opened.pop(place)
                shard.close()
                self._closed_reads += shard.reads
            raise LastResortError(f"{type(error).__name__}: {error}".rstrip(".")) from error
        return Batch(batch.dtype, batch.experts, batch.rows, np.concatenate(parts), int((time.perf_counter() - start) * 1e6))

    def shard(self, place: ShardPlace) -> Shard:
        """Open a shard anew. Raises: what the shards of function/weights.py raise."""
        where = f"{self.shards}/{place.where}"
        if where.startswith("s3://"):
            return ShardObject(where, place.head_bytes, place.head_sha256, self.environment())
        return ShardFile(Path(where), place.head_sha256)

    def _open(self, place: ShardPlace, batch: Batch) -> Shard:
        """Open a shard, if it is not, and bring the experts of a batch."""
        if place not in self._opened:
            self._opened[place] = self.shard(place)
        self._opened[place].bring(batch.experts)
        return self._opened[place]

    def _expert(self, place: ShardPlace, shard: Shard, expert: int) -> Expert:
        """Get an expert, and make it ready if needed. A packed one is a view of its shard, and takes no memory."""
        if (place, expert) not in self._ready:
            is_packed = place.form == "packed" and self._can_compute_packed()
            needed_bytes = 0 if is_packed else shard.head.expert_bytes(expert)
            while self._ready and sum(ready.weights_bytes for ready in self._ready.values()) > self.room_bytes - needed_bytes:
                self._ready.popitem(last=False)
            tensors = shard.packed(expert) if is_packed else shard.tensors(expert)
            made = Expert.of(tensors, FfnSpec(**shard.head.ffn))
            if needed_bytes > self.room_bytes:
                return made
            self._ready[place, expert] = made
        self._ready.move_to_end((place, expert))
        return self._ready[place, expert]

    def _can_compute_packed(self) -> bool:
        """Tell whether this machine can compute packed experts; the log says once that it cannot."""
        if self._has_library is None:
            try:
                library()
                self._has_library = True
            except FunctionProcessorError as error:
                self._has_library = False
                _log.warning("Experts of functions that do not answer are dequantised here, which is slower: %s.", error)
        return self._has_library

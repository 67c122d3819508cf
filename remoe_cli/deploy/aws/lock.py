"""The lock of a deployment: an object in its bucket, which only one of several can put there.

S3 puts an object with If-None-Match: * for one caller alone, and everybody sees it at once. Tags of a bucket are not like that: they may be
read as they were before. Who deploys holds the lock while the bucket is filled and the stack changes; who destroys, until all is gone.

A killed command leaves its lock. On the same machine the next command sees that the process is gone, and takes the lock over. Nobody can
see that from another machine: there the error names the owner, and the command that removes the lock.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from botocore.exceptions import ClientError

from remoe_cli import bounded
from remoe_cli.deploy.aws.names import LOCK_KEY
from remoe_cli.deploy.aws.session import code_of
from remoe_cli.deploy.aws.storage import GONE, Bucket
from remoe_cli.deploy.local.processes import start_time
from remoe_cli.errors import HeldError

Work = Literal["deploys", "destroys"]
_MOST_BYTES = 1 << 16  # of a lock, whoever wrote it
_TAKEN = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. `process` and `started` are those of the command on its `host`."""

    id: str
    who: str
    work: str
    host: str
    process: int
    started: str
    since: str

    @classmethod
    def of(cls, document: Any) -> Owner:
        """Read an owner, whatever somebody has put there."""
        given = document if isinstance(document, dict) else {}
        text = {name: str(given.get(name, "unknown")) for name in ("id", "who", "work", "host", "started", "since")}
        process = given.get("process")
        return cls(process=process if isinstance(process, int) else 0, **text)

    @property
    def is_gone(self) -> bool:
        """Return whether its process ran on this machine and has ended."""
        return self.host == _host() and self.process > 0 and start_time(self.process) != self.started


@contextmanager
def held(bucket: Bucket, name: str, work: Work) -> Iterator[None]:
    """Hold the lock of the deployment `name` while the block runs.

    Raises: HeldError when somebody else holds it, and when somebody destroys the bucket.
    """
    own = Owner(uuid.uuid4().hex, bucket.account.who, work, _host(), os.getpid(), start_time(os.getpid()) or "", _now())
    _take(bucket, name, own)
    try:
        yield
    finally:
        # What is there may be another's by now, whose owner was told how to remove a lock; then it stays.
        if (found := _read(bucket)) and found[0].id == own.id:
            bucket.drop(LOCK_KEY)


def owner(bucket: Bucket) -> Owner | None:
    """Return who holds the lock; None if nobody does."""
    found = _read(bucket)
    return found[0] if found else None


def _take(bucket: Bucket, name: str, own: Owner) -> None:
    condition = {"IfNoneMatch": "*"}
    if (found := _read(bucket)) and found[0].is_gone:
        condition = {"IfMatch": found[1]}
    try:
        bucket.put_small(LOCK_KEY, json.dumps(vars(own)).encode(), **condition)
    except ClientError as error:
        if code_of(error) in GONE:
            raise destroyed(bucket, name) from error
        if code_of(error) not in _TAKEN:
            raise
        now = owner(bucket)
        if now and now.id == own.id:
            return  # a call that was repeated because its answer was lost
        raise held_by(bucket, name, now) from error


def held_by(bucket: Bucket, name: str, owner: Owner | None) -> HeldError:
    """Say who holds the lock, since when, and how to remove the lock of a command that was killed."""
    who = f"{owner.who}, who {owner.work} the deployment '{name}' since {owner.since}" if owner else f"somebody, who works on '{name}'"
    process = f" (process {owner.process} on {owner.host})" if owner and owner.process else ""
    again = f"run 'remoe destroy {name} --target aws'" if owner and owner.work == "destroys" else "run it again"
    again += f" on {owner.host}, or" if owner else " there, or"
    return HeldError(
        f"The bucket {bucket.name} is held by {who}{process}.",
        f"When that is done, run the command again. If it was killed, {again} remove its lock: 'aws s3 rm {bucket.uri(LOCK_KEY)}'.",
    )


def refuse_held(bucket: Bucket, name: str) -> None:
    """Refuse to go on while somebody holds the lock; remove one whose command was killed on this machine.

    Raises: HeldError for a lock that is held.
    """
    if now := owner(bucket):
        if not now.is_gone:
            raise held_by(bucket, name, now)
        with held(bucket, name, "deploys"):
            pass  # taken over, and so given back


def destroyed(bucket: Bucket, name: str) -> HeldError:
    """Say that somebody has destroyed the deployment meanwhile."""
    return HeldError(
        f"The bucket {bucket.name} is gone: it was held by somebody, who destroys the deployment '{name}'.",
        "When that is done, run the command again.",
    )


def _read(bucket: Bucket) -> tuple[Owner, str] | None:
    """Return the lock's owner and its object's ETag."""
    try:
        answer = bucket.get(LOCK_KEY)
        body = answer["Body"].read(_MOST_BYTES)
    except ClientError as error:
        if code_of(error) in GONE:
            return None
        raise
    try:
        return Owner.of(bounded.parse_json(body)), answer["ETag"]
    except ValueError:
        return Owner.of(None), answer["ETag"]


def _host() -> str:
    return socket.gethostname()


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"

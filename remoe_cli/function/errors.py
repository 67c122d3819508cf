"""The named errors of an expert function. A class's name is the `errorType` of the invocation that it fails, so it is told from
others by whoever called; no answer goes out with an error.

| class | when | worth another try |
| --- | --- | --- |
| FrameError | the event is not a frame, or not one for these experts (codec.py) | no |
| WeightsError | the shard does not hold this expert, or is not a shard | no |
| ShardDigestError | the shard's head, or an expert, is not what its digest says | no |
| ShardTruncatedError | the object is shorter or longer than its head says | no |
| ShardMissingError | there is no such object or bucket (S3 says 404, to those who may list the bucket) | no |
| ShardDeniedError | S3 refuses: no permission, or no such object for those who may not list the bucket (403), no valid credentials | no |
| ShardUnreachableError | S3 does not answer, or answers that it cannot now, after a few tries here | yes |
| FunctionMemoryError | the function's memory does not hold one expert | no |
| FunctionStorageError | the function's /tmp does not hold its shard | no |
"""

from __future__ import annotations


class WeightsError(ValueError):
    """A shard that is damaged or does not hold what was asked for."""


class ShardDigestError(WeightsError):
    pass


class ShardTruncatedError(WeightsError):
    pass


class ShardMissingError(Exception):
    pass


class ShardDeniedError(Exception):
    pass


class ShardUnreachableError(Exception):
    pass


class FunctionMemoryError(Exception):
    pass


class FunctionStorageError(Exception):
    pass

"""The named errors of an expert function, which sends no response when it fails.

The name of a class is the `errorType` of the failed invocation, so the caller knows which error it is.

| class | when | worth another try |
| --- | --- | --- |
| FrameError | the event is not a frame, or not one for these experts (codec.py) | no |
| WeightsError | the shard does not hold this expert, or is not a shard | no |
| ShardDigestError | the shard's head, or an expert, does not have its digest | no |
| ShardTruncatedError | the object is shorter or longer than its head says | no |
| ShardMissingError | there is no such object or bucket (S3 answers 404 to those who may list the bucket) | no |
| ShardDeniedError | S3 answers 403: no permission, no valid credentials, or no such object for those who may not list the bucket | no |
| ShardUnreachableError | S3 does not answer, or is too busy, after a few tries here | yes |
| FunctionMemoryError | the function's memory cannot hold one expert | no |
| FunctionProcessorError | the processor lacks what packed experts need, or they are in a form that has no packed product | no |
| FunctionStorageError | the function's /tmp cannot hold its shard | no |
| FunctionTimeError | the rest of the experts would not be done before the function's time ends | no |
"""

from __future__ import annotations


class WeightsError(ValueError):
    pass


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


class FunctionTimeError(Exception):
    pass


class FunctionProcessorError(Exception):
    pass

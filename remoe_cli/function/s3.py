"""Reading ranges of one S3 object with the standard library alone.

Importing boto3 takes longer than all else in a cold start. Requests are signed by signing.py with the credentials that Lambda puts into the
environment. Connections are kept alive, and long ranges are read in parallel. Nothing here logs, and an error says nothing about a request
but its object.
"""

from __future__ import annotations

import http.client
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from urllib.parse import quote, urlsplit

from .errors import ShardDeniedError, ShardMissingError, ShardTruncatedError, ShardUnreachableError
from .signing import Credentials, signed

CHUNK_BYTES = 4 << 20
_THREADS = 4
_BUFFER_BYTES = 256 << 10
_TRIES = 3
_FIRST_PAUSE_S = 0.05  # doubles with each further try
_TIMEOUT_S = 5.0  # of each step of a request

Write = Callable[[memoryview, int], object]  # (bytes, their place in the object)


def _credentials(environment: Mapping[str, str]) -> Credentials:
    """Take the credentials and the region from the environment.

    Raises: ShardDeniedError when there are none.
    """
    try:
        region, token = environment["AWS_REGION"], environment.get("AWS_SESSION_TOKEN", "")
        return Credentials(environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"], token, region)
    except KeyError as missing:
        raise ShardDeniedError(f"the environment has no {missing.args[0]}") from None


class _TryAgain(Exception):
    """S3 could not answer this time, and may at the next try."""


class S3Object:
    """One object, `s3://BUCKET/KEY`, whose ranges several threads read in parallel.

    Credentials, region and endpoint come from the environment.
    """

    def __init__(self, url: str, environment: Mapping[str, str] = os.environ) -> None:
        self.url = url
        bucket, _, key = url.removeprefix("s3://").partition("/")
        self._credentials = _credentials(environment)
        endpoint = urlsplit(environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or "")
        self._path = f"/{quote(key, safe='/-_.~')}"
        if endpoint.netloc:
            self._host, self._path = endpoint.netloc, f"{endpoint.path.rstrip('/')}/{bucket}{self._path}"
        else:
            region = self._credentials.region
            self._host = f"{bucket}.s3.{region}.amazonaws.com" + (".cn" if region.startswith("cn-") else "")
        self._context = None
        if endpoint.scheme != "http":
            import ssl

            self._context = ssl.create_default_context()
        self._idle: list[http.client.HTTPConnection] = []
        self._requests: list[None] = []  # one for each; several threads append
        self._pool = ThreadPoolExecutor(_THREADS)

    @property
    def reads(self) -> int:
        """Requests to S3 so far, with those that failed: each is paid for."""
        return len(self._requests)

    def close(self) -> None:
        """Stop the threads and close the connections."""
        self._pool.shutdown()
        for connection in self._idle:
            connection.close()

    def read(self, first: int, last: int) -> tuple[bytes, int]:
        """Read the bytes from `first` to `last`, exclusive; also return the size of the whole object."""
        into = bytearray(last - first)

        def write(view: memoryview, at: int) -> None:
            into[at - first : at - first + len(view)] = view

        total = self._get(first, last, write)
        return bytes(into), total

    def fetch(self, ranges: Iterable[tuple[int, int]], write: Write) -> None:
        """Read all ranges, in parallel chunks, into `write`.

        Several threads call `write`, none of them after this returns.

        Raises: a Shard..Error of errors.py when a chunk cannot be read.
        """
        chunks = [(at, min(last, at + CHUNK_BYTES)) for first, last in ranges for at in range(first, last, CHUNK_BYTES)]
        done, _ = wait([self._pool.submit(self._get, first, last, write) for first, last in chunks])
        for chunk in done:
            chunk.result()

    def _get(self, first: int, last: int, write: Write) -> int:
        reason = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
            connection = self._take()
            try:
                total = self._try(connection, first, last, write)
            except Exception as error:
                connection.close()
                if not isinstance(error, (OSError, http.client.HTTPException, _TryAgain)):
                    raise
                reason = str(error) or type(error).__name__
            else:
                self._idle.append(connection)
                return total
        raise ShardUnreachableError(f"{self.url} could not be read in {_TRIES} tries: {reason}")

    def _try(self, connection: http.client.HTTPConnection, first: int, last: int, write: Write) -> int:
        headers = {"range": f"bytes={first}-{last - 1}"}
        self._requests.append(None)
        connection.request("GET", self._path, headers=signed("GET", self._host, self._path, headers, self._credentials, time.time()))
        response = connection.getresponse()
        if response.status != 206:
            self._refuse(response.status, response.read().decode("utf-8", "replace"))
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("content-range", ""))
        if not found or (int(found[1]), int(found[2])) != (first, last - 1):
            raise ShardTruncatedError(f"{self.url} does not have bytes {first} to {last}, but {response.headers.get('content-range')}")
        buffer, at = memoryview(bytearray(min(_BUFFER_BYTES, last - first))), first
        while at < last:
            count = response.readinto(buffer[: last - at])
            if not count:
                raise _TryAgain("the response ended early")
            write(buffer[:count], at)
            at += count
        return int(found[3])

    def _refuse(self, status: int, body: str) -> None:
        code = re.search(r"<Code>(\w+)</Code>", body)
        message = f"{self.url}: S3 answers {status}{' ' + code[1] if code else ''}"
        match status:
            case 404:
                raise ShardMissingError(message)
            case 416:
                raise ShardTruncatedError(message)
            case 429 | 500 | 502 | 503 | 504:
                raise _TryAgain(message)
            case _:
                raise ShardDeniedError(message)

    def _take(self) -> http.client.HTTPConnection:
        with suppress(IndexError):
            return self._idle.pop()
        if self._context is None:
            return http.client.HTTPConnection(self._host, timeout=_TIMEOUT_S)
        return http.client.HTTPSConnection(self._host, timeout=_TIMEOUT_S, context=self._context)

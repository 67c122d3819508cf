"""Messages of AWS's event streams, as InvokeWithResponseStream sends them.

Source: Smithy, "Amazon Event Stream Specification"; Lambda API reference, version 2021-11-15, InvokeWithResponseStream.
"""

from __future__ import annotations

import json
import struct
import zlib

CONTENT_TYPE = "application/vnd.amazon.eventstream"
_STRING = 7  # the type of a header's value


def message(payload: bytes, **headers: str) -> bytes:
    """Make one message; `_` in the name of a header stands for `-`.

    >>> message(b"x", event_type="PayloadChunk")[:4].hex()
    '0000002c'
    """
    head = b"".join(
        struct.pack(f">B{len(name)}sBH", len(name), name, _STRING, len(value)) + value
        for name, value in ((f":{name.replace('_', '-')}".encode(), value.encode()) for name, value in headers.items())
    )
    prelude = struct.pack(">II", 16 + len(head) + len(payload), len(head))
    body = prelude + struct.pack(">I", zlib.crc32(prelude)) + head + payload
    return body + struct.pack(">I", zlib.crc32(body))


def chunk(payload: bytes) -> bytes:
    """Make the message of a part of a response."""
    return message(payload, message_type="event", event_type="PayloadChunk", content_type="application/octet-stream")


def complete(error: bytes | None, log: str | None) -> bytes:
    """Make the last message: the error document of a function that failed, and its log's end in base64."""
    fields = {"ErrorCode": "Unhandled", "ErrorDetails": error.decode("utf-8", "replace")} if error is not None else {}
    fields |= {"LogResult": log} if log is not None else {}
    return message(json.dumps(fields).encode(), message_type="event", event_type="InvokeComplete", content_type="application/json")

"""The entry point of an expert function: rows by expert in, outputs by expert out.

Environment: REMOE_SHARD and REMOE_SHARD_HEADER name the function's shard (weights.py), REMOE_EXPERTS the form in which its experts are
computed, `ready` or `packed` (ready.py). The event {"health": true} is answered with what this process has imported, and how long each step
of its cold start took; with "bring", a list of experts, these are read before. The event {"end": true} ends this process: a caller sends it
after damaged answers, and Lambda starts a new one for the next event.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from . import ENTERED_S
from .codec import Batch, FrameError, from_wire, origin_of, pack, to_wire, unpack
from .deadline import refuse_late
from .errors import WeightsError
from .expert_ffn import Array
from .ready import ReadyExperts, form_of, room_bytes
from .weights import open_shard


class _Marshaller:
    """A JSON codec in place of the runtime client's, which takes 8 times as long for a 1 MB string.

    A JSON string is decoded to the bytes of its base64, anything else as JSON; bytes are encoded as a JSON string. A runtime client that
    allows no other codec passes the string as it is, and `handle` answers with one.
    """

    def unmarshal_request(self, request: bytes, content_type: str = "application/json") -> Any:
        return from_wire(request) if request[:1] == b'"' else json.loads(request)

    def marshal_response(self, response: Any) -> tuple[bytes, str]:
        body = to_wire(response) if isinstance(response, bytes) else json.dumps(response).encode()
        return body, "application/json"


with suppress(ImportError):
    from awslambdaric.lambda_runtime_client import LambdaRuntimeClient

    LambdaRuntimeClient.marshaller = _Marshaller()

_imported_s = time.perf_counter()
_shard = open_shard(os.environ)
_head_sha256 = os.environ["REMOE_SHARD_HEADER"].partition(":")[2]
_form = form_of(os.environ)
_experts = ReadyExperts(_shard, room_bytes(os.environ), _form)
_weights_s = time.perf_counter() - _imported_s  # opening the shard, and making experts ready so far
_cold_start: dict[str, float] | None = None
_logged_reads = 0


@contextmanager
def _counted() -> Iterator[None]:
    """Count the time inside as time for weights."""
    global _weights_s
    start = time.perf_counter()
    yield
    _weights_s += time.perf_counter() - start


def compute(batch: Batch, left_s: Callable[[], float] = lambda: inf) -> Batch:
    """Run every expert of the batch on its rows.

    `left_s` tells how long this invocation may still take. It ends as soon as the experts that are done say that the others take longer:
    what Lambda would end later costs more, and the next call would meet a cold start.

    Raises: FrameError when the rows do not fit the experts; FunctionTimeError when time does not suffice; what the shard raises.
    """
    if batch.dtype != _experts.spec.dtype:
        raise FrameError(f"rows are {batch.dtype}, this function's experts are {_experts.spec.dtype}")
    with _counted():
        _shard.bring(batch.experts)
    start = time.perf_counter_ns()
    ends = np.cumsum(batch.rows)
    outputs: list[Array] = []
    for e, n, end in zip(batch.experts, batch.rows, ends, strict=True):
        refuse_late(batch.rows, len(outputs), (time.perf_counter_ns() - start) / 1e9, left_s)
        outputs.append(_run(e, batch.data[end - n : end]))
    compute_us, origin = (time.perf_counter_ns() - start) // 1000, origin_of(_head_sha256, batch.check)
    return Batch(batch.dtype, batch.experts, batch.rows, np.concatenate(outputs), compute_us, origin)


def _run(expert: int, rows: Array) -> Array:
    with _counted():
        ready = _experts.get(expert)
    if rows.shape[1] != ready.width:
        raise FrameError(f"rows have width {rows.shape[1]}, this function's experts take {ready.width}")
    return ready.run(rows)


def handle(event: Any, context: Any) -> bytes | str | dict[str, Any]:
    """Handle one invocation: a frame, or a health request."""

    def left_s() -> float:
        return float(context.get_remaining_time_in_millis()) / 1000

    try:
        match event:
            case bytes():
                return _answer(event, left_s)
            case str():
                return to_wire(_answer(from_wire(f'"{event}"'.encode()), left_s))[1:-1].decode()
            case {"health": True}:
                _bring_ahead([int(expert) for expert in event.get("bring", ())])
                return _health()
            case {"end": True}:
                os._exit(1)  # a tidy end would be reported as an error of this event, and the process would go on
        raise FrameError("event is neither a frame nor a request for health or for the end")
    finally:
        _log_reads()


def _bring_ahead(experts: list[int]) -> None:
    """Read experts before they are asked for. One that cannot be read fails the calls that need it, and not the start."""
    try:
        with _counted():
            _shard.bring(experts)
    except Exception as error:
        if type(error) is WeightsError:  # an expert that is not this function's: the request is wrong
            raise
        print(f"remoe: experts could not be read ahead: {type(error).__name__}: {error}", flush=True)


def _log_reads() -> None:
    """Log how often S3 was read for this invocation, if it was: the caller's receipt counts it (runtime/invoke.py)."""
    global _logged_reads
    if (reads := _shard.reads) > _logged_reads:
        print(f"remoe: {reads - _logged_reads} reads of S3", flush=True)
        _logged_reads = reads


def _answer(frame: bytes, left_s: Callable[[], float]) -> bytes:
    global _cold_start
    begun_s, opened_s = time.perf_counter(), _weights_s
    response = pack(compute(unpack(frame), left_s))
    if _cold_start is None:
        _cold_start = _split(time.perf_counter() - begun_s - (_weights_s - opened_s))
    return response


def _split(first_result_s: float) -> dict[str, float]:
    """Divide this process's cold start: until our code began, imports, weights, first result.

    Weights are those of the first experts that were asked for. Waiting for the first event is in none of the steps.
    """
    return {
        "process_s": max(0.0, _age_s() - (time.perf_counter() - ENTERED_S)),
        "imports_s": _imported_s - ENTERED_S,
        "weights_s": _weights_s,
        "first_result_s": first_result_s,
    }


def _age_s() -> float:
    """Get the seconds since the kernel started this process.

    Field 22 of /proc/self/stat has whole clock ticks since boot, which is half a tick too early on average.
    """
    started = (int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) + 0.5) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _width() -> int:
    """Get the width of the experts' rows without making an expert ready."""
    return int(_shard.head.parameters(_shard.experts[0])["down_proj"][-1 if _experts.spec.transposed else -2])


def _health() -> dict[str, Any]:
    modules = sorted({name.partition(".")[0] for name in sys.modules})
    return {
        "experts": list(_shard.experts),
        "experts_ready": list(_experts.ids),
        "form": _form,
        "dtype": _experts.spec.dtype,
        "width": _width(),
        "cold_start": _cold_start,
        "modules": [name for name in modules if not name.startswith("_")],
    }

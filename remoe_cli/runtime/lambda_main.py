"""Run the main function as a Lambda function, of the same image as the container.

The whole model then costs nothing at rest. An event is a request of any API, as its payload shows (api/routes.py); the result is its
answer, or the API's error. With "stream" the answer is sent as it is generated (lambda_runtime.py): ask for it with
InvokeWithResponseStream, since Invoke gives all of its lines at once. On an instance of the function's own (lambda_runtime.streams) an
answer comes whole: in remoe's own API "stream" changes nothing there, and the others refuse it.

The model is loaded at the first event, because Lambda gives a function only 10 s to start: that event pays for loading, also for what its
expert functions are billed meanwhile. An answer ends before the function's own time ends, with the tokens that it has.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

from remoe_cli.runtime.api import routes
from remoe_cli.runtime.api.common import Api, Asked, Event, Refusal, fault_of
from remoe_cli.runtime.api.native import NATIVE
from remoe_cli.runtime.lambda_runtime import streams
from remoe_cli.runtime.load_main import load_packaged
from remoe_cli.runtime.main_function import Answer, MainFunction, parse, until
from remoe_cli.runtime.receipt import attach, failed_receipt, receipt_of
from remoe_cli.runtime.streamed import Streamed

_MARGIN_S = 3.0  # for the token under way, and the way back
_main: MainFunction | None = None


def handle(event: Any, context: Any) -> dict[str, Any] | Streamed:
    """Answer one event."""
    global _main
    begun_s = time.monotonic()
    limit_s = begun_s + context.get_remaining_time_in_millis() / 1000 - _MARGIN_S
    # Lambda has decoded the event, and APIs read JSON.
    body = json.dumps(event).encode()
    api, first = routes.of_payload(body), False
    try:
        if api is NATIVE:
            parse(event)  # what is wrong with it is said before anything is loaded
        first = _main is None
        if _main is None:
            _main = load_packaged(os.environ["REMOE_MAIN"])
        main = _main
        asked = api.parse(body, main)
        main.refuse(asked.request)
        if asked.request.stream and api is not NATIVE and not streams():
            raise Refusal(
                "The parameter 'stream' is not supported by a main function that scales to zero.", "Leave it out.", param="stream"
            )
        if asked.request.stream and streams():
            return Streamed(api.media_type, lambda write: _stream(main, api, asked, write, begun_s, limit_s, first=first))
        answer = main.answer(asked.request, stopped=until(limit_s), first=first)
        _log(answer)
        return api.whole(asked, answer)
    except Exception as error:
        if _main is not None:
            _bill(_main, error, begun_s, first=first)
        return api.error(fault_of(error, api.prompt))


def _stream(
    main: MainFunction, api: Api, asked: Asked, write: Callable[[bytes], None], begun_s: float, limit_s: float, *, first: bool
) -> None:
    """Answer a request, and write what happens as its API does."""
    lines = _Lines(api, asked, write)
    try:
        answer = main.answer(asked.request, lines.put, until(limit_s), first=first)
    except Exception as error:
        _bill(main, error, begun_s, first=first)
        lines.put(error)
    else:
        _log(answer)
        lines.put(answer)
    lines.end()


def _log(answer: Answer) -> None:
    # A client that has gone meanwhile does not take the receipt.
    print(f"remoe: expert functions were billed {answer.receipt.billed_ms} ms in {answer.receipt.invocations} calls", flush=True)


def _bill(main: MainFunction, error: Exception, begun_s: float, *, first: bool) -> None:
    """Give an error a receipt: what was refused before anything was called is billed for this function's time."""
    if receipt_of(error) is None:
        loading_calls = main.loading_calls if first else ()  # the time of loading is in this event's
        attach(error, failed_receipt(main.config.prices, time.monotonic() - begun_s, (), loading_calls=loading_calls))


class _Lines:
    """Writes the lines of an API's stream as soon as what they tell has happened, in the thread in which it happens.

    APIs write lines as asynchronous generators, since servers wait for many clients. Here there is one, and nothing to wait for: a
    generator runs until it asks for what has not happened yet.
    """

    def __init__(self, api: Api, asked: Asked, write: Callable[[bytes], None]) -> None:
        self._happened: deque[Event] = deque()
        self._ended, self._write = False, write
        self._lines = api.stream(asked, self._events())
        self._next = self._line()

    def put(self, event: Event) -> None:
        """Write all lines that an event makes."""
        self._happened.append(event)
        self._run()

    def end(self) -> None:
        """Write what is left."""
        self._ended = True
        self._run()

    async def _events(self) -> AsyncIterator[Event]:
        while True:
            while self._happened:
                yield self._happened.popleft()
            if self._ended:
                return
            await _Nothing()

    async def _line(self) -> str | None:
        return await anext(aiter(self._lines), None)

    def _run(self) -> None:
        while True:
            try:
                self._next.send(None)
                return  # it asks for more
            except StopIteration as line:
                if line.value is None:
                    return
                self._write(line.value.encode())
                self._next = self._line()


class _Nothing:
    """What a generator waits for when nothing has happened."""

    def __await__(self) -> Generator[None]:
        yield

"""Run the main function as a Lambda function, of the same image as the container.

The whole model then costs nothing at rest. An event is a request of any API, as its payload shows (api/routes.py); the result is its
answer, or the API's error. AWS's runtime client for Python does not stream, so an answer comes whole: in remoe's own API "stream" changes
nothing, and the others refuse it. The model is loaded at the first
event, because Lambda gives a function only 10 s to start: that event pays for loading, also for what its expert functions are billed
meanwhile. An answer ends before the function's own time ends, with the tokens that it has.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from remoe_cli.runtime.api import routes
from remoe_cli.runtime.api.common import Refusal, fault_of
from remoe_cli.runtime.api.native import NATIVE
from remoe_cli.runtime.main_function import MainFunction, load_packaged, parse, until
from remoe_cli.runtime.receipt import attach, failed_receipt, receipt_of

_MARGIN_S = 3.0  # for the token under way, and the way back
_main: MainFunction | None = None


def handle(event: Any, context: Any) -> dict[str, Any]:
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
        elif isinstance(event, dict) and event.get("stream"):
            raise Refusal("The parameter 'stream' is not supported by a main function on Lambda.", "Leave it out.", param="stream")
        first = _main is None
        if _main is None:
            _main = load_packaged(os.environ["REMOE_MAIN"])
        asked = api.parse(body, _main)
        answer = _main.answer(asked.request, stopped=until(limit_s), first=first)
        # In the log too: a client that has gone meanwhile does not take the receipt.
        print(f"remoe: expert functions were billed {answer.receipt.billed_ms} ms in {answer.receipt.invocations} calls", flush=True)
        return api.whole(asked, answer)
    except Exception as error:
        if _main is not None and receipt_of(error) is None:  # refused before anything was called, yet this function is billed
            loading_calls = _main.loading_calls if first else ()  # the time of loading is in this event's
            attach(error, failed_receipt(_main.config.prices, time.monotonic() - begun_s, (), loading_calls=loading_calls))
        return api.error(fault_of(error))

"""Run the main function as a Lambda function, of the same image as the container.

The whole model then costs nothing at rest. An event is a request as runtime/server.py takes it; the result is its answer, or {"error": ..}.
AWS's runtime client for Python does not stream, so an answer comes whole and "stream" changes nothing. The model is loaded at the first
event, because Lambda gives a function only 10 s to start: that event pays for loading, also for what its expert functions are billed
meanwhile. An answer ends before the function's own time ends, with the tokens that it has.
"""

from __future__ import annotations

import os
import time
from typing import Any

from remoe_cli.runtime.main_function import MainFunction, described, load_packaged, parse, until
from remoe_cli.runtime.receipt import attach, failed_receipt, receipt_of

_MARGIN_S = 3.0  # for the token under way, and the way back
_main: MainFunction | None = None


def handle(event: Any, context: Any) -> dict[str, Any]:
    """Answer one event."""
    global _main
    begun_s = time.monotonic()
    limit_s = begun_s + context.get_remaining_time_in_millis() / 1000 - _MARGIN_S
    try:
        request = parse(event)
        first = _main is None
        if _main is None:
            _main = load_packaged(os.environ["REMOE_MAIN"])
        answer = _main.answer(request, stopped=until(limit_s), first=first)
        # In the log too: a client that has gone meanwhile does not take the receipt.
        print(f"remoe: expert functions were billed {answer.receipt.billed_ms} ms in {answer.receipt.invocations} calls", flush=True)
        return answer.model_dump(mode="json")
    except Exception as error:
        if _main is not None and receipt_of(error) is None:  # refused before anything was called, yet this function is billed
            attach(error, failed_receipt(_main.config.prices, time.monotonic() - begun_s, ()))
        return {"error": described(error)}

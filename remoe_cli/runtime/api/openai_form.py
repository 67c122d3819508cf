"""Errors, usage and finish reasons as OpenAI's APIs write them."""

from __future__ import annotations

from typing import Any

from remoe_cli.runtime.api.common import Fault, receipt_of
from remoe_cli.runtime.main_function import Answer

# Types of errors as OpenAI's clients know them; every other status is a server error.
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# A time limit ends an answer early as a length does; `usage.remoe.finish_reasons` tells them apart.
FINISH = {"stop": "stop", "length": "length", "time-limit": "length"}


def error(fault: Fault) -> dict[str, Any]:
    kind = _TYPES.get(fault.status, "invalid_request_error" if fault.status < 500 else "server_error")
    return {"error": {"message": fault.message, "type": kind, "param": fault.param, "code": fault.code, **fault.receipt}}


def usage(answer: Answer) -> dict[str, Any]:
    prompt, generated = answer.receipt.prompt_tokens, answer.receipt.generated_tokens
    tokens = {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
    return {**tokens, "remoe": receipt_of(answer)}

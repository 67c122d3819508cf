"""Errors, usage and finish reasons as OpenAI's APIs write them."""

from __future__ import annotations

from typing import Any

from remoe_cli.runtime.api.common import Fault, Refusal, usage_receipt
from remoe_cli.runtime.main_function import Answer

# Types of errors as OpenAI's clients know them; every other status is a server error.
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# A time limit ends an answer early as a length does; `usage.remoe.finish_reasons` tells them apart.
FINISH = {"stop": "stop", "length": "length", "time-limit": "length"}


def error(fault: Fault) -> dict[str, Any]:
    kind = _TYPES.get(fault.status, "invalid_request_error" if fault.status < 500 else "server_error")
    return {"error": {"message": fault.message, "type": kind, "param": fault.param, "code": fault.code, **fault.receipt}}


def ends_with_usage(body: Any) -> bool:
    """Tell whether a stream ends with its usage.

    Raises: Refusal for options of a stream in a request without one.
    """
    if body.stream_options is not None and not body.stream:
        raise Refusal("The parameter 'stream_options' needs 'stream' to be true.", param="stream_options")
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def usage(answer: Answer) -> dict[str, Any]:
    prompt, generated = answer.receipt.prompt_tokens, answer.receipt.generated_tokens
    tokens = {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
    return {**tokens, "remoe": usage_receipt(answer)}

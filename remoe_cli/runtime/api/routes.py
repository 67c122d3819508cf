"""Which API a request is for: by its path, or where all have the same path, by its payload."""

from __future__ import annotations

from remoe_cli import bounded
from remoe_cli.runtime.api.chat import CHAT
from remoe_cli.runtime.api.common import Api
from remoe_cli.runtime.api.completions import COMPLETIONS
from remoe_cli.runtime.api.messages import MESSAGES
from remoe_cli.runtime.api.native import NATIVE
from remoe_cli.runtime.api.responses import RESPONSES

INVOCATIONS = "/invocations"
_OF_PATH = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": MESSAGES,
    "/v1/responses": RESPONSES,
}
PATHS = tuple(_OF_PATH)
# What a payload has that no payload before it in this list has. remoe's own requests name no model.
_OF_FIELD = (("anthropic_version", MESSAGES), ("input", RESPONSES), ("messages", CHAT), ("prompt", COMPLETIONS))


def of_payload(body: bytes) -> Api:
    """Return the API of a payload.

    Source: Bedrock's `anthropic_version`; vLLM's `/invocations`, which decides in the same way.
    """
    try:
        document = bounded.parse_json(body)
    except ValueError:
        return NATIVE
    if not isinstance(document, dict) or not ({"model", "anthropic_version"} & document.keys()):
        return NATIVE
    return next((api for name, api in _OF_FIELD if name in document), CHAT)


def of_path(path: str) -> Api:
    """Return the API in whose form a path answers and refuses."""
    path = path.removeprefix("/openai")
    if not path.startswith("/v1"):
        return NATIVE
    return next((api for begin, api in _OF_PATH.items() if path.startswith(begin)), CHAT)

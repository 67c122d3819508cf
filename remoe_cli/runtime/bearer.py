"""Answer only clients that send a token.

They send it as `Authorization: Bearer TOKEN`, or as `x-api-key: TOKEN`, which Anthropic's clients do.
Probes (/ping, /health, /ready) are answered to everybody. What is kept is a hash, and hashes are compared in constant time, so that neither
the time of an answer nor the memory of the process tells a token.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

from remoe_cli.runtime.api import routes
from remoe_cli.runtime.api.common import Refusal, fault_of
from remoe_cli.runtime.app import PROBES

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


def with_token(app: ASGIApp, token: str | None) -> ASGIApp:
    """Put an application behind a token; without one it stays as it is."""
    return app if token is None else _Bearer(app, token)


class _Bearer:
    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._hash = app, _hash(token.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES or self._has_token(scope):
            await self._app(scope, receive, send)
            return
        from starlette.responses import JSONResponse

        fault = fault_of(Refusal("The request has no token, or a wrong one.", "Send 'Authorization: Bearer TOKEN'.", status=401))
        document = routes.of_path(scope["path"]).error(fault)
        await JSONResponse(document, status_code=401, headers={"www-authenticate": "Bearer"})(scope, receive, send)

    def _has_token(self, scope: Scope) -> bool:
        given = [value.removeprefix(b"Bearer ") for name, value in scope["headers"] if name == b"authorization" and value[:7] == b"Bearer "]
        given += [value for name, value in scope["headers"] if name == b"x-api-key"]
        return any([hmac.compare_digest(_hash(value), self._hash) for value in given])


def _hash(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()

"""The doors of the twin's servers: who may ask the Invoke API, and who a worker's Runtime API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakKeyDictionary

from aiohttp import web

from remoe_cli.runtime import peers
from remoe_cli.runtime.access import NOT_YOURS, Door, Refusal

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
# (a connection's peer, its end here) -> whether that peer may ask
Allowed = Callable[[peers.Address, peers.Address], bool]
Answer = Callable[[int, str], web.Response]


def guard(door: Door | None, allowed: Allowed, answer: Answer) -> Any:
    """Make a middleware that refuses connections of those who are not `allowed`, and what `door` refuses.

    A connection is looked up once. `answer` makes a response of a status and a sentence.
    """
    seen: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

    def refusal(request: web.Request) -> Refusal | None:
        if (transport := request.transport) is None:  # the peer has gone
            return NOT_YOURS
        if peers.known() and transport not in seen:
            ends = (transport.get_extra_info(end) for end in ("peername", "sockname"))
            seen[transport] = allowed(*(end[:2] for end in ends))
        if not seen.get(transport, True):
            return NOT_YOURS
        return door.refusal(request.method, lambda name: request.headers.getall(name, [])) if door else None

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if (refused := refusal(request)) is not None:
            return answer(refused[0], refused[1].message)
        try:
            return await handler(request)
        except web.HTTPException as error:
            return answer(error.status, f"The local twin has no {request.method} {request.path}.")

    return middleware

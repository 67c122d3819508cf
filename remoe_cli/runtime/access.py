"""Decide which HTTP requests a server takes: none of web pages, and on loopback none of other users.

A web page can send requests to any address that its reader's machine reaches. It cannot read the answer without CORS headers, which no
server of remoe sends, but the request would be served. So a request has to name the server by an address that no name server can have
changed (DNS rebinding), may not come from a page of another origin, and has to be JSON, which a page cannot send without asking first.

Source: Fetch Standard, "CORS-safelisted request-header"; RFC 6454.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from remoe_cli.errors import UsageError
from remoe_cli.runtime import peers

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_ANY = ("", "0.0.0.0", "::")
_HOST = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]+))(?::\d+)?")
_SIGNED = "AWS4-HMAC-SHA256 "  # how AWS's own clients begin the header Authorization, which a page cannot send without asking

# From the name of a header to its values.
Values = Callable[[str], list[str]]
# The status of a refusal, and why.
Refusal = tuple[int, UsageError]

NOT_YOURS: Refusal = (
    403,
    UsageError("This server answers only processes of the user who started it.", "Run the command as that user."),
)


@dataclass(frozen=True)
class Door:
    """What a server takes.

    host       the address that it listens on; None: whoever asks knows it by a name that this program does not know
    own_user   only this user's processes may ask
    signed     a POST without a content type is taken when it is signed as AWS's clients do, which send none
    """

    host: str | None
    own_user: bool = False
    signed: bool = False

    def refusal(self, method: str, values: Values) -> Refusal | None:
        """Return why a request is refused; None for one that is taken."""
        hosts, origins, types = values("host"), values("origin"), values("content-type")
        if self.host is not None and (len(hosts) != 1 or not _names(hosts[0], self.host)):
            named = ", ".join(map(repr, hosts)) or "none"
            return 403, UsageError(f"This server does not answer to that host name: {named}.", f"Use {_url(self.host)}.")
        if any(origin.lower() not in {f"http://{host.lower()}" for host in hosts} for origin in origins):
            return 403, UsageError(f"This server takes no requests of web pages: {', '.join(map(repr, origins))}.", "Ask from a program.")
        if method in ("GET", "HEAD") or (self.signed and not types and any(v.startswith(_SIGNED) for v in values("authorization"))):
            return None
        if [each.partition(";")[0].strip().lower() for each in types] != ["application/json"]:
            named = ", ".join(map(repr, types)) or "none"
            return 415, UsageError(
                f"The request's content type is not application/json: {named}.", "Send the header 'Content-Type: application/json'."
            )
        return None


def door_of(listener: socket.socket, host: str) -> Door:
    """Return the door of a server that was told to listen on `host`.

    On loopback it serves one user; an address of a network is for whoever reaches it.
    """
    return Door(host, own_user=_is_loopback(listener.getsockname()[0]) and peers.known())


class Guarded:
    """An ASGI application behind a door; a refusal is a JSON document."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app, self._door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (refused := self._refusal(scope)) is None:
            await self._app(scope, receive, send)
            return
        from starlette.responses import JSONResponse

        status, error = refused
        await JSONResponse(described(error), status_code=status)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        if self._door.own_user and not (scope["client"] and peers.is_own_user(tuple(scope["client"]), tuple(scope["server"]))):
            return NOT_YOURS
        wanted: Values = lambda name: [value.decode("latin-1") for key, value in scope["headers"] if key == name.encode()]  # noqa: E731
        return self._door.refusal(scope["method"], wanted)


def described(error: UsageError) -> dict[str, Any]:
    return {"error": {"kind": error.kind, "message": error.message, "hint": error.hint}}


def _names(header: str, bound: str) -> bool:
    """Return whether the header Host names a server that listens on `bound`, on whatever port."""
    if not (found := _HOST.fullmatch(header)):
        return False
    name, bound = (found[1] or found[2]).lower(), bound.lower().removeprefix("[").removesuffix("]")
    if name in ("localhost", bound) or _is_loopback(name):
        return True
    # Of all addresses, any is this machine's; a name is, if it is the machine's own.
    return bound in _ANY and (_address(name) is not None or name == socket.gethostname().lower())


def _is_loopback(host: str) -> bool:
    ip = _address(host)
    return host == "localhost" if ip is None else ip.is_loopback


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return (ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else ip


def _url(host: str) -> str:
    shown = "127.0.0.1" if host in _ANY else host
    return f"http://[{shown}]:PORT" if ":" in shown else f"http://{shown}:PORT"

"""Invoke functions over kept connections, with requests that are signed here.

For each call botocore works out again what does not change between calls: user agent, headers, rules of endpoints and errors. That takes
several times as long as sending the request, and a token needs a call in each layer. So a DirectClient takes from botocore's client what
it found once (endpoint, region, credentials, which it keeps fresh, and certificates), and sends the same Invoke requests. It answers and
fails as botocore's client does, so callers need not know which one they have.

Source: Lambda API reference, version 2015-03-31, Invoke.
"""

from __future__ import annotations

import http.client
import select
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

from remoe_cli import __version__, bounded
from remoe_cli.function.signing import Credentials, signed
from remoe_cli.runtime import peers

_CONNECT_S = 5.0
_USER_AGENT = f"remoe/{__version__}"


@dataclass
class DirectClient:
    """Sends Invoke requests. Threads may share it: each request has its own connection while it lasts.

    credentials   returns those to sign the next request with
    context       None: without TLS
    check         called with host and port when a connection was made, before anything is sent
    """

    endpoint_url: str
    credentials: Callable[[], Credentials]
    timeout_s: float
    context: ssl.SSLContext | None = None
    check: Callable[[str, int], None] = lambda host, port: None
    _idle: list[http.client.HTTPConnection] = field(default_factory=list)

    def invoke(self, *, FunctionName: str, Payload: bytes, InvocationType: str, LogType: str) -> dict[str, Any]:
        """Do what `invoke` of botocore's client does, with the same parameters, result and errors."""
        at = urlsplit(self.endpoint_url)
        host, path = at.netloc, f"{at.path.rstrip('/')}/2015-03-31/functions/{quote(FunctionName, safe='')}/invocations"
        kind = {"x-amz-invocation-type": InvocationType, "x-amz-log-type": LogType, "user-agent": _USER_AGENT}
        headers = signed("POST", host, path, kind, self.credentials(), time.time(), Payload, "lambda")
        connection = self._take()
        try:
            connection.request("POST", path, Payload, headers)
            response = connection.getresponse()
        except Exception as error:
            connection.close()
            raise self._failure(error) from error
        body = _Body(self, connection, response)
        gave = {name.lower(): value for name, value in response.getheaders()}
        about = {"HTTPStatusCode": response.status, "HTTPHeaders": gave}
        if response.status >= 300:
            raise _refusal(about, bounded.read_stream(body, bounded.RESPONSE))
        named = {"LogResult": "x-amz-log-result", "FunctionError": "x-amz-function-error"}
        found = {name: gave[header] for name, header in named.items() if header in gave}
        return {"StatusCode": response.status, **found, "Payload": body, "ResponseMetadata": about}

    def close(self) -> None:
        """Close the connections that wait for a request."""
        while self._idle:
            self._idle.pop().close()

    def keep(self, connection: http.client.HTTPConnection) -> None:
        """Keep a connection, whose answer is read, for the next request."""
        self._idle.append(connection)

    def _take(self) -> http.client.HTTPConnection:
        """Return a connection that was kept and is still open, else a new one."""
        with suppress(IndexError):
            while True:
                kept = self._idle.pop()
                if kept.sock is not None and not _is_readable(kept.sock):
                    return kept
                kept.close()  # nothing was asked, so there is nothing to read but its end
        at = urlsplit(self.endpoint_url)
        host = at.hostname or ""
        made = (
            http.client.HTTPConnection(host, at.port, timeout=_CONNECT_S)
            if self.context is None
            else http.client.HTTPSConnection(host, at.port, timeout=_CONNECT_S, context=self.context)
        )
        try:
            made.connect()
        except OSError as error:
            raise self._failure(error, connecting=True) from error
        made.sock.settimeout(self.timeout_s)
        made.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        try:
            self.check(host, made.port)
        except Exception:
            made.close()
            raise
        return made

    def _failure(self, error: Exception, connecting: bool = False) -> Exception:
        """Make the error that botocore would raise."""
        from botocore import exceptions

        kind: Callable[..., Exception]
        match error:
            case ssl.SSLError():
                kind = exceptions.SSLError
            case TimeoutError():
                kind = exceptions.ConnectTimeoutError if connecting else exceptions.ReadTimeoutError
            case OSError() if connecting:
                kind = exceptions.EndpointConnectionError
            case OSError() | http.client.HTTPException():
                kind = exceptions.ConnectionClosedError
            case _:
                return error
        return kind(endpoint_url=self.endpoint_url, error=error)


@dataclass
class _Body:
    """The body of an answer. Its connection is kept when it was read to the end."""

    client: DirectClient
    connection: http.client.HTTPConnection
    response: http.client.HTTPResponse

    def read(self, amount: int) -> bytes:
        """Read so many bytes; none at the end.

        Raises: botocore's errors, also where the body ends early.
        """
        from botocore import exceptions

        was_open = not self.response.isclosed()
        try:
            piece = self.response.read(amount)
        except TimeoutError as error:
            self.connection.close()
            raise exceptions.ReadTimeoutError(endpoint_url=self.client.endpoint_url, error=error) from error
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()
            raise exceptions.ResponseStreamingError(error=error) from error
        if not piece and (left := self.response.length):
            self.connection.close()
            raise exceptions.IncompleteReadError(actual_bytes=0, expected_bytes=left)
        if was_open and self.response.isclosed() and not self.response.length and not self.response.will_close:
            self.client.keep(self.connection)
        return piece


def _is_readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _refusal(about: dict[str, Any], body: bytes) -> Exception:
    """Make botocore's error of an answer that is a refusal."""
    from botocore.exceptions import ClientError

    try:
        said = bounded.parse_json(body)
    except ValueError:
        said = {}
    said = said if isinstance(said, dict) else {}
    code = about["HTTPHeaders"].get("x-amzn-errortype") or said.get("code") or said.get("__type") or str(about["HTTPStatusCode"])
    message = said.get("message") or said.get("Message") or ""
    error = {"Code": str(code).partition(":")[0].rpartition("#")[2], "Message": str(message)}
    made: Exception = ClientError({"Error": error, "ResponseMetadata": about}, "Invoke")
    return made


def direct(client: Any, session: Any, timeout_s: float) -> Any:
    """Make a DirectClient of botocore's client and its session.

    Where a proxy is set, botocore's client is returned: it uses it.
    """
    from botocore import httpsession, utils
    from botocore.exceptions import NoCredentialsError

    url, region = client.meta.endpoint_url, client.meta.region_name
    if utils.get_environ_proxies(url):
        return client
    context = None
    if url.startswith("https:"):
        context = ssl.create_default_context(cafile=httpsession.get_cert_path(client._endpoint.http_session._verify))

    def credentials() -> Credentials:
        held = session.get_credentials()
        if held is None:
            raise NoCredentialsError
        now = held.get_frozen_credentials()  # botocore makes them new when they are about to expire
        return Credentials(now.access_key, now.secret_key, now.token or "", region)

    return DirectClient(url, credentials, timeout_s, context)


def direct_to_twin(endpoint: str, timeout_s: float) -> DirectClient:
    """Make a DirectClient of the local twin, with placeholders for credentials.

    Nothing is sent to a port that a process of another user has opened.
    """
    nobody = Credentials("local", "local", region="us-east-1")
    return DirectClient(endpoint, lambda: nobody, timeout_s, check=peers.require_own_listener)

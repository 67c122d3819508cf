"""Lambda's runtime for the main function: AWS's own client for Python, which also streams.

    python -m remoe_cli.runtime.lambda_runtime remoe_cli.runtime.lambda_main.handle

A handler that returns a `Streamed` has its result sent while it is made. AWS's client has no such results, so this one sends them to the
Runtime API itself, and leaves everything else to it.

Source: Lambda developer guide, "Building a custom runtime", response streaming.
"""

from __future__ import annotations

import http.client
import os
import sys
from typing import Any

from awslambdaric import __main__ as awslambdaric
from awslambdaric import bootstrap
from awslambdaric.lambda_config import LambdaConfigProvider
from awslambdaric.lambda_runtime_client import LambdaRuntimeClient
from awslambdaric.lambda_runtime_marshaller import LambdaMarshaller

from remoe_cli.errors import DeployError
from remoe_cli.runtime.streamed import Streamed

MODE_HEADER, STREAMING = "Lambda-Runtime-Function-Response-Mode", "streaming"
_TIMEOUT_S = 60.0  # for one write, to a server on the same machine


class _Marshaller(LambdaMarshaller):  # type: ignore[misc]
    def marshal_response(self, response: Any) -> tuple[Any, str]:
        if isinstance(response, Streamed):
            return response, response.content_type
        marshalled: tuple[Any, str] = super().marshal_response(response)
        return marshalled


class StreamingClient(LambdaRuntimeClient):  # type: ignore[misc]
    """A client of the Runtime API that also sends streamed results."""

    marshaller = _Marshaller()

    def post_invocation_result(
        self, invoke_id: str, result_data: Any, content_type: str = "application/json", invocation_id: str | None = None
    ) -> None:
        if isinstance(result_data, Streamed):
            self._stream(invoke_id, result_data)
        else:
            super().post_invocation_result(invoke_id, result_data, content_type, invocation_id)

    def _stream(self, invoke_id: str, result: Streamed) -> None:
        """Send a result in chunks; raises DeployError where the Runtime API does not take it."""
        connection = http.client.HTTPConnection(self.lambda_runtime_address, timeout=_TIMEOUT_S)
        try:
            connection.putrequest("POST", f"/2018-06-01/runtime/invocation/{invoke_id}/response")
            for name, value in ((MODE_HEADER, STREAMING), ("Transfer-Encoding", "chunked"), ("Content-Type", result.content_type)):
                connection.putheader(name, value)
            connection.endheaders()
            result.send(lambda part: connection.send(b"%x\r\n%b\r\n" % (len(part), part)) if part else None)
            connection.send(b"0\r\n\r\n")
            status = connection.getresponse().status
        finally:
            connection.close()
        if status != http.client.ACCEPTED:
            raise DeployError(f"Lambda's Runtime API answered {status} to a streamed result.", "Ask again.")


def streams() -> bool:
    """Tell whether this runtime streams: an instance of the function's own runs AWS's client as it is."""
    return LambdaConfigProvider.AWS_LAMBDA_MAX_CONCURRENCY not in os.environ


def main(arguments: list[str]) -> None:
    if streams():
        config = LambdaConfigProvider(arguments)
        bootstrap.run(config.handler, StreamingClient(config.api_address, config.use_thread_polling))
    else:
        awslambdaric.main(arguments)


if __name__ == "__main__":
    main(sys.argv)

"""Let an AWS client of the local twin connect to this user's processes only.

A port of a twin that has ended may be opened by anybody. boto3 has no setting for that, so the class of its connections is replaced.
"""

from __future__ import annotations

from typing import Any

from remoe_cli.runtime import peers


def only_own_user(client: Any) -> Any:
    """Return `client`, which then sends nothing to a port that a process of another user has opened."""
    from botocore.awsrequest import AWSHTTPConnection, AWSHTTPConnectionPool

    class Connection(AWSHTTPConnection):  # type: ignore[misc]
        def connect(self) -> None:
            super().connect()
            peers.require_own_listener(self.host, self.port)

    class Pool(AWSHTTPConnectionPool):  # type: ignore[misc]
        ConnectionCls = Connection

    client._endpoint.http_session._manager.pool_classes_by_scheme = {"http": Pool}
    return client

"""A Lambda client for the local twin, which reads no AWS configuration.

The twin needs no account. So nothing of what somebody has set for AWS may decide whether it answers: no profile, no file of ~/.aws, no
variable, no proxy, no certificates.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any


def twin_client(endpoint: str, config: Any) -> Any:
    """Make a client for the twin at `endpoint`, with placeholders for credentials."""
    import botocore.session
    from botocore.config import Config

    blank = {
        name: (None, None, default, convert)  # no name in a file, no environment variable
        for name, (_, _, default, convert) in botocore.session.Session.SESSION_VARIABLES.items()
    }
    nowhere = dict.fromkeys(("config_file", "credentials_file"), (None, None, os.devnull, None))
    session = botocore.session.Session(session_vars=blank | nowhere)
    session.register_component("data_loader", _builtin())
    return session.create_client(
        "lambda",
        region_name="us-east-1",
        endpoint_url=endpoint,
        verify=False,  # loads no file of certificates; the twin is on loopback and has no TLS
        aws_access_key_id="local",
        aws_secret_access_key="local",
        config=config.merge(Config(proxies={}, defaults_mode="legacy")),
    )


@cache
def _builtin() -> Any:
    """Read botocore's own descriptions of services, once in a process.

    Without ~/.aws/models, from where botocore would take another description of Lambda.
    """
    from botocore.loaders import Loader

    return Loader(extra_search_paths=[Loader.BUILTIN_DATA_PATH], include_default_search_paths=False)

"""Sign requests to AWS (Signature Version 4) with the standard library alone.

Source: IAM User Guide, "Create a signed AWS API request".
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote


@dataclass(frozen=True)
class Credentials:
    """AWS credentials and the region that they are used in. `repr` shows no secret."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str = field(default="", repr=False)
    region: str = ""


def signed(
    method: str,
    host: str,
    path: str,
    headers: Mapping[str, str],
    credentials: Credentials,
    now_s: float,
    body: bytes = b"",
    service: str = "s3",
) -> dict[str, str]:
    """Sign a request of `path`, which is quoted already, at the time `now_s`; return all its headers."""
    stamp, digest = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_s)), hashlib.sha256(body).hexdigest()
    all_headers = {**headers, "host": host, "x-amz-content-sha256": digest, "x-amz-date": stamp}
    if credentials.token:
        all_headers["x-amz-security-token"] = credentials.token
    names = sorted(all_headers)
    signed_path = path if service == "s3" else quote(path, safe="/-_.~")  # all but S3 quote it once more
    canonical = "\n".join((method, signed_path, "", *(f"{name}:{all_headers[name]}" for name in names), "", ";".join(names), digest))
    scope = f"{stamp[:8]}/{credentials.region}/{service}/aws4_request"
    to_sign = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{credentials.secret_key}".encode()
    for text in (*scope.split("/"), to_sign):
        key = hmac.digest(key, text.encode(), "sha256")
    all_headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}, SignedHeaders={';'.join(names)}, Signature={key.hex()}"
    )
    return all_headers

"""The client of expert functions: what it signs, which connections it keeps, and when it leaves the call to botocore."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotoCredentials
from botocore.exceptions import ClientError, SSLError

from remoe_cli.function import signing
from remoe_cli.function.signing import Credentials, signed
from remoe_cli.runtime.direct import DirectClient, direct, direct_to_twin
from remoe_cli.runtime.invoke import make_caller
from tests.support.endpoint import Endpoint, Reply, ok, refused
from tests.support.tls import certificate

ASKED = {"InvocationType": "RequestResponse", "LogType": "Tail"}


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint(lambda url, connections, timeout_s: direct_to_twin(url, timeout_s)) as made:
        made.script = [ok()]
        yield made


def call(endpoint: Endpoint, client: Any = None, name: str = "layer-001") -> bytes:
    answer: bytes = (client or endpoint.client).invoke(FunctionName=name, Payload=b'"QUJD"', **ASKED)["Payload"].read(1 << 20)
    return answer


@pytest.mark.parametrize("token", ["", "a/token+of=="])
@pytest.mark.parametrize("path", ["/2015-03-31/functions/layer-001/invocations", "/2015-03-31/functions/a%3Ab/invocations"])
def test_a_request_is_signed_as_botocore_signs_it(token: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the same time, for the same headers and body."""
    host, body = "lambda.eu-west-1.amazonaws.com", b'"QUJD"'
    wanted = {"x-amz-log-type": "Tail", "x-amz-content-sha256": signing.hashlib.sha256(body).hexdigest()}
    theirs = AWSRequest("POST", f"https://{host}{path}", headers=wanted, data=body)
    SigV4Auth(BotoCredentials("AKID", "secret/key", token or None), "lambda", "eu-west-1").add_auth(theirs)
    now = theirs.context["timestamp"]
    monkeypatch.setattr(signing.time, "gmtime", lambda _: time.strptime(now, "%Y%m%dT%H%M%SZ"))
    ours = signed("POST", host, path, wanted, Credentials("AKID", "secret/key", token, "eu-west-1"), 0.0, body, "lambda")
    assert ours.pop("host") == host
    assert ours == {name.lower(): value for name, value in theirs.headers.items()}


def test_a_connection_is_kept_until_the_other_side_closes_it(endpoint: Endpoint) -> None:
    endpoint.script = [ok(), refused(429, "TooManyRequestsException"), ok()]
    assert call(endpoint) == b'"QUJD"'
    (kept,) = endpoint.client._idle
    with pytest.raises(ClientError, match="TooManyRequests"):
        call(endpoint)  # the answer of a refusal is read as well
    assert call(endpoint) == b'"QUJD"'
    assert endpoint.client._idle == [kept]
    endpoint.script = [Reply(headers=ok().headers, closes=True), ok()]
    assert [call(endpoint), call(endpoint)] == [b'"QUJD"'] * 2
    assert endpoint.client._idle != [kept] and len(endpoint.requests) == 5


def test_an_answer_that_is_not_read_to_its_end_does_not_leave_its_connection_for_the_next(endpoint: Endpoint) -> None:
    body = endpoint.client.invoke(FunctionName="f", Payload=b'"QUJD"', **ASKED)["Payload"]
    assert body.read(2) == b'"Q' and endpoint.client._idle == []
    body.response.close()
    body.connection.close()


def test_a_function_is_named_by_its_arn_too(endpoint: Endpoint) -> None:
    call(endpoint, name="arn:aws:lambda:us-east-1:123456789012:function:f")
    assert endpoint.requests[-1][0] == "/2015-03-31/functions/arn%3Aaws%3Alambda%3Aus-east-1%3A123456789012%3Afunction%3Af/invocations"


def test_an_endpoint_may_have_a_path(endpoint: Endpoint) -> None:
    """Such as that of a gateway: boto3 sends there too."""
    client = direct_to_twin(f"{endpoint.url}/gateway/", 5.0)
    call(endpoint, client)
    client.close()
    assert endpoint.requests[-1][0] == "/gateway/2015-03-31/functions/layer-001/invocations"


def test_certificates_are_checked(tmp_path: Path) -> None:
    key, mine = certificate(tmp_path)
    with Endpoint() as endpoint:
        endpoint.script = [ok()]
        served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        served.load_cert_chain(mine, key)
        endpoint.server.socket = served.wrap_socket(endpoint.server.socket, server_side=True)
        url, known = endpoint.url.replace("http://127.0.0.1", "https://localhost"), ssl.create_default_context(cafile=str(mine))
        client = DirectClient(url, lambda: Credentials("a", "b", region="us-east-1"), 5.0, known)
        assert [call(endpoint, client), call(endpoint, client)] == [b'"QUJD"'] * 2
        client.close()
        with pytest.raises(SSLError, match="CERTIFICATE_VERIFY_FAILED"):
            call(endpoint, DirectClient(url, client.credentials, 5.0, ssl.create_default_context()))
        assert len(endpoint.requests) == 2


def test_on_aws_it_takes_over_what_botocore_has_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "AWS_ENDPOINT_URL", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    session = boto3.Session("AKID", "secret", "token", region_name="eu-west-1")
    made = make_caller(None, 2, 7.0, session)
    assert isinstance(made, DirectClient)
    assert (made.endpoint_url, made.timeout_s) == ("https://lambda.eu-west-1.amazonaws.com", 7.0)
    assert made.credentials() == Credentials("AKID", "secret", "token", "eu-west-1")
    assert made.context and made.context.verify_mode is ssl.CERT_REQUIRED and made.context.check_hostname
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    client = session.client("lambda")
    assert direct(client, session, 7.0) is client  # botocore knows how to use one

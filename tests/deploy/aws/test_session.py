"""Credentials, profiles and regions as boto3 users know them, and one clear line for each way in which they can be wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from remoe_cli.deploy.aws import session
from remoe_cli.deploy.aws.session import Account, plain_errors
from remoe_cli.errors import DeployError, RemoeError, UsageError
from tests.support import aws_account as aws

_IDENTITY = """<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult>
<Arn>arn:aws:iam::111122223333:user/ann</Arn><UserId>A</UserId><Account>111122223333</Account>
</GetCallerIdentityResult></GetCallerIdentityResponse>"""
_STACKS = """<DescribeStacksResponse xmlns="http://cloudformation.amazonaws.com/doc/2010-05-15/"><DescribeStacksResult><Stacks/>
</DescribeStacksResult></DescribeStacksResponse>"""


def refusal(code: str, message: str) -> str:
    return f"<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error></ErrorResponse>"


class Aws(ThreadingHTTPServer):
    """Answers each call with the next of `answers`, the last one for ever; `keys` are the access keys of the requests."""

    answers: list[tuple[int, str]]
    keys: list[str]


class _Handler(BaseHTTPRequestHandler):
    server: Aws

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.keys.append(self.headers["Authorization"].partition("Credential=")[2])
        status, body = self.server.answers[0] if len(self.server.answers) == 1 else self.server.answers.pop(0)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Aws]:
    with Aws(("127.0.0.1", 0), _Handler) as server:
        server.answers, server.keys = [(200, _IDENTITY)], []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        aws.use(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}")
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("code", "message", "said"),
    [
        ("ExpiredToken", "The security token included in the request is expired", "have expired: The security token"),
        ("InvalidClientTokenId", "The security token included in the request is invalid.", "does not accept these credentials"),
        ("SignatureDoesNotMatch", "The request signature we calculated does not match", "does not accept these credentials"),
        ("AccessDenied", "User ann is not authorized to perform: x", "may not call GetCallerIdentity: User ann is not authorized"),
        ("Strange", "Something else", r"AWS refused GetCallerIdentity: Something else. \(Strange\)"),
    ],
)
def test_refused_credentials(code: str, message: str, said: str, server: Aws) -> None:
    server.answers = [(403, refusal(code, message))]
    one_line(said)
    assert len(server.keys) == 1


def one_line(said: str, kind: type[RemoeError] = DeployError, **how: str) -> None:
    with pytest.raises(kind, match=said) as error:
        session.connect(**how)
    assert type(error.value) is kind and "\n" not in error.value.message and error.value.hint


def test_who_and_where(server: Aws, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The region: the option, then the environment, then the profile. The profile: the option, then AWS_PROFILE."""
    config = tmp_path / "config"
    profile = "[profile {0}]\nregion = eu-{0}-1\naws_access_key_id = key-{0}\naws_secret_access_key = s\n"
    config.write_text(profile.format("west") + profile.format("north"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    account = session.connect()
    assert (account.id, account.caller, account.region) == ("111122223333", "arn:aws:iam::111122223333:user/ann", "us-east-1")
    assert session.connect("eu-west-3").region == "eu-west-3"
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "ap-south-1")
    assert session.connect().region == "ap-south-1"
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_PROFILE", "west")
    assert session.connect().region == "eu-west-1"
    assert session.connect(profile="north").region == "eu-north-1"
    assert [key.partition("/")[0] for key in server.keys] == ["key", "key", "key", "key-west", "key-north"]


def test_what_is_missing(server: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    one_line("profile .*nobody.* could not be found", UsageError, profile="nobody")
    one_line("'moon west'", UsageError, region="moon west")
    monkeypatch.delenv("AWS_REGION")
    one_line("No AWS region is set", UsageError)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    one_line("There are no AWS credentials", region="us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    one_line("There are no AWS credentials: Partial credentials found in env", region="us-east-1")
    assert server.keys == []


def test_no_way_to_aws(server: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers = [(200, "<html>Sign in to the hotel's network</html")]
    one_line("The answer does not come from AWS")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    one_line("AWS cannot be reached")


def test_throttling_is_waited_out(server: Aws) -> None:
    account = session.connect()
    server.answers = [(400, refusal("Throttling", "Rate exceeded"))] * 2 + [(200, _STACKS)]
    with plain_errors():
        assert account.client("cloudformation").describe_stacks()["Stacks"] == []
    assert len(server.keys) == 4


def test_endpoints_of_china_have_another_domain(server: Aws) -> None:
    account = session.connect()
    assert account.suffix == "amazonaws.com"
    assert Account(account.session, "cn-north-1", account.id, account.caller).suffix == "amazonaws.com.cn"

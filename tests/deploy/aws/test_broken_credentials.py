"""Credentials and networks as they are broken in real life: one line each, exit code 1, the source and the profile, and no secret."""

from __future__ import annotations

import getpass
import http.server
import io
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from botocore.utils import ContainerMetadataFetcher

from remoe_cli.artifacts import write_json
from remoe_cli.cli import app
from remoe_cli.deploy import image as building
from remoe_cli.deploy.aws import credentials, session
from remoe_cli.errors import DeployError, UsageError
from remoe_cli.package.image import Image
from tests.support.synthetic import plan_by_hand

SECRET = "CANARY/wJalrXUtnFEMIbPxRfiCY+KEY"
KEYS = f"aws_access_key_id = AKIACANARYCANARY1234\naws_secret_access_key = {SECRET}\n"
OF_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "AKIACANARYCANARY1234", "AWS_SECRET_ACCESS_KEY": SECRET}
SSO = "sso_start_url = https://x.awsapps.com/start\nsso_region = us-east-1\nsso_account_id = 111122223333\nsso_role_name = r\n"
TOKENS = "sso/cache/e8be5486177c5b5392bd9aa76563515b29358e6e.json"
LOCAL = "http://127.0.0.1:1"


@dataclass(frozen=True)
class Row:
    """One way to be broken: files of ~/.aws, environment, and what the line says."""

    name: str
    says: str
    environment: Mapping[str, str] = field(default_factory=dict)
    config: str | bytes | None = None
    credentials: str | bytes | None = None
    more: Mapping[str, str] = field(default_factory=dict)  # files of the home folder

    def __str__(self) -> str:
        return self.name


def program(text: str, profile: str = "default") -> str:
    return f"[{'' if profile == 'default' else 'profile '}{profile}]\ncredential_process = {text}\n"


def printing(text: str, status: int = 0) -> Row:
    script = f"cat <<'END'\n{text}\nEND\necho 'stderr {SECRET}' >&2\nexit {status}\n"
    return Row("", "", config=program("sh HOME/program"), more={"program": script})


def program_row(name: str, text: str, says: str, status: int = 0) -> Row:
    made = printing(text, status)
    return Row(name, f"'sh' {says}.", config=made.config, more=made.more)


P = "credential_process"
EXPIRED = {"Version": 1, "AccessKeyId": "A", "SecretAccessKey": SECRET, "SessionToken": SECRET, "Expiration": "2020-01-01T00:00:00Z"}
KEYED = json.dumps({"Version": 1, "AccessKeyId": "AKIACANARYCANARY1234", "SecretAccessKey": SECRET, "Expiration": "tomorrow"})
ROWS = (
    program_row(f"{P} fails", SECRET, "failed with status 3", 3),
    program_row(f"{P} prints text", f"export AWS_SECRET_ACCESS_KEY={SECRET}", "has printed something other than JSON"),
    program_row(f"{P} prints nothing", "", "has printed something other than JSON"),
    program_row(f"{P} prints a list", "[1]", "has not printed an object with Version 1"),
    program_row(f"{P} prints another version", f'{{"Version": "{SECRET}"}}', "has not printed an object with Version 1"),
    program_row(f"{P} prints no keys", '{"Version": 1}', "has printed no AccessKeyId"),
    program_row(f"{P} prints one key", '{"Version": 1, "AccessKeyId": "AKIACANARYCANARY1234"}', "has printed no SecretAccessKey"),
    program_row(f"{P} prints a number", '{"Version": 1, "AccessKeyId": 1, "SecretAccessKey": 2}', "has printed no AccessKeyId"),
    Row(f"{P} prints no date", "tomorrow", config=program("sh HOME/program"), more={"program": f"echo '{KEYED}'"}),
    Row(f"{P} gives old keys", "still expired", config=program("sh HOME/program"), more={"program": f"echo '{json.dumps(EXPIRED)}'"}),
    Row(f"{P} hangs", "'sleep' has not answered within 0 s, and was ended.", config=program("sleep 1000")),
    Row(f"{P} is missing", "No such file or directory: /nowhere/program", config=program(f"/nowhere/program --password {SECRET}")),
    Row(f"{P} is no command", "No closing quotation", config=program("'sh")),
    Row(
        f"{P} of a source profile fails",
        "the role_arn in ~/.aws/config, profile 'dev'): 'false' failed with status 1.",
        {"AWS_PROFILE": "dev"},
        program("false", "source") + "[profile dev]\nrole_arn = arn:aws:iam::1:role/r\nsource_profile = source\n",
    ),
    Row(
        "web identity token file is missing",
        "(the web identity token, profile 'default'): No such file or directory: /nowhere/token",
        {"AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere/token", "AWS_ROLE_ARN": "arn:aws:iam::1:role/r"},
    ),
    Row("web identity without a role", "role_arn", {"AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere/token"}),
    Row(
        "files are missing",
        "in /nowhere/c (which is no file) or /nowhere/d (which is no file) (profile 'default')",
        {"AWS_SHARED_CREDENTIALS_FILE": "/nowhere/c", "AWS_CONFIG_FILE": "/nowhere/d"},
    ),
    Row("nothing is there", "There are no AWS credentials: Unable to locate credentials in the environment"),
    Row("files are folders", "There are no AWS credentials", {"AWS_SHARED_CREDENTIALS_FILE": "/tmp", "AWS_CONFIG_FILE": "/tmp"}),
    Row("a file that cannot be read", "Input/output error", {"AWS_CONFIG_FILE": "/proc/self/mem"}),
    Row("credentials that cannot be read", "Input/output error", {"AWS_SHARED_CREDENTIALS_FILE": "/proc/self/mem"}),
    Row("config is no INI file", "Unable to parse config file: HOME/.aws/config (profile 'default')", config=f"{KEYS}[["),
    Row("credentials are no INI file", "Unable to parse config file: HOME/.aws/credentials", credentials=f"{{{SECRET}}}\n"),
    Row("config is not UTF-8", "Unable to parse config file", config=f"[default]\n{KEYS}# caf".encode() + b"\xe9\n"),
    Row("credentials are UTF-16", "Unable to parse config file", credentials=f"[default]\n{KEYS}".encode("utf-16")),
    Row("credentials have half a pair", "aws_secret_access_key", credentials="[default]\naws_access_key_id = AKIACANARYCANARY1234\n"),
    Row("the environment has half a pair", "missing: AWS_SECRET_ACCESS_KEY", {"AWS_ACCESS_KEY_ID": "AKIACANARYCANARY1234"}),
    Row("a profile is missing", "The AWS profile 'absent' of AWS_PROFILE could not be found", {"AWS_PROFILE": "absent"}),
    Row("a source profile is missing", "gone", config="[default]\nrole_arn = arn:aws:iam::1:role/r\nsource_profile = gone\n"),
    Row(
        "source profiles go in a circle",
        "Infinite loop",
        {"AWS_PROFILE": "a"},
        "[profile a]\nrole_arn = r\nsource_profile = b\n[profile b]\nrole_arn = r\nsource_profile = a\n",
    ),
    Row("a role of an odd source", "Nothing", config="[default]\nrole_arn = arn:aws:iam::1:role/r\ncredential_source = Nothing\n"),
    Row(
        "MFA without a terminal",
        "it asks for the code of an MFA device, and there is no terminal.",
        {"AWS_PROFILE": "dev"},
        "[profile dev]\nrole_arn = arn:aws:iam::1:role/r\nsource_profile = base\nmfa_serial = arn:aws:iam::1:mfa/me\n",
        f"[base]\n{KEYS}",
    ),
    Row("SSO without a token", "(AWS SSO, profile 'default')", config=f"[default]\n{SSO}"),
    Row("SSO with a token that is no JSON", "(AWS SSO, profile 'default')", config=f"[default]\n{SSO}", more={f".aws/{TOKENS}": SECRET}),
    Row(
        "SSO with an old token",
        "(AWS SSO, profile 'default')",
        config=f"[default]\n{SSO}",
        more={f".aws/{TOKENS}": json.dumps({"accessToken": SECRET, "expiresAt": "2020-01-01T00:00:00Z"})},
    ),
    Row("SSO of half a profile", "sso_", config="[default]\nsso_start_url = https://x.awsapps.com/start\nsso_account_id = 1\n"),
    Row("SSO of a session that is missing", "gone", config="[default]\nsso_session = gone\nsso_account_id = 1\nsso_role_name = r\n"),
    Row(
        "a container's endpoint elsewhere",
        "(the container's credentials endpoint",
        {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://8.8.8.8/"},
    ),
    Row("a container's endpoint is no address", "(the container's credentials endpoint", {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "here"}),
    Row("a container's endpoint is down", "(the container's credentials endpoint", {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{LOCAL}/x"}),
    Row(
        "a container's token is missing",
        "No such file or directory: /nowhere/token",
        {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{LOCAL}/x", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "/nowhere/token"},
    ),
    Row(
        "a container's token has a line end",
        "(the container's credentials endpoint",
        {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{LOCAL}/x", "AWS_CONTAINER_AUTHORIZATION_TOKEN": f"{SECRET}\nx"},
    ),
    Row(
        "an instance's endpoint is odd",
        "metadata service",
        {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "]", "AWS_EC2_METADATA_DISABLED": "false"},
    ),
    Row("an instance's timeout is a word", "metadata service", {"AWS_METADATA_SERVICE_TIMEOUT": "soon"}),
    Row(
        "a session token has a line end",
        "the session token has characters that none can have (AWS_ACCESS_KEY_ID in the environment, profile 'default')",
        {**OF_ENVIRONMENT, "AWS_SESSION_TOKEN": f"{SECRET}\n{SECRET}"},
    ),
    Row("a key has a letter of no key", "the secret access key has characters", {**OF_ENVIRONMENT, "AWS_SECRET_ACCESS_KEY": f"é{SECRET}"}),
    Row("an endpoint has no scheme", "Invalid endpoint: localhost:4566", {**OF_ENVIRONMENT, "AWS_ENDPOINT_URL": "localhost:4566"}),
    Row("an endpoint is no address", "profile 'default'", {**OF_ENVIRONMENT, "AWS_ENDPOINT_URL": "http://[::"}),
    Row("an endpoint is down", "AWS cannot be reached: Could not connect", {**OF_ENVIRONMENT, "AWS_ENDPOINT_URL": LOCAL}),
    Row("a region is none", "'mars' is no AWS region.", {**OF_ENVIRONMENT, "AWS_REGION": "mars"}),
    Row("a region is a host", "'x.evil.org/?' is no AWS region.", {**OF_ENVIRONMENT, "AWS_REGION": "x.evil.org/?"}),
    Row("a proxy is down", "Failed to connect to proxy URL", {**OF_ENVIRONMENT, "HTTPS_PROXY": "http://me:wJalrXUtnFEM@127.0.0.1:1"}),
    Row("a proxy's password has a slash", "AWS cannot be reached", {**OF_ENVIRONMENT, "HTTPS_PROXY": f"http://me:{SECRET}@127.0.0.1:1"}),
    Row("a proxy is no address", "profile 'default'", {**OF_ENVIRONMENT, "HTTPS_PROXY": f"me:{SECRET}@[[["}),
    Row("a proxy of an odd kind", "profile 'default'", {**OF_ENVIRONMENT, "HTTPS_PROXY": "gopher://127.0.0.1:1"}),
    Row("certificates are missing", "/nowhere/ca.pem", {**OF_ENVIRONMENT, "AWS_CA_BUNDLE": "/nowhere/ca.pem"}),
    Row("certificates are a word", "it holds no certificates: /etc/hostname", {**OF_ENVIRONMENT, "REQUESTS_CA_BUNDLE": "/etc/hostname"}),
    Row("an option of regions is odd", "odd", {**OF_ENVIRONMENT, "AWS_STS_REGIONAL_ENDPOINTS": "odd"}),
    Row("a mode of defaults is odd", "odd", {**OF_ENVIRONMENT, "AWS_DEFAULTS_MODE": "odd"}),
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and an environment that says nothing about AWS."""
    for name in list(os.environ):
        if name.upper().startswith("AWS_") or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(credentials, "_PROGRAM_S", 0.2)
    monkeypatch.setattr(ContainerMetadataFetcher, "SLEEP_TIME", 0)
    monkeypatch.setattr(getpass, "getpass", getpass.fallback_getpass)  # as where there is no terminal
    (tmp_path / ".aws").mkdir()
    return tmp_path


def set_up(row: Row, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in row.environment.items():
        monkeypatch.setenv(name, value)
    for name, content in {".aws/config": row.config, ".aws/credentials": row.credentials, **row.more}.items():
        if content is not None:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_bytes(content if isinstance(content, bytes) else content.replace("HOME", str(home)).encode())


def one_line(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """Run the command; return its one line. Nothing that it prints has a secret."""
    monkeypatch.setattr(sys, "argv", ["remoe", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code = app.run()
    out, err = capfd.readouterr()
    *_, error, hint = err.splitlines()
    assert (code, out) == (1, ""), err
    assert error.startswith("error: ") and error.endswith(".") and hint.startswith("  hint: "), err
    assert not any(word in err for word in ("CANARY/", "wJalrX", "please report", "AKIACANARYCANARY", "Abort"))
    return error


@pytest.mark.sweep
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_one_line_that_names_source_and_profile(
    row: Row, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    set_up(row, home, monkeypatch)
    error = one_line(("status", "x", "--target", "aws"), monkeypatch, capfd)
    profile = row.environment.get("AWS_PROFILE", "default")
    assert row.says.replace("HOME", str(home)) in error and (f"'{profile}'" in error or "is no AWS region" in error), error
    if P in row.name or "token" in row.name:
        monkeypatch.setenv("REMOE_DEBUG", "1")
        one_line(("status", "x", "--target", "aws"), monkeypatch, capfd)


class Proxy(http.server.ThreadingHTTPServer):
    """Answers every request with `answer`: status, type, body. With `knows_who` the first question, who is asking, is answered rightly."""

    answer: tuple[int, str, str]
    knows_who: bool


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Proxy

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, kind, body = self.server.answer
        if self.server.knows_who and b"GetCallerIdentity" in asked:
            status, kind, body = 200, "text/xml", _IDENTITY
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST

    def log_message(self, *_: object) -> None:
        pass


_IDENTITY = """<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult>
<Arn>arn:aws:iam::111122223333:user/ann</Arn><UserId>A</UserId><Account>111122223333</Account>
</GetCallerIdentityResult></GetCallerIdentityResponse>"""


@pytest.fixture
def proxy(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        for name, value in {**OF_ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}"}.items():
            monkeypatch.setenv(name, value)
        server.knows_who = False
        yield server
        server.shutdown()
        thread.join()


PAGES = (
    (200, "text/html", "<html><body>Sign in</body></html>"),
    (200, "text/html", "<!DOCTYPE html><p>Sign in"),
    (200, "text/plain", "welcome"),
    (200, "application/json", "{}"),
    (200, "text/xml", "<a/>"),
    (200, "text/xml", ""),
    (403, "text/html", f"<html>blocked {SECRET}</html>"),
    (407, "text/html", "<html>proxy authentication</html>"),
    (503, "text/plain", "busy"),
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page[0]} {page[2][:12]}")
def test_what_a_proxy_says_is_not_taken_for_an_answer(
    page: tuple[int, str, str], proxy: Proxy, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    proxy.answer = page
    error = one_line(("status", "x", "--target", "aws"), monkeypatch, capfd)
    assert "The answer does not come from AWS" in error and "AWS_ACCESS_KEY_ID in the environment, profile 'default'" in error


CONTAINERS = (
    (500, "text/plain", f"denied:\n{SECRET}"),
    (200, "text/html", f"<html>{SECRET}</html>"),
    (200, "application/json", f'{{"SecretAccessKey": "{SECRET}"}}'),
    (200, "application/json", f'["{SECRET}"]'),
)


@pytest.mark.parametrize("answer", CONTAINERS, ids=lambda answer: f"{answer[0]} {answer[2][:5]!r}")
@pytest.mark.parametrize("debug", ["0", "1"])
def test_a_container_whose_endpoint_answers_oddly(
    answer: tuple[int, str, str], debug: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    proxy.answer = answer
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{proxy.server_address[1]}/x")
    monkeypatch.setenv("REMOE_DEBUG", debug)
    for name in OF_ENVIRONMENT:
        monkeypatch.delenv(name)
    error = one_line(("status", "x", "--target", "aws"), monkeypatch, capfd)
    assert "(the container's credentials endpoint, profile 'default')" in error


def test_keys_that_expire_while_a_command_runs_are_told(proxy: Proxy, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that answers once, and prints text when it is asked again."""
    for name in OF_ENVIRONMENT:
        monkeypatch.delenv(name)
    soon = {**EXPIRED, "Expiration": (datetime.now(UTC) + timedelta(seconds=70)).isoformat()}
    (home / "answer").write_text(json.dumps(soon))
    (home / ".aws" / "config").write_text(program(f"cat {home}/answer"))
    proxy.knows_who, proxy.answer = True, PAGES[0]
    account = session.connect()
    (home / "answer").write_text(f"log in first: {SECRET}")
    account.session.get_credentials()._expiry_time = datetime.now(UTC)
    with pytest.raises(DeployError) as error, session.plain_errors(account.origin):
        account.client("cloudformation").describe_stacks()
    assert "the credential_process in ~/.aws/config, profile 'default'): 'cat' has printed something other than JSON" in error.value.message


def test_a_push_to_ecr_says_it_too(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".aws" / "config").write_text(program("false"))
    image = Image(tmp_path, "0" * 64, False, "x86_64", "123456789012.dkr.ecr.eu-west-1.amazonaws.com/remoe")
    with pytest.raises(DeployError, match=r"the credential_process in ~/\.aws/config, profile 'default'\): 'false' failed with status 1"):
        building._password(image)


@pytest.mark.parametrize(
    ("code", "message", "hint"),
    [
        ("SignatureDoesNotMatch", "Signature expired: 20260101T000000Z is now earlier than 20260101T010000Z", "Set this machine's clock."),
        ("SignatureDoesNotMatch", "Signature not yet current: 20260101T000000Z", "Set this machine's clock."),
        ("RequestTimeTooSkewed", "The difference between the request time and the current time is too large.", "Set this machine's clock."),
        ("ExpiredToken", "The security token is expired", "Set the variables again"),
    ],
)
def test_a_wrong_clock_is_told_from_wrong_keys(code: str, message: str, hint: str, proxy: Proxy) -> None:
    proxy.answer = (403, "text/xml", f"<ErrorResponse><Error><Code>{code}</Code><Message>{message}</Message></Error></ErrorResponse>")
    with pytest.raises(DeployError, match=message[:10]) as raised:
        session.connect()
    assert raised.value.hint.startswith(hint) and "AWS_ACCESS_KEY_ID in the environment, profile 'default'" in raised.value.message


COMMANDS = (
    ("deploy", "PLAN", "--yes"),
    ("infer", "x", "--prompt", "p"),
    ("serve", "x"),
    ("status", "x"),
    ("logs", "x"),
    ("destroy", "x", "--yes"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_every_command_says_it(
    command: tuple[str, ...], proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "plan.json", plan_by_hand(()))
    given = tuple(str(tmp_path / "plan.json") if word == "PLAN" else word for word in (*command, "--target", "aws"))
    for proxy.knows_who, proxy.answer in ((False, PAGES[0]), (True, PAGES[2])):
        if not (proxy.knows_who and command[0] == "deploy"):  # which next reads its plan
            assert "The answer does not come from AWS" in one_line(given, monkeypatch, capfd)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{SECRET}\n{SECRET}")
    assert "the secret access key has characters that none can have" in one_line(given, monkeypatch, capfd)


def test_an_option_that_names_no_profile_is_wrong_usage(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"profile 'nobody' of --profile could not be found in ~/\.aws/config or ~/\.aws/credentials"):
        session.connect(profile="nobody")

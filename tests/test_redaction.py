"""What is a secret is never shown, from whichever source it comes; what is none stays readable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from remoe_cli import redaction
from remoe_cli.redaction import hide, redacted

SECRET = "CANARYwJalrXUtnFEMI"
FORMS = (SECRET, repr(SECRET), f"Invalid header value b'{SECRET}'", f"https://x/?q={SECRET}&y=1", f"({SECRET})", f"{SECRET}{SECRET}")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "HF_HOME", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


VARIABLES = (
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_CONTAINER_AUTHORIZATION_TOKEN", "HF_TOKEN"),
    *("HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "DB_PASSWORD", "REGISTRY_PASSWD", "MY_CREDENTIALS", "PROXY_AUTHORIZATION"),
)


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("value", [SECRET, f"{SECRET}\n", f"{SECRET}\n{SECRET[::-1]}", f"{SECRET} {SECRET}", f"{SECRET}/+=%é"])
def test_values_of_variables(name: str, value: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    for text in (value, repr(value), ascii(value), f"b{value.encode()!r}", " ".join(value.split()), json.dumps(value), *value.splitlines()):
        assert "CANARY" not in redacted(f"It says {text}."), text


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "http_proxy", "ALL_PROXY", "AWS_ENDPOINT_URL", "PIP_INDEX_URL", "HF_ENDPOINT"])
@pytest.mark.parametrize("password", [SECRET, f"{SECRET}/x", f"{SECRET}%2Fx", f"{SECRET}@x", f"{SECRET}#?"])
def test_passwords_in_addresses(name: str, password: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://me:{password}@proxy.example:3128"
    monkeypatch.setenv(name, url)
    for text in (f"{url}/x", url.removeprefix("http://"), password, repr(url)):
        assert "CANARY" not in redacted(f"Cannot reach {text}, says the network"), text
    assert "proxy.example:3128" in redacted(url)


FILES = {
    ".aws/credentials": f"[default]\naws_access_key_id = AKIAIOSFODNN7EXAMPLE\naws_secret_access_key = {SECRET}\n",
    ".aws/config": f"[[[broken\naws_session_token={SECRET}\n",
    ".aws/sso/cache/a.json": json.dumps({"startUrl": "https://x", "accessToken": SECRET, "expiresAt": "2030-01-01T00:00:00Z"}),
    ".aws/cli/cache/b.json": json.dumps({"Credentials": {"SecretAccessKey": SECRET, "SessionToken": "x" * 9}}),
    ".boto": f"[Credentials]\naws_secret_access_key = {SECRET}\n",
    ".cache/huggingface/token": f"{SECRET}\n",
}


@pytest.mark.parametrize("name", FILES)
def test_values_of_files(name: str, home: Path) -> None:
    (home / name).parent.mkdir(parents=True, exist_ok=True)
    (home / name).write_text(FILES[name])
    for text in FORMS:
        assert "CANARY" not in redacted(text)


@pytest.mark.parametrize("name", ["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "HF_TOKEN_PATH"])
def test_files_that_are_one_secret(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "one").write_text(f"{SECRET}\n")
    monkeypatch.setenv(name, str(home / "one"))
    assert redacted(f"{home / 'one'}: {SECRET}") == f"{home / 'one'}: ***"


def test_what_a_program_gave(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_hidden", set())
    hide(SECRET, None, "", "short")
    assert redacted(f"{SECRET} is short") == "*** is short"


SHAPES = {
    "the key AKIAIOSFODNN7EXAMPLE is unknown": "the key AKIAIOSF*** is unknown",
    "ASIAIOSFODNN7EXAMPLE/20260101/us-east-1": "ASIAIOSF***/20260101/us-east-1",
    "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY is wrong": "*** is wrong",
    "401 for hf_abcdefghijklmnopqrstuvwxyz": "401 for hf_***",
    "b'Authorization': b'AWS4-HMAC-SHA256 Credential=AKIA/x, Signature=abc'": "b'Authorization': b'***'",
    "Proxy-Authorization: Basic bWU6cHc=": "Proxy-Authorization: ***",
    "sent Bearer abcdefghijklmnop.qrs-tuv": "sent Bearer ***",
    "GET https://b.s3.amazonaws.com/k?X-Amz-Credential=AKIA%2F1&X-Amz-Signature=0123&x=1": (
        "GET https://b.s3.amazonaws.com/k?X-Amz-Credential=***&X-Amz-Signature=***&x=1"
    ),
    "https://hub.example/f?token=abcd": "https://hub.example/f?token=***",
    "https://user:pass@pypi.example/simple": "https://***@pypi.example/simple",
    "export AWS_SECRET_ACCESS_KEY=abcdefgh": "export AWS_SECRET_ACCESS_KEY=***",
    '{"SessionToken": "abcdefgh", "a": 1}': '{"SessionToken": "***", "a": 1}',
    "x-amz-security-token:abcdefgh": "x-amz-security-token:***",
    "token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln": "token ***",
}


@pytest.mark.parametrize("text", SHAPES)
def test_forms_of_secrets(text: str, home: Path) -> None:
    assert redacted(text) == SHAPES[text]


HARMLESS = (
    "Set AWS_PROFILE or --profile, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; 'aws configure' stores them.",
    "sha256 0123456789abcdef0123456789abcdef01234567 of /home/Ann1/models/Qwen3/30B/a3b/x/y/zzzzzzzz",
    "The prompt has 12 tokens: 1024 tokens are the most. Key: value",
    "arn:aws:sts::111122223333:assumed-role/Admin/ann@example.org on host.example",
    "file:///home/me/x, s3://bucket/main/abc.json, http://127.0.0.1:8080/invocations",
    "token: the word 'the' is no token id; the tokenizer of Qwen/Qwen3-30B-A3B has 151,936",
)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text: str, home: Path) -> None:
    assert redacted(text) == text

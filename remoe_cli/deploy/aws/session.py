"""Find the AWS account and region, make clients for it, and explain AWS's errors in one line each.

Credentials, profiles and regions are found as boto3 finds them: option first, then environment, then configuration files.
"""

from __future__ import annotations

import os
import re
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import boto3
from botocore import exceptions
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from remoe_cli.deploy.aws.credentials import Origin, broken, open_session
from remoe_cli.errors import DeployError, RemoeError, UsageError
from remoe_cli.runtime.failures import ACCESS_DENIED, EXPIRED_CREDENTIALS, LOG_IN, UNKNOWN_CREDENTIALS

CONNECTIONS = 16
# Lambda takes 15 control-plane calls a second from an account: adaptive clients slow down when they are told to.
_PATIENT = Config(retries={"mode": "adaptive", "max_attempts": 10}, max_pool_connections=CONNECTIONS, user_agent_appid="remoe")
# The first call: without a network or with wrong credentials the answer is to come at once.
_PROMPT = Config(retries={"mode": "standard", "max_attempts": 2}, connect_timeout=5, read_timeout=10)
_LOADERS = {"botocore.credentials", "botocore.tokens"}
_WITHOUT_BODY = ("HeadObject", "HeadBucket")  # whose refusals say no more than a status
_REACHING = (
    "AWS_ENDPOINT_URL",
    "AWS_CA_BUNDLE",
    "AWS_USE_",
    "AWS_MAX_ATTEMPTS",
    "AWS_RETRY_MODE",
    "AWS_DEFAULTS_MODE",
    "REQUESTS_CA_BUNDLE",
)
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@dataclass(frozen=True)
class Account:
    """One account in one region.

    caller   the ARN of the owner of the credentials
    origin   where the credentials come from
    profile  the one that an option names
    """

    session: boto3.Session
    region: str
    id: str
    caller: str
    _clients: dict[str, Any] = field(default_factory=dict, repr=False)
    _making: Lock = field(default_factory=Lock, repr=False)
    origin: Origin = field(default_factory=Origin)
    profile: str | None = None

    def client(self, service: str) -> Any:
        """Return the boto3 client of a service, made once.

        Threads may share a client, but may not make clients of one session at the same time.
        """
        with self._making:
            if service not in self._clients:
                self._clients[service] = self.session.client(service, config=_PATIENT)
            return self._clients[service]

    @property
    def suffix(self) -> str:
        """Return the domain of this partition's services, such as amazonaws.com."""
        partition = self.session.get_partition_for_region(self.region)
        return "amazonaws.com.cn" if partition == "aws-cn" else "amazonaws.com"

    @property
    def who(self) -> str:
        """Name the one who is at work, for others to read: the caller and the machine."""
        return f"{self.caller} on {socket.gethostname()}"


def connect(region: str | None = None, profile: str | None = None) -> Account:
    """Return the account that the credentials belong to.

    Raises: UsageError for an unknown profile and when no region is set; DeployError for credentials that are missing, wrong or expired, and
    when AWS is not reached.
    """
    with plain_errors(origin := Origin.named(profile)):
        session, origin = open_session(region or os.environ.get("AWS_REGION") or None, profile)
        session.events.register("after-call", _refuse_foreign_answers)
    with plain_errors(origin):
        _check_region(session.region_name, by_option=region is not None)
        identity = session.client("sts", config=_PROMPT).get_caller_identity()
        if not {"Account", "Arn"} <= identity.keys():
            raise ResponseParserError("it has no account.")
        return Account(session, session.region_name, identity["Account"], identity["Arn"], origin=origin, profile=profile)


def _check_region(region: str, by_option: bool) -> None:
    """Refuse what cannot be the name of a region, before it becomes a part of a host's name.

    Raises: UsageError for an option, DeployError for a variable or a file.
    """
    if not re.fullmatch(r"[a-z]{2,}(-[a-z]+)+-\d+", region):
        kind = UsageError if by_option else DeployError
        raise kind(
            f"{region!r} is no AWS region.", "Write it as AWS does, such as us-east-1: --region, AWS_REGION, or the profile's region."
        )


def _refuse_foreign_answers(http_response: Any, model: Any, **_: Any) -> None:
    """Refuse a page of a proxy in place of an answer, which botocore takes for an answer without content.

    Raises: ResponseParserError for it.
    """
    if model.output_shape is None or model.has_streaming_output or http_response.status_code >= 300:
        return
    start = http_response.content[:64].lstrip().lower()
    if start and (start.startswith((b"<!doctype", b"<html")) or start[:1] not in b"{[<"):
        raise ResponseParserError(f"{model.name} was answered with a text or a page.")


@contextmanager
def plain_errors(origin: Origin | None = None) -> Iterator[None]:
    """Turn errors of boto3 into RemoeErrors, which name where the credentials come from.

    botocore raises errors of its own classes, and those of the libraries below it where a setting has no sense. An error of remoe's own
    code passes.
    """
    try:
        yield
    except RemoeError:
        raise
    except (BotoCoreError, ClientError) as error:
        raise explained(error, origin) from error
    except ResponseParserError as error:
        raise _foreign_answer(_sentence(error), origin) from error
    except Exception as error:
        modules = _modules(error)
        if "botocore.parsers" in modules:
            raise _foreign_answer("it has another form.", origin) from error
        if modules & _LOADERS:
            raise broken(origin or Origin(), error) from error
        if not any(name.partition(".")[0] == "botocore" for name in modules):
            raise
        why = error.strerror or type(error).__name__ if isinstance(error, OSError) and error.filename else _sentence(error)
        message = _of(f"AWS cannot be reached with these settings: {why}", origin)
        raise DeployError(message, f"Correct the settings of AWS and of the network.{_settings()}") from error


def _modules(error: Exception) -> set[str]:
    """Return the names of the modules through which an error came."""
    return {str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)}


def _foreign_answer(why: str, origin: Origin | None) -> DeployError:
    hint = f"Something between here and AWS may answer in its place, such as a proxy or a sign-on page.{_settings()}"
    return DeployError(_of(f"The answer does not come from AWS: {why}", origin), hint)


def _settings() -> str:
    """Name the variables that are set here and that decide where and how AWS is reached."""
    found = [name for name in os.environ if name.startswith(_REACHING) or name.upper() in _PROXIES]
    return f" Set here: {', '.join(sorted(found))}." if found else ""


def _of(message: str, origin: Origin | None) -> str:
    return f"{message} Credentials: {origin}." if origin else message


def explained(error: BotoCoreError | ClientError, origin: Origin | None = None) -> RemoeError:
    """Explain an error in one sentence, with a hint."""
    match error:
        case ClientError():
            return _refusal(error, origin)
        case exceptions.NoRegionError():
            return UsageError("No AWS region is set.", "Give --region REGION, or set AWS_DEFAULT_REGION or 'region' in ~/.aws/config.")
        case exceptions.InvalidRegionError():
            return UsageError(_sentence(error), "Give --region as AWS writes it, such as us-east-1.")
        case exceptions.NoCredentialsError() | exceptions.PartialCredentialsError():
            return DeployError(
                _of(f"There are no AWS credentials: {error}.", origin),
                "Set AWS_PROFILE or --profile, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; 'aws configure' stores them.",
            )
        case exceptions.HTTPClientError() | exceptions.ConnectionError():
            hint = f"Check the network, the proxy and the region's name.{_settings()}"
            return DeployError(_of(f"AWS cannot be reached: {_sentence(error)}", origin), hint)
        case _ if _modules(error) & _LOADERS:  # loaded again, when those of the start had expired
            return broken(origin or Origin(), error)
        case _:
            message = _of(f"boto3 refused the call: {_sentence(error)}", origin)
            return DeployError(message, f"Correct the settings of AWS.{_settings()}")


def _refusal(error: ClientError, origin: Origin | None) -> RemoeError:
    code, metadata = code_of(error), error.response.get("ResponseMetadata", {})
    message = _sentence(error.response.get("Error", {}).get("Message") or code)
    if (not code or code.isdigit()) and not metadata.get("RequestId") and error.operation_name not in _WITHOUT_BODY:
        status = metadata.get("HTTPStatusCode", code)
        return _foreign_answer(f"{error.operation_name} was answered with status {status} and no error of AWS.", origin)
    if code == "RequestTimeTooSkewed" or message.startswith(("Signature expired", "Signature not yet current")):
        return DeployError(_of(f"AWS does not accept these credentials: {message}", origin), "Set this machine's clock.")
    log_in = origin.hint if origin and origin.method else LOG_IN
    if code in EXPIRED_CREDENTIALS:
        return DeployError(_of(f"The AWS credentials have expired: {message}", origin), log_in)
    if code in UNKNOWN_CREDENTIALS:
        return DeployError(_of(f"AWS does not accept these credentials: {message}", origin), log_in)
    if code in ACCESS_DENIED:
        return DeployError(
            _of(f"These credentials may not call {error.operation_name}: {message}", origin),
            "Use others, or ask for the permission that it names.",
        )
    return DeployError(f"AWS refused {error.operation_name}: {message} ({code})", "Fix what it names, then run the command again.")


def code_of(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _sentence(error: object) -> str:
    text = " ".join(str(error).split())
    return text if text.endswith((".", "!", "?")) else f"{text}."

"""Find the AWS account and region, make clients for it, and explain AWS's errors in one line each.

Credentials, profiles and regions are found as boto3 finds them: option first, then environment, then configuration files.
"""

from __future__ import annotations

import os
import socket
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

from remoe_cli.errors import DeployError, RemoeError, UsageError
from remoe_cli.runtime.failures import ACCESS_DENIED, EXPIRED_CREDENTIALS, LOG_IN, UNKNOWN_CREDENTIALS

CONNECTIONS = 16
# Lambda takes 15 control-plane calls a second from an account: adaptive clients slow down when they are told to.
_PATIENT = Config(retries={"mode": "adaptive", "max_attempts": 10}, max_pool_connections=CONNECTIONS, user_agent_appid="remoe")
# The first call: without a network or with wrong credentials the answer is to come at once.
_PROMPT = Config(retries={"mode": "standard", "max_attempts": 2}, connect_timeout=5, read_timeout=10)


@dataclass(frozen=True)
class Account:
    """One account in one region. `caller` is the ARN of the owner of the credentials."""

    session: boto3.Session
    region: str
    id: str
    caller: str
    _clients: dict[str, Any] = field(default_factory=dict, repr=False)
    _making: Lock = field(default_factory=Lock, repr=False)

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
    with plain_errors():
        session = boto3.Session(profile_name=profile, region_name=region or os.environ.get("AWS_REGION") or None)
        if not session.region_name:
            raise exceptions.NoRegionError()
        identity = session.client("sts", config=_PROMPT).get_caller_identity()
        return Account(session, session.region_name, identity["Account"], identity["Arn"])


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn errors of boto3 into RemoeErrors."""
    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise explained(error) from error
    except ResponseParserError as error:
        hint = "Something between here and AWS may answer in its place, such as a proxy or a sign-on page."
        raise DeployError(f"The answer does not come from AWS: {_sentence(error)}", hint) from error


def explained(error: BotoCoreError | ClientError) -> RemoeError:
    """Explain an error in one sentence, with a hint."""
    match error:
        case ClientError():
            return _refusal(error)
        case exceptions.NoRegionError():
            return UsageError("No AWS region is set.", "Give --region REGION, or set AWS_DEFAULT_REGION or 'region' in ~/.aws/config.")
        case exceptions.InvalidRegionError():
            return UsageError(_sentence(error), "Give --region as AWS writes it, such as us-east-1.")
        case exceptions.ProfileNotFound():
            return UsageError(_sentence(error), "'aws configure list-profiles' lists the profiles; see --profile and AWS_PROFILE.")
        case exceptions.ConfigParseError():
            return UsageError(_sentence(error), "Fix the file, or name another one in AWS_CONFIG_FILE.")
        case exceptions.NoCredentialsError() | exceptions.PartialCredentialsError():
            return DeployError(
                f"There are no AWS credentials: {error}.",
                "Set AWS_PROFILE or --profile, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; 'aws configure' stores them.",
            )
        case exceptions.SSOError() | exceptions.TokenRetrievalError() | exceptions.CredentialRetrievalError():
            return DeployError(f"The AWS credentials cannot be loaded: {_sentence(error)}", LOG_IN)
        case exceptions.HTTPClientError() | exceptions.ConnectionError():
            return DeployError(f"AWS cannot be reached: {_sentence(error)}", "Check the network, the proxy and the region's name.")
        case _:
            return DeployError(f"boto3 refused the call: {_sentence(error)}", "Run again with REMOE_DEBUG=1 for a traceback.")


def _refusal(error: ClientError) -> RemoeError:
    code = error.response["Error"].get("Code", "")
    message = _sentence(error.response["Error"].get("Message") or code)
    if code in EXPIRED_CREDENTIALS:
        return DeployError(f"The AWS credentials have expired: {message}", LOG_IN)
    if code in UNKNOWN_CREDENTIALS:
        return DeployError(f"AWS does not accept these credentials: {message}", LOG_IN)
    if code == "RequestTimeTooSkewed":
        return DeployError(f"AWS does not accept these credentials: {message}", "Set this machine's clock.")
    if code in ACCESS_DENIED:
        return DeployError(
            f"These credentials may not call {error.operation_name}: {message}", "Use others, or ask for the permission that it names."
        )
    return DeployError(f"AWS refused {error.operation_name}: {message} ({code})", "Fix what it names, then run the command again.")


def code_of(error: ClientError) -> str:
    return str(error.response["Error"].get("Code", ""))


def _sentence(error: object) -> str:
    text = " ".join(str(error).split())
    return text if text.endswith((".", "!", "?")) else f"{text}."

"""Open a session with AWS's credentials, and say from where they could not be had.

boto3 finds credentials, as everywhere: environment, profile, SSO, roles, a program (credential_process), containers, instances. It answers
what is broken about them with some thirty classes of errors, from a KeyError to the output of a program. Here each becomes one sentence
that names the source and the profile, and shows nothing of what the source said that may be secret.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import boto3
import botocore.session
from botocore import exceptions
from botocore.credentials import ProcessProvider

from remoe_cli.errors import DeployError, RemoeError, UsageError
from remoe_cli.redaction import hide

# A program that is asked for credentials must answer within this. A person may have to log in where there is a terminal.
_PROGRAM_S, _PROGRAM_WITH_TERMINAL_S = 20.0, 120.0
_FILES = (("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), ("AWS_CONFIG_FILE", "~/.aws/config"))
_FIX_FILE = "Correct the file, or name another one in AWS_CONFIG_FILE or AWS_SHARED_CREDENTIALS_FILE."
_CHECK = "'aws sts get-caller-identity' tells whether they work."
# botocore's name of a source -> the source in words, and what to do about it. PROFILE is the profile's name.
_SOURCES: Mapping[str, tuple[str, str]] = {
    "env": ("AWS_ACCESS_KEY_ID in the environment", f"Set the variables again; {_CHECK}"),
    "shared-credentials-file": ("CREDENTIALS", f"Store new ones with 'aws configure --profile PROFILE'; {_CHECK}"),
    "config-file": ("CONFIG", f"Store new ones with 'aws configure --profile PROFILE'; {_CHECK}"),
    "custom-process": ("the credential_process in CONFIG", "Run the program by hand to see what it answers, and correct the profile."),
    "assume-role": ("the role_arn in CONFIG", f"Correct the profile and those that it names as source_profile; {_CHECK}"),
    "assume-role-with-web-identity": ("the web identity token", "Correct AWS_WEB_IDENTITY_TOKEN_FILE, or the profile that names the file."),
    "sso": ("AWS SSO", "Log in again: 'aws sso login --profile PROFILE'."),
    "login": ("'aws login'", "Log in again: 'aws login --profile PROFILE'."),
    "container-role": ("the container's credentials endpoint", "Correct AWS_CONTAINER_CREDENTIALS_FULL_URI and what its service answers."),
    "iam-role": ("the instance's metadata service", "Correct AWS_EC2_METADATA_SERVICE_ENDPOINT, or give another source of credentials."),
    "boto-config": ("the file of boto", "Correct the file that BOTO_CONFIG names."),
    "ec2-credentials-file": ("AWS_CREDENTIAL_FILE", "Correct the file that AWS_CREDENTIAL_FILE names."),
}


@dataclass(frozen=True)
class Origin:
    """Where the credentials of a session come from: botocore's name of the source, and the profile."""

    method: str = ""
    profile: str = "default"

    @classmethod
    def named(cls, profile: str | None) -> Origin:
        """Name the profile that botocore takes: the one that is given, else that of its variables."""
        return cls(profile=profile or os.environ.get("AWS_DEFAULT_PROFILE") or os.environ.get("AWS_PROFILE") or "default")

    def __str__(self) -> str:
        source = _SOURCES.get(self.method, (self.method, ""))[0].replace("CREDENTIALS", _credentials()).replace("CONFIG", _config())
        return f"{source}, profile '{self.profile}'" if source else f"profile '{self.profile}'"

    @property
    def hint(self) -> str:
        return _SOURCES.get(self.method, ("", f"Correct the profile; {_CHECK}"))[1].replace("PROFILE", self.profile)


def open_session(region: str | None, profile: str | None) -> tuple[boto3.Session, Origin]:
    """Return a session whose credentials have been loaded, and where they come from.

    Raises: UsageError for a profile that an option names and that is not there, DeployError for credentials that cannot be had, and what
    botocore raises where AWS is not reached.
    """
    named = Origin.named(profile)
    core = botocore.session.Session()
    for variable, default in _FILES:
        _check_readable(os.environ.get(variable) or default, named)
    with _failing(named, "The AWS configuration cannot be read"):
        if profile:
            core.set_config_variable("profile", profile)
        if named.profile not in core.full_config["profiles"] and (profile or named.profile != "default"):
            raise _no_profile(named.profile, by_option=profile is not None)
        session = boto3.Session(botocore_session=core, region_name=region)
    if not session.region_name:
        raise exceptions.NoRegionError()
    _check_certificates(core.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE"), named)
    with _failing(Origin("iam-role", named.profile)):
        resolver = core.get_component("credential_provider")
    for provider in resolver.providers:
        provider.load = partial(_load, provider.load, Origin(provider.METHOD, named.profile))
        if provider.METHOD == "assume-role":
            provider._prompter = _ask_code
            provider._profile_provider_builder._create_process_provider = partial(_asks_program, core)
        elif provider.METHOD == "custom-process":
            provider._popen = _Program
    credentials = session.get_credentials()
    if credentials is None:
        raise _nowhere(named)
    origin = Origin(credentials.method, named.profile)
    with _failing(origin):
        frozen = credentials.get_frozen_credentials()
    hide(frozen.secret_key, frozen.token)
    parts = {"access key's id": frozen.access_key, "secret access key": frozen.secret_key, "session token": frozen.token or "none"}
    for what, value in parts.items():
        if not re.fullmatch(r"[!-~]+", value):
            raise DeployError(f"The AWS credentials cannot be used: the {what} has characters that none can have ({origin}).", origin.hint)
    return session, origin


def broken(origin: Origin, error: Exception, what: str = "The AWS credentials cannot be loaded") -> RemoeError:
    """Say in one sentence why credentials cannot be had from their source."""
    return DeployError(f"{what} ({origin}): {_reason(error)}.", origin.hint)


@contextmanager
def _failing(origin: Origin, what: str = "The AWS credentials cannot be loaded") -> Iterator[None]:
    """Raise a DeployError for whatever goes wrong, but for what AWS itself answers and for the network."""
    try:
        yield
    except (RemoeError, exceptions.ClientError, exceptions.HTTPClientError, exceptions.ConnectionError):
        raise
    except exceptions.ConfigParseError as error:
        raise DeployError(f"{' '.join(str(error).split())} ({origin}): it is not an INI file of AWS.", _FIX_FILE) from None
    except (exceptions.PartialCredentialsError, exceptions.NoCredentialsError) as error:
        raise DeployError(f"There are no AWS credentials: {error} ({origin}).", origin.hint) from error
    except Exception as error:
        raise broken(origin, error, what) from error


def _load(load: Callable[[], Any], origin: Origin) -> Any:
    with _failing(origin):
        return load()


def _reason(error: Exception) -> str:
    """Return why in words that hold no content of a file and no output of a program."""
    match error:
        case OSError() if error.filename:
            return f"{error.strerror or type(error).__name__}: {error.filename}"
        case UnicodeDecodeError():
            return "a file or an answer is not UTF-8"
        case json.JSONDecodeError():
            return "a file or an answer is not JSON"
        case KeyError():
            return f"{error} is missing"
        case EOFError() | getpass.GetPassWarning():
            return "it asks for the code of an MFA device, and there is no terminal"
        case exceptions.BotoCoreError() | OSError() | ValueError() | RuntimeError():
            text, _, answer = str(error).partition("from container metadata: ")
            hide(answer, *answer.splitlines())
            return " ".join(text.split()).rstrip(".") or type(error).__name__
    return f"it has a form that botocore does not read ({type(error).__name__})"


def _no_profile(name: str, by_option: bool) -> RemoeError:
    where = "--profile" if by_option else next(n for n in ("AWS_DEFAULT_PROFILE", "AWS_PROFILE") if os.environ.get(n))
    message = f"The AWS profile '{name}' of {where} could not be found in {_config()} or {_credentials()}."
    return (UsageError if by_option else DeployError)(message, f"'aws configure list-profiles' lists the profiles; correct {where}.")


def _nowhere(origin: Origin) -> RemoeError:
    return DeployError(
        f"There are no AWS credentials: Unable to locate credentials in the environment, in {_credentials()} or {_config()} "
        f"(profile '{origin.profile}'), or at a container's or an instance's endpoint.",
        "Set AWS_PROFILE or --profile, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; 'aws configure' stores them.",
    )


def _check_readable(path: str, origin: Origin) -> None:
    """Refuse a file of AWS that is there and cannot be read: botocore takes it for one that is not there."""
    try:
        if os.path.isfile(path := os.path.expandvars(os.path.expanduser(path))):
            with open(path, "rb") as file:
                file.read(1)
    except OSError as error:
        raise DeployError(f"{path} cannot be read ({origin}): {error.strerror}.", _FIX_FILE) from error


def _check_certificates(path: str | None, origin: Origin) -> None:
    """Refuse a file of certificates that cannot be used, which botocore notices only after it has reached AWS."""
    if not path or os.path.isdir(path):
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:  # which SSLError is too
        why = "it holds no certificates" if isinstance(error, ssl.SSLError) else error.strerror
        message = f"The certificates that AWS_CA_BUNDLE or REQUESTS_CA_BUNDLE names cannot be used ({origin}): {why}: {path}."
        raise DeployError(message, "Correct the variable, or 'ca_bundle' of the profile.") from error


def _credentials() -> str:
    return _file(*_FILES[0])


def _config() -> str:
    return _file(*_FILES[1])


def _file(variable: str, default: str) -> str:
    """Name a file of AWS; one that a variable names and that is not there says so."""
    path = os.environ.get(variable) or default
    return path if variable not in os.environ or os.path.isfile(os.path.expanduser(path)) else f"{path} (which is no file)"


def _ask_code(prompt: str) -> str:
    """Ask for the code of an MFA device on the terminal, and nowhere else."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)
        return getpass.getpass(prompt)


def _asks_program(core: botocore.session.Session, profile_name: str) -> ProcessProvider:
    return ProcessProvider(profile_name=profile_name, load_config=lambda: core.full_config, popen=_Program)


class _Program(subprocess.Popen[bytes]):
    """A credential_process. It ends in time, answers with credentials, and nothing that it prints is shown."""

    def __init__(self, argv: list[str], **how: Any) -> None:
        # Where nobody can log in, it is ended with all that it has started. Otherwise it must keep the terminal.
        self._alone = not sys.stderr.isatty()
        super().__init__(argv, process_group=0 if self._alone else None, **how)

    def communicate(self, input: bytes | None = None, timeout: float | None = None) -> tuple[bytes, bytes]:
        limit_s = _PROGRAM_S if self._alone else _PROGRAM_WITH_TERMINAL_S
        try:
            out, err = super().communicate(input, limit_s)
        except subprocess.TimeoutExpired:
            raise _refused(f"'{self._name}' has not answered within {limit_s:.0f} s, and was ended") from None
        finally:
            if self.poll() is None:
                os.killpg(self.pid, signal.SIGKILL) if self._alone else self.kill()
                self.wait()
            for pipe in (self.stdout, self.stderr):
                if pipe:
                    pipe.close()
        text = out.decode(errors="replace")
        hide(text, *err.decode(errors="replace").splitlines())
        if self.returncode:
            raise _refused(f"'{self._name}' failed with status {self.returncode}")
        try:
            answer = json.loads(out)
        except (ValueError, RecursionError):
            raise _refused(f"'{self._name}' has printed something other than JSON") from None
        if not isinstance(answer, dict) or answer.get("Version") != 1:
            raise _refused(f"'{self._name}' has not printed an object with Version 1")
        for key in ("AccessKeyId", "SecretAccessKey"):
            if not isinstance(answer.get(key), str) or not answer[key]:
                raise _refused(f"'{self._name}' has printed no {key}")
        hide(answer["SecretAccessKey"], str(answer.get("SessionToken") or ""))
        return out, err

    @property
    def _name(self) -> str:
        """Return the program without its arguments, which may hold a password."""
        return str(self.args[0]) if isinstance(self.args, list) else str(self.args)


def _refused(why: str) -> exceptions.BotoCoreError:
    return exceptions.InvalidConfigError(error_msg=why)

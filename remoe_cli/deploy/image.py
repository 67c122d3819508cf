"""Build the main function's container image and push it, with Docker or as commands for the user."""

from __future__ import annotations

import base64
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from remoe_cli.errors import DeployError
from remoe_cli.package.image import Image


def by_hand(image: Image) -> list[str]:
    """Return the commands that do what `build` does."""
    login = f"aws ecr get-login-password --region {image.region} | docker login --username AWS --password-stdin {image.registry}"
    return [shlex.join(image.build), *([login] if image.registry else []), *([shlex.join(image.push)] if image.repository else [])]


def build(image: Image, say: Callable[[str], None]) -> bool:
    """Build the image, and push it if it has a repository; return False when no Docker answers.

    Raises: DeployError when Docker or Amazon ECR refuses.
    """
    try:
        answers = subprocess.run(["docker", "version", "--format", "{{.Server.Version}}"], capture_output=True, check=False)
    except OSError:
        return False
    if answers.returncode:
        return False
    _docker(image.build, say)
    if image.repository:
        if image.registry:
            _docker(["docker", "login", "--username", "AWS", "--password-stdin", image.registry], say, input=_password(image))
        _docker(image.push, say)
    return True


def _docker(argv: list[str], say: Callable[[str], None], **options: Any) -> None:
    say(shlex.join(argv))
    # What Docker says is for people: a JSON document stays alone on standard output.
    if code := subprocess.run(argv, stdout=sys.stderr, check=False, **options).returncode:
        raise DeployError(f"'{shlex.join(argv[:2])}' failed with status {code}.", "See what it printed above.")


def _password(image: Image) -> bytes:
    """Get a password of Amazon ECR, valid for twelve hours. It goes to Docker's standard input only."""
    import boto3

    from remoe_cli.deploy.aws.session import plain_errors

    with plain_errors():
        token = boto3.client("ecr", region_name=image.region).get_authorization_token()
    return base64.b64decode(token["authorizationData"][0]["authorizationToken"]).partition(b":")[2]

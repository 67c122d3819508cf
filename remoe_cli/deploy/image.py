"""Build the main function's container image and push it, with Docker or as commands for the user."""

from __future__ import annotations

import base64
import shlex
import subprocess
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from remoe_cli.errors import DeployError
from remoe_cli.package.image import Image
from remoe_cli.progress import Progress, no_progress
from remoe_cli.redaction import hide

_LAST_LINES = 20  # of Docker's output, which an error shows


def by_hand(image: Image) -> list[str]:
    """Return the commands that do what `build` does."""
    login = f"aws ecr get-login-password --region {image.region} | docker login --username AWS --password-stdin {image.registry}"
    return [shlex.join(image.build), *([login] if image.registry else []), *([shlex.join(image.push)] if image.repository else [])]


def build(image: Image, say: Callable[[str], None], progress: Progress = no_progress) -> bool:
    """Build the image, and push it if it has a repository; return False when no Docker answers.

    Each line that Docker prints is reported to the stage that `progress` opens.

    Raises: DeployError when Docker or Amazon ECR refuses.
    """
    try:
        answers = subprocess.run(["docker", "version", "--format", "{{.Server.Version}}"], capture_output=True, check=False)
    except OSError:
        return False
    if answers.returncode:
        return False
    _docker(image.build, say, progress)
    if image.repository:
        if image.registry:
            _docker(["docker", "login", "--username", "AWS", "--password-stdin", image.registry], say, progress, _password(image))
        _docker(image.push, say, progress)
    return True


def _docker(argv: list[str], say: Callable[[str], None], progress: Progress, password: bytes | None = None) -> None:
    say(shlex.join(argv))
    title = shlex.join(argv[:2])
    last: deque[str] = deque(maxlen=_LAST_LINES)
    with (
        progress(title) as report,
        # Docker prints for people: a JSON document stays alone on standard output.
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as docker,
    ):
        assert docker.stdin and docker.stdout
        with suppress(BrokenPipeError), docker.stdin as stdin:
            stdin.write(password or b"")
        for line in docker.stdout:
            last.append(line.decode(errors="replace").rstrip())
            report(len(last), None, last[-1])
    if code := docker.returncode:
        printed = "\n".join(["", *last])
        raise DeployError(f"'{title}' failed with status {code}.{printed}", "Fix what Docker names, and run the command again.")


def _password(image: Image) -> bytes:
    """Get a password of Amazon ECR, valid for twelve hours. It goes to Docker's standard input only."""
    from remoe_cli.deploy.aws.session import connect, plain_errors

    account = connect(image.region)
    with plain_errors(account.origin):
        token = account.client("ecr").get_authorization_token()["authorizationData"][0]["authorizationToken"]
    hide(token, password := base64.b64decode(token).decode().partition(":")[2])
    return password.encode()

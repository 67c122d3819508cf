"""Every error that remoe raises on purpose, by its exit code.

    RemoeError
     ├── UsageError           2
     │    └── LongRequestError
     ├── ModelError           1
     ├── ArtifactError        1
     ├── InfeasibleError      3
     ├── OverBudgetError      4
     ├── HeldError            5
     ├── PartialDeployError   6
     ├── DeployError          1
     │    └── NoDeploymentError
     └── InvokeError          1

The message of an error says what happened and why. Its hint says what to do about it: a command, or a change.
Only `cli/app.py` turns an error into an exit code and text.
"""

from __future__ import annotations

import math


class RemoeError(Exception):
    """The base of all errors for the user.

    message   what happened and why, in one sentence
    hint      what to do about it; may be empty
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def kind(self) -> str:
        """The name of the class without `Error`, which is `kind` in the JSON document of an error."""
        return type(self).__name__.removesuffix("Error")


class UsageError(RemoeError):
    """An argument, option or input file cannot be used.

    That holds for every path on the command line where there is nothing, or something of another kind: a model, a profile, a plan, prompts.
    """

    exit_code = 2


class LongRequestError(UsageError):
    """A request has more tokens than the model or the deployment takes."""

    @property
    def kind(self) -> str:
        """That of the class above: to programs this is no kind of its own."""
        return "Usage"


class ModelError(RemoeError):
    """A model cannot be downloaded or read, or the hook cannot serve its experts."""


class ArtifactError(RemoeError):
    """A profile, plan or bundle is damaged, of another schema, or missing where a file of remoe names it."""


class _OutOfReachError(RemoeError):
    """Limits of a plan are out of reach.

    shortfall   how many times as large the limits would have to be; infinite where that is not known
    """

    def __init__(self, message: str, hint: str = "", shortfall: float = math.inf) -> None:
        super().__init__(message, hint)
        self.shortfall = shortfall


class InfeasibleError(_OutOfReachError):
    """No plan meets the targets."""

    exit_code = 3


class OverBudgetError(_OutOfReachError):
    """A plan exists, and it costs more than the budget."""

    exit_code = 4


class HeldError(RemoeError):
    """Another process or deployment has the name or the lock."""

    exit_code = 5


class PartialDeployError(RemoeError):
    """Some of a deployment exists, some does not."""

    exit_code = 6


class DeployError(RemoeError):
    """A deployment failed, died or does not exist."""


class NoDeploymentError(DeployError):
    """There is no deployment of a name."""

    @property
    def kind(self) -> str:
        """That of the class above: to programs this is no kind of its own."""
        return "Deploy"


class InvokeError(RemoeError):
    """A call of an expert function failed."""

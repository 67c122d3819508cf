"""Every error that remoe raises on purpose.

    RemoeError                      exit  what it stands for
     ├── UsageError                  2    an argument, option or input file that cannot be used
     ├── ModelError                  1    a model that cannot be read, or that the experts hook cannot serve
     ├── ArtifactError               1    a profile, plan or bundle that is missing, damaged or of another schema
     ├── InfeasibleError             3    no plan meets the targets
     ├── OverBudgetError             4    it can be done, but not for the money
     ├── HeldError                   5    somebody else holds it (a name, a lock)
     ├── PartialDeployError          6    some of a deployment stands, some does not
     ├── DeployError                 1    a deployment that failed, died or is not there
     └── InvokeError                 1    one call of an expert function that failed

An error says what happened and why in its message, and in its hint the command or change that mends it.
`cli/app.py` is the only place that turns one into an exit code and text.
"""

from __future__ import annotations


class RemoeError(Exception):
    """Base of all errors meant for the user's eyes.

    `message` is one sentence with what and why; `hint` is what to do about it, possibly empty.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def kind(self) -> str:
        """The class's name without `Error`: the stable `kind` of the JSON error document."""
        return type(self).__name__.removesuffix("Error")


class UsageError(RemoeError):
    exit_code = 2


class ModelError(RemoeError):
    pass


class ArtifactError(RemoeError):
    pass


class InfeasibleError(RemoeError):
    exit_code = 3


class OverBudgetError(RemoeError):
    exit_code = 4


class HeldError(RemoeError):
    exit_code = 5


class PartialDeployError(RemoeError):
    exit_code = 6


class DeployError(RemoeError):
    pass


class InvokeError(RemoeError):
    pass

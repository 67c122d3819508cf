"""The sentences for arguments and options that typer cannot take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from remoe_cli.cli.renamed import new_name
from remoe_cli.cli.times import WrongTimeError
from remoe_cli.cli.visible import is_utf8, visible
from remoe_cli.errors import UsageError

if TYPE_CHECKING:
    from typer.exceptions import TyperException

# pydantic's name of what is wrong with a value: the words after "--option is VALUE"
_WRONG = {
    "float_parsing": ", not a number",
    "int_parsing": ", not a whole number",
    "greater_than_equal": "; it must be {ge} or more",
    "less_than_equal": "; it must be {le} or less",
}
_NO_COMMAND = re.compile(r"No such command '(\S+)'\.(.*)", re.DOTALL)
_INSTEAD = {  # what people write who know other programs, and the command for it
    "version": "'remoe --version' prints it.",
    "help": "'remoe --help' lists the commands, and 'remoe COMMAND --help' explains one.",
    "ls": "'remoe list' shows the deployments.",
    "ps": "'remoe list' shows the deployments.",
    "rm": "'remoe destroy NAME' removes a deployment.",
}
_OTHERWISE = {  # what is meant by one argument too many, and how it is given
    "remoe cost": "--csv takes no file, and prints the rows: 'remoe cost NAME --by day --csv > FILE'.",
    "remoe infer": "--prompt takes the prompt: 'remoe infer NAME --prompt TEXT'.",
}
_VLLM = "vLLM reads no placement and no expert loads: its load balancer (--enable-eplb) counts them while it serves."
_EXTRA = re.compile(r"Got unexpected extra argument\(s\) \((.*)\)", re.DOTALL)


def refuse_other_bytes(arguments: Sequence[str]) -> None:
    """Refuse an argument that is not UTF-8. Files of remoe, which are UTF-8, could not name it.

    Raises: UsageError with the argument.
    """
    for before, argument in pairwise(("", *arguments)):
        if not is_utf8(argument):
            is_prompt = before == "--prompt" or argument.startswith("--prompt=")
            what = "The prompt" if is_prompt else f"The argument {visible(argument)!r}"
            raise UsageError(f"{what} is not UTF-8.", "Write it in UTF-8, as a terminal in a UTF-8 locale does; rename a file.")


def usage_error(error: TyperException) -> UsageError:
    """Say what typer found wrong in sentences of remoe; what is not known here keeps typer's sentence."""
    context = getattr(error, "ctx", None)  # what the parser finds wrong with an option has none
    command = context.command_path if context else "remoe"
    if renamed := new_name(command, getattr(error, "option_name", "")):
        sentence, command = renamed
        return UsageError(sentence, f"See '{command} --help'.")
    message, hint = error.format_message(), f"See '{command} --help'."
    parameter = getattr(error, "param", None)
    source = context.get_parameter_source(parameter.name) if context and parameter is not None else None
    if source is not None and source.name == "DEFAULT_MAP":
        hint = "The value is that of a remoe.toml: see 'remoe config show'."
    if parameter is not None and type(error).__name__ == "MissingParameter":
        return UsageError(message, f"Give {_name(parameter)}: {_lowered(parameter.help)} {hint}")
    if parameter is not None and (time := _wrong_time(error)):
        return UsageError(f"{_name(parameter)} {time}", f"{time.hint} {hint}".strip())
    if parameter is not None and (wrong := _wrong_value(_name(parameter), error)):
        hint = f"{_VLLM} {hint}" if wrong.startswith("--to: 'vllm'") else hint
        return UsageError(wrong, hint)
    if (unknown := _NO_COMMAND.fullmatch(message)) and unknown[1] in _INSTEAD:
        return UsageError(message, _INSTEAD[unknown[1]])
    if extra := _EXTRA.fullmatch(message):
        one = " " not in extra[1]
        hint = f"{_OTHERWISE[command]} {hint}" if command in _OTHERWISE else hint
        return UsageError(f"{extra[1]} is one argument too many." if one else f"These arguments are too many: {extra[1]}.", hint)
    return UsageError(message, hint)


def _name(parameter: Any) -> str:
    """Return what a person writes: MODEL for an argument, --tpot for an option."""
    return str(parameter.metavar) if parameter.param_type_name == "argument" else max(parameter.opts, key=len)


def _lowered(help: str) -> str:
    return help[:1].lower() + help[1:] if help[1:2].islower() else help


def _wrong_time(error: TyperException) -> WrongTimeError | None:
    """Return what `times.time_in` found wrong, where that is the cause."""
    details = getattr(error.__cause__, "errors", None)
    cause = details()[0].get("ctx", {}).get("error") if details else None
    return cause if isinstance(cause, WrongTimeError) else None


def _plain(limit: Any) -> Any:
    """Write a number without an exponent.

    >>> _plain(1e-06), _plain(0.01), _plain(1e6), _plain(3)
    ('0.000001', '0.01', '1000000', '3')
    """
    return f"{Decimal(f'{limit:g}'):f}" if isinstance(limit, int | float) else limit


def _wrong_value(name: str, error: TyperException) -> str | None:
    """Word pydantic's first error, the cause of typer's; None where it is of another kind."""
    details = getattr(error.__cause__, "errors", None)
    if details is None:
        return None
    first = details()[0]
    value, limits = first["input"], {name: _plain(limit) for name, limit in first.get("ctx", {}).items()}
    if first["type"] == "value_error":  # a choice; the reason begins with the value
        return f"{name}: {limits['error']}"
    if words := _WRONG.get(first["type"]):
        shown = repr(value) if first["type"].endswith("parsing") else value
        return f"{name} is {shown}{words.format(**limits)}."
    return None

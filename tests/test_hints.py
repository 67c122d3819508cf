"""Every error that remoe raises says what to do, or is in a list with the reason why there is nothing to do."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

from remoe_cli import errors
from remoe_cli.errors import RemoeError

PACKAGE = Path(errors.__file__).parent
KINDS = {name for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, RemoeError)}
# What needs no hint: the beginning of its message, and why.
NOTHING_TO_DO = {
    "Nothing was deployed": "the user has said no",
    "Nothing was destroyed": "the user has said no",
    "The client has gone": "nobody reads it",
    "Deployment '": "the message lists what there is",
    "message": "its caller knows more, and writes it",
}


def raised(tree: ast.AST) -> Iterator[ast.Call]:
    """Every call that makes an error of remoe's kinds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS:
            yield node


def message_of(call: ast.Call) -> str:
    """The first words of the message, or the expression that makes it."""
    first = call.args[0] if call.args else None
    if isinstance(first, ast.JoinedStr):
        first = first.values[0]
    return str(first.value) if isinstance(first, ast.Constant) else ast.unparse(call.args[0]) if call.args else ""


def has_hint(call: ast.Call) -> bool:
    hint = call.args[1] if len(call.args) > 1 else next((each.value for each in call.keywords if each.arg == "hint"), None)
    is_all = any(isinstance(each, ast.Starred) for each in call.args)
    return is_all or (hint is not None and not (isinstance(hint, ast.Constant) and not hint.value))


def test_every_error_says_what_to_do() -> None:
    without = {
        f"{file.relative_to(PACKAGE)}:{call.lineno}: {message_of(call)}"
        for file in PACKAGE.rglob("*.py")
        for call in raised(ast.parse(file.read_text()))
        if not has_hint(call) and not message_of(call).startswith(tuple(NOTHING_TO_DO))
    }
    assert without == set()


def test_an_error_without_a_hint_is_found() -> None:
    for text in ("UsageError('wrong')", "DeployError('wrong', '')", "ModelError(f'{x} is wrong')", "UsageError(message='wrong', hint='')"):
        (call,) = raised(ast.parse(text))
        assert not has_hint(call)
    for text in ("UsageError('wrong', 'Correct it.')", "DeployError(message, hint)", "UsageError(*sentences)"):
        (call,) = raised(ast.parse(text))
        assert has_hint(call)

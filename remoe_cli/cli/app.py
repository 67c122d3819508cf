"""The `remoe` command. The only place that turns an exception into an exit code.

0 ok · 1 failure · 2 usage · 3 infeasible plan · 4 over budget · 5 held by another · 6 partly deployed · 130 interrupted
"""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from remoe_cli import __version__
from remoe_cli.cli import (
    catalog_update,
    demo,
    deploy,
    destroy,
    infer,
    logs,
    output,
    package,
    plan,
    predict,
    profile,
    profile_merge,
    serve,
    status,
)
from remoe_cli.errors import RemoeError, UsageError
from remoe_cli.settings import debug


class _Commands(TyperGroup):
    """Names of commands may have two words: `remoe profile` is one command, `remoe profile merge` another."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        two = " ".join(args[:2])
        return super().resolve_command(ctx, [two, *args[2:]] if two in self.commands else args)


app = typer.Typer(
    name="remoe",
    cls=_Commands,
    help="Run mixture-of-experts models with rarely used experts in serverless functions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (demo, profile, profile_merge, predict, plan, catalog_update, package, deploy, infer, serve, status, logs, destroy):
    app.command(name=module.__name__.rpartition(".")[2].replace("_", " "))(module.command)


def _print_version(value: bool) -> None:
    if value:
        output.line(f"remoe {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line and exit."""
    sys.exit(run())


def run() -> int:
    try:
        return int(app(standalone_mode=False) or 0)
    except TyperException as error:
        if not (message := error.format_message()):
            return 2  # no arguments: the help text has been printed
        output.fail(UsageError(message, "Run the command with --help to see its options."))
        return UsageError.exit_code
    except RemoeError as error:
        _traceback()
        output.fail(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:
        _traceback()
        output.fail(RemoeError(f"The system refused: {error}", "Check the path, its permissions and the free space."))
        return 1
    except Exception as error:
        _traceback()
        output.fail(
            RemoeError(
                f"remoe failed: {type(error).__name__}: {error}", "Run again with REMOE_DEBUG=1 for a traceback, and please report it."
            )
        )
        return 1


def _traceback() -> None:
    if debug():
        traceback.print_exc()

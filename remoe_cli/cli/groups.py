"""How `remoe` shows its commands and options: in panels of plain text, with examples at the end.

typer draws panels with rich, whose import takes as long as everything else that `remoe --help` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from typer._click.exceptions import UsageError
from typer.core import TyperCommand, TyperGroup

from remoe_cli.cli import output
from remoe_cli.cli.pipeline_files import meant
from remoe_cli.errors import NoDeploymentError

Panels = dict[str, list[tuple[str, str]]]
_LARGE = 2**31


def examples(*commands: str) -> str:
    """Return the last section of a command's help."""
    return "\n".join(["Examples:", *(f"  {command}" for command in commands)])


def panels_of(command: Any, ctx: Any) -> Panels:
    """Return what each panel of a command's help lists, as (name, text).

    `rich_help_panel` names an option's panel.
    """
    panels: Panels = {}
    for parameter in sorted(command.get_params(ctx), key=lambda parameter: str(parameter.param_type_name)):  # arguments first
        if (row := parameter.get_help_record(ctx)) is None:
            continue
        if parameter.param_type_name == "argument":
            panels.setdefault("Arguments", []).append((parameter.metavar, row[1]))
        else:
            panels.setdefault(parameter.rich_help_panel or "Options", []).append(row)
    return panels


class _Plain:
    """Writes the panels of a command or group, and its epilog as it stands."""

    epilog: str | None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc,no-any-return]
        except UsageError as error:
            error.ctx = error.ctx or ctx  # an option without its value has none, and mistakes.py points to the command's help
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for panel, rows in panels_of(self, ctx).items():
            with formatter.section(panel):
                formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            formatter.write(f"\n{self.epilog}\n")


class Command(_Plain, TyperCommand):
    """A command of `remoe`.

    No number that it takes is infinite, or a whole one too large for what computes with it. Where there is no deployment of its NAME, a
    plan or profile of that name is told what it is.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except NoDeploymentError as error:
            raise meant(ctx) or error from None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        for parameter in self.get_params(ctx):
            value = ctx.params.get(parameter.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{max(parameter.opts, key=len)} is {value}, not a finite number.", ctx)
            if type(value) is int and abs(value) >= _LARGE:
                raise UsageError(f"{max(parameter.opts, key=len)} is {value}; it must be less than {_LARGE:,}.", ctx)
        return rest


class Group(_Plain, TyperGroup):
    """Commands in the order and under the titles of `panels`, if there are any.

    Without arguments a group prints its help and exits with 2, as for any wrong usage. With a `default`, arguments that do not begin
    with a command's name go to the command of that name.
    """

    panels: ClassVar[Mapping[str, Sequence[str]]] = {}
    default: ClassVar[str | None] = None

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for names in self.panels.values() for name in names] or list(self.commands)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            output.line(ctx.get_help())
            ctx.exit(2)
        if self.default and args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for panel, names in (self.panels or {"Commands": list(self.commands)}).items():
            with formatter.section(panel):
                formatter.write_dl([(name, _first_paragraph(self.commands[name])) for name in names])
        super().format_options(ctx, formatter)


def _first_paragraph(command: Any) -> str:
    return " ".join(command.help.split("\n\n")[0].split())

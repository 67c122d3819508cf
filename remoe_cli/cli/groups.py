"""How `remoe` shows its commands and options: in panels of plain text, with examples at the end.

typer draws panels with rich, whose import takes as long as everything else that `remoe --help` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from typer.core import TyperCommand, TyperGroup

from remoe_cli.cli import output

Row = tuple[str, str]


def examples(*commands: str) -> str:
    """Return the last section of a command's help."""
    return "\n".join(["Examples:", *(f"  {command}" for command in commands)])


class Command(TyperCommand):
    """A command whose options stand in the panels that `typer.Option(rich_help_panel=...)` names."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_panels(formatter, _parameters(self, ctx))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_epilog(self, formatter)


class Group(TyperGroup):
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
        panels = self.panels or {"Commands": list(self.commands)}
        rows = [(panel, (name, _first_paragraph(self.commands[name]))) for panel, names in panels.items() for name in names]
        _write_panels(formatter, [*rows, *_parameters(self, ctx)])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_epilog(self, formatter)


def _parameters(command: Any, ctx: Any) -> list[tuple[str, Row]]:
    titles = {"argument": "Arguments", "option": "Options"}
    found = ((p.rich_help_panel or titles[p.param_type_name], p.get_help_record(ctx)) for p in command.get_params(ctx))
    return [(panel, row) for panel, row in found if row is not None]


def _write_panels(formatter: Any, rows: Iterable[tuple[str, Row]]) -> None:
    panels: dict[str, list[Row]] = {}
    for panel, row in rows:
        panels.setdefault(panel, []).append(row)
    for panel, its_rows in panels.items():
        with formatter.section(panel):
            formatter.write_dl(its_rows)


def _write_epilog(command: Any, formatter: Any) -> None:
    if command.epilog:
        formatter.write(f"\n{command.epilog}\n")


def _first_paragraph(command: Any) -> str:
    return " ".join(command.help.split("\n\n")[0].split())

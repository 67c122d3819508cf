"""`remoe plan`: which experts go where, what it costs, and whether it pays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remoe_cli.cli import output

if TYPE_CHECKING:
    from remoe_cli.plan.document import Plan


def command(
    profile: Annotated[Path, typer.Argument(help="A profile made by 'remoe profile'.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The plan, such as plans/NAME.json.")],
    ttft: Annotated[float | None, typer.Option(min=0, help="Target: seconds to the first token, at most.")] = None,
    tpot: Annotated[float | None, typer.Option(min=0, help="Target: seconds for each further token, at most.")] = None,
    n_in: Annotated[int | None, typer.Option(min=1, help="Prompt tokens of a request; the profile's median by default.")] = None,
    n_out: Annotated[int | None, typer.Option(min=1, help="Generated tokens after the first; the profile's median by default.")] = None,
    catalog: Annotated[str, typer.Option(help="Menus and prices: a catalog's name or a TOML file.")] = "local",
    remote_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Force this share of every layer's experts out, the least used ones, to exercise the remote path."),
    ] = None,
    time_limit: Annotated[float, typer.Option(min=1, help="Seconds after which the solver stops with the gap it has.")] = 120.0,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Solve for the cheapest placement that meets the targets, and compare it with keeping every expert local."""
    from remoe_cli.artifacts import write_json
    from remoe_cli.errors import RemoeError, UsageError
    from remoe_cli.plan.build import make_plan
    from remoe_cli.plan.catalog import read_catalog
    from remoe_cli.plan.verify import verify
    from remoe_cli.profile.record import read_profile

    if out.is_dir():
        raise UsageError(f"{out} is a directory.", "Give the plan a file name with -o, such as plans/NAME.json.")
    read = read_profile(profile.resolve())
    prices = read_catalog(catalog)
    with output.progress("Solving"):
        made = make_plan(read, prices, ttft_s=ttft, tpot_s=tpot, n_in=n_in, n_out=n_out, remote_share=remote_share, time_limit_s=time_limit)
    if findings := verify(made, read, prices):
        raise RemoeError(
            f"The solver and the verifier disagree on '{findings[0].field}': {findings[0].stated} and {findings[0].found}.",
            "Please report this.",
        )
    write_json(out, made)
    output.result({"path": str(out)} | made.model_dump(mode="json"), lambda: show(made, out))


def show(plan: Plan, path: Path) -> None:
    """The plan for people."""
    from remoe_cli.plan.explain import HEADER, layer_rows, summary_rows

    if any(layer.remote for layer in plan.layers):
        output.table("Placement", HEADER, layer_rows(plan))
    for name, value in summary_rows(plan):
        output.line(f"{name:<15} {value}")
    output.line(f"{'written to':<15} {path}")

"""`remoe plan`: which experts go where, what it costs, and whether it pays."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remoe_cli.cli import output

if TYPE_CHECKING:
    from remoe_cli.plan.document import Plan, PredictedRouting
    from remoe_cli.plan.problem.requests import Requests

# typer makes choices of enums only; the words are those of plan/document.py.
Solver = Enum("Solver", {name: name for name in ("exact", "scan", "paper")}, type=str)  # type: ignore[misc]
Minimize = Enum("Minimize", {name: name for name in ("cost", "tpot", "ttft")}, type=str)  # type: ignore[misc]
Invocation = Enum("Invocation", {name: name for name in ("per-layer", "per-expert")}, type=str)  # type: ignore[misc]


def command(
    profile: Annotated[Path, typer.Argument(help="A profile made by 'remoe profile'.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The plan, such as plans/NAME.json.")],
    ttft: Annotated[float | None, typer.Option(min=0, help="Target: seconds to the first token, at most.")] = None,
    tpot: Annotated[float | None, typer.Option(min=0, help="Target: seconds for each further token, at most.")] = None,
    budget: Annotated[float | None, typer.Option(min=0, help="Target: USD a request, at most.")] = None,
    minimize: Annotated[Minimize, typer.Option(help="What to make as small as possible under the targets.")] = Minimize["cost"],
    catalog: Annotated[str, typer.Option(help="Menus and prices: a catalog's name or a TOML file.")] = "local",
    n_in: Annotated[int | None, typer.Option(min=1, help="Prompt tokens of a request; the profile's median by default.")] = None,
    n_out: Annotated[int | None, typer.Option(min=1, help="Generated tokens after the first; the profile's median by default.")] = None,
    requests: Annotated[
        Path | None, typer.Option(help="Requests instead of one length: CSV or JSON lines with n_in, n_out, and timestamp or weight.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Plan for the routing that is predicted for these prompts (a file, as for 'remoe predict --input').")
    ] = None,
    field: Annotated[str, typer.Option(help="Field of the prompts that holds the text.")] = "prompt",
    requests_per_hour: Annotated[float | None, typer.Option(min=0, help="Traffic: prices idle hours and cold starts.")] = None,
    cold_share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of requests that find everything cold; by default what the traffic implies.")
    ] = None,
    solver: Annotated[Solver, typer.Option(help="exact: proven; scan: fast; paper: the heuristic of arXiv 2512.18674.")] = Solver["exact"],
    invocation: Annotated[
        Invocation, typer.Option(help="One call for all experts that a token hits in a function, or (the paper) one for each.")
    ] = Invocation["per-layer"],
    remote_share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Force this share of the experts out, the least used, to exercise the remote path.")
    ] = None,
    placement: Annotated[
        Path | None, typer.Option(help="Price this placement (a plan, or its main and layers) instead of solving.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say where every input came from, what binds, and what more would be worth.")
    ] = False,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Also the cost of every TPOT, as a table and a picture beside the plan.")
    ] = False,
    time_limit: Annotated[float, typer.Option(min=1, help="Seconds after which the solver stops with the gap it has.")] = 120.0,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Solve for the cheapest placement that meets the targets, and compare it with everything else that could run the model."""
    from remoe_cli.artifacts import write_json
    from remoe_cli.errors import RemoeError, UsageError
    from remoe_cli.plan.build import make_plan
    from remoe_cli.plan.catalog.catalog import read_catalog
    from remoe_cli.plan.problem.aim import Aim
    from remoe_cli.plan.problem.request import Wanted
    from remoe_cli.plan.verify.check import verify
    from remoe_cli.profile.record import read_profile

    if out.is_dir():
        raise UsageError(f"{out} is a directory.", "Give the plan a file name with -o, such as plans/NAME.json.")
    if placement is not None and remote_share is not None:
        raise UsageError("--placement and --remote-share both say what goes where.", "Leave one of them out.")
    read = read_profile(profile.resolve())
    prices = read_catalog(catalog)
    wanted = Wanted(
        aim=Aim(minimize.value, ttft, tpot, budget),
        n_in=n_in,
        n_out=n_out,
        requests=_requests(read, requests, requests_per_hour, n_in, n_out),
        cold_share=cold_share,
        invocations=invocation.value,
        solver=solver.value,
        remote_share=remote_share,
        placement=placement,
        routing=_routing(read, prompts, field, solver.value),
        time_limit_s=time_limit,
    )
    with output.progress("Solving"):
        made = make_plan(read, prices, wanted)
    if findings := verify(made, read, prices):
        raise RemoeError(
            f"The solver and the verifier disagree on '{findings[0].field}': {findings[0].stated} and {findings[0].found}.",
            "Please report this.",
        )
    write_json(out, made)
    document: dict[str, Any] = {"path": str(out)} | made.model_dump(mode="json")
    shows: list[Callable[[], None]] = [lambda: show(made, out)]
    if explain:
        from remoe_cli.plan.explain.rows import explanation

        sections = explanation(made, read, prices, wanted)
        document["explanation"] = {title: [list(row) for row in rows] for title, rows in sections.items()}
        shows.append(lambda: _show_sections(sections))
    if frontier:
        shows.append(_frontier(document, read, prices, wanted, out))

    def show_all() -> None:
        for one in shows:
            one()

    output.result(document, show_all)


def _show_sections(sections: dict[str, Any]) -> None:
    from textwrap import fill

    for title, rows in sections.items():
        output.line(f"\n{title}")
        for name, text in rows:
            output.line(fill(text, 118, initial_indent=f"  {name}: ", subsequent_indent="      "))


def _routing(read: Any, prompts: str | None, field: str, solver: Any) -> PredictedRouting | None:
    if prompts is None:
        return None
    from remoe_cli.cli.prompts import read_prompts

    texts = read_prompts(prompts, field)
    from remoe_cli.plan.problem.predicted import predict_routing  # imports torch, for which a wrong path need not wait

    return predict_routing(read, texts, solver)


def _requests(read: Any, path: Path | None, per_hour: float | None, n_in: int | None, n_out: int | None) -> Requests | None:
    """What was said about requests, or None: one warm request of the profile's lengths."""
    from dataclasses import replace

    from remoe_cli.errors import UsageError
    from remoe_cli.plan.problem.requests import one_length, read_requests
    from remoe_cli.plan.problem.workload import from_profile

    if per_hour == 0:
        raise UsageError("--requests-per-hour is 0: without requests there is nothing to plan.", "Give the traffic that you expect.")
    if path is not None:
        if n_in is not None or n_out is not None:
            raise UsageError("--requests and --n-in or --n-out both say how long requests are.", "Leave one of them out.")
        said = read_requests(path)
        return said if per_hour is None else replace(said, per_hour=per_hour, gaps_s=())
    if per_hour is None:
        return None
    lengths = from_profile(read, n_in, n_out).lengths[0]
    return one_length(lengths.n_in, lengths.n_out, per_hour)


def _frontier(document: dict[str, Any], read: Any, prices: Any, wanted: Any, out: Path) -> Callable[[], None]:
    from remoe_cli.plan.assess.frontier import frontier
    from remoe_cli.report.plan import draw_frontier

    with output.progress("Frontier") as progress:
        points = frontier(read, prices, wanted, progress)
    picture = out.with_name(f"{out.stem}-frontier.png")
    draw_frontier(points, picture)
    document |= {"frontier": [point._asdict() for point in points], "frontier_picture": str(picture)}

    def table() -> None:
        from remoe_cli.plan.wording import per_million

        rows = [(f"{p.tpot_s * 1e3:.4g} ms", per_million(p.cost_usd), f"{p.ttft_s:.3g} s", str(p.remote), p.main) for p in points]
        output.table("Cost of every TPOT", ("TPOT", "requests", "TTFT", "remote experts", "main function"), rows)
        output.line(f"{'picture':<15} {picture}")

    return table


def show(plan: Plan, path: Path) -> None:
    """The plan for people."""
    from remoe_cli.plan.explain.rows import BASELINES, HEADER, baseline_rows, layer_rows, summary_rows

    if any(layer.remote for layer in plan.layers):
        output.table("Placement", HEADER, layer_rows(plan))
    for name, value in summary_rows(plan):
        output.line(f"{name:<15} {value}")
    output.table("Beside it", BASELINES, baseline_rows(plan))
    for note in plan.notes:
        output.line(f"{'note':<15} {note}")
    output.line(f"{'written to':<15} {path}")

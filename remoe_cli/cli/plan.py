"""`remoe plan`: which experts move into functions, what that costs, and whether it pays."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.options import FIELD_HELP, ProfileArgument

if TYPE_CHECKING:
    from remoe_cli.plan.document import Plan, PredictedRouting
    from remoe_cli.plan.problem.traffic import Traffic

# typer makes choices of enums only; the words are those of plan/document.py.
Solver = Enum("Solver", {name: name for name in ("exact", "scan", "paper")}, type=str)  # type: ignore[misc]
Minimize = Enum("Minimize", {name: name for name in ("cost", "tpot", "ttft")}, type=str)  # type: ignore[misc]
Invocation = Enum("Invocation", {name: name for name in ("per-layer", "per-expert")}, type=str)  # type: ignore[misc]


_TARGETS, _REQUESTS, _ADVANCED = "Targets", "Requests to plan for", "Advanced"

EXAMPLES = examples(
    "remoe plan profiles/olmoe -o plans/olmoe.json",
    "remoe plan profiles/olmoe -o plans/olmoe.json --catalog aws-us-east-1 --requests-per-hour 20",
    "remoe plan profiles/olmoe -o plans/olmoe.json --minimize tpot --budget 2e-4 --explain",
)


def command(
    profile: ProfileArgument,
    out: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The plan to write, such as plans/NAME.json.")],
    catalog: Annotated[
        str,
        typer.Option(metavar="NAME", help="Hardware and prices: local, aws-us-east-1, paper, or a .toml file ('remoe catalog update')."),
    ] = "local",
    minimize: Annotated[Minimize, typer.Option(help="What to make as small as possible under the targets.")] = Minimize["cost"],
    explain: Annotated[
        bool, typer.Option("--explain", help="Also say where every input comes from, which target decides, and what would help.")
    ] = False,
    frontier: Annotated[bool, typer.Option("--frontier", help="Also show the cost of every TPOT, as a table and as a picture.")] = False,
    ttft: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Longest time to the first token (TTFT).", rich_help_panel=_TARGETS)
    ] = None,
    tpot: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Longest time per output token after the first (TPOT).", rich_help_panel=_TARGETS),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=0, metavar="USD", help="Highest cost of a request, in USD.", rich_help_panel=_TARGETS)
    ] = None,
    n_in: Annotated[
        int | None,
        typer.Option(min=1, metavar="TOKENS", help="Prompt tokens; by default the profile's median.", rich_help_panel=_REQUESTS),
    ] = None,
    n_out: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="TOKENS", help="Output tokens after the first; by default the profile's median.", rich_help_panel=_REQUESTS
        ),
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Many lengths instead of one: .csv or .jsonl with n_in, n_out, and timestamp or weight.",
            rich_help_panel=_REQUESTS,
        ),
    ] = None,
    requests_per_hour: Annotated[
        float | None,
        typer.Option(min=0, metavar="N", help="Traffic; idle hours and cold starts are then in the cost.", rich_help_panel=_REQUESTS),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Plan for the experts that these prompts are predicted to use; a file of prompts as for 'remoe predict --data'.",
            rich_help_panel=_REQUESTS,
        ),
    ] = None,
    field: Annotated[str, typer.Option(metavar="NAME", help=FIELD_HELP, rich_help_panel=_REQUESTS)] = "prompt",
    cold_share: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="SHARE",
            help="Share of requests that find nothing warm; by default what the traffic implies.",
            rich_help_panel=_ADVANCED,
        ),
    ] = None,
    remote_share: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="SHARE",
            help="Force this share of the experts into functions, the least used first, to try the remote path.",
            rich_help_panel=_ADVANCED,
        ),
    ] = None,
    placement: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Price this placement (a plan, or its main and layers) as it is.", rich_help_panel=_ADVANCED),
    ] = None,
    solver: Annotated[
        Solver,
        typer.Option(help="exact is proven, scan is fast, paper is the heuristic of arXiv 2512.18674.", rich_help_panel=_ADVANCED),
    ] = Solver["exact"],
    invocation: Annotated[
        Invocation,
        typer.Option(help="One call for all experts that a token needs of a function, or one each.", rich_help_panel=_ADVANCED),
    ] = Invocation["per-layer"],
    time_limit: Annotated[
        float,
        typer.Option(min=1, metavar="SECONDS", help="When the solver stops, with the best plan it has.", rich_help_panel=_ADVANCED),
    ] = 120.0,
    verbose: output.VerboseOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Choose the experts to move into functions, for the lowest cost within your targets.

    The plan is compared with everything else that could run the model, and says whether moving experts out pays.
    """
    from remoe_cli.artifacts import write_json
    from remoe_cli.errors import RemoeError, UsageError
    from remoe_cli.plan.build import make_plan
    from remoe_cli.plan.catalog.catalog import read_catalog
    from remoe_cli.plan.problem.aim import Aim
    from remoe_cli.plan.problem.request import PlanRequest
    from remoe_cli.plan.verify.check import verify
    from remoe_cli.profile.record import read_profile

    if out.is_dir():
        raise UsageError(f"{out} is a directory.", "Give the plan a file name with -o, such as plans/NAME.json.")
    if placement is not None and remote_share is not None:
        raise UsageError("--placement and --remote-share both say which experts go where.", "Leave one of them out.")
    read = read_profile(profile.resolve())
    prices = read_catalog(catalog)
    request = PlanRequest(
        aim=Aim(minimize.value, ttft, tpot, budget),
        n_in=n_in,
        n_out=n_out,
        traffic=_traffic(read, requests, requests_per_hour, n_in, n_out),
        cold_share=cold_share,
        invocations=invocation.value,
        solver=solver.value,
        remote_share=remote_share,
        placement_file=placement,
        routing=_routing(read, data, field, solver.value),
        time_limit_s=time_limit,
    )
    with output.progress("Solving"):
        made = make_plan(read, prices, request)
        findings = verify(made, read, prices)
    if findings:
        raise RemoeError(
            f"The solver and the verifier disagree on '{findings[0].field}': {findings[0].stated} and {findings[0].found}.",
            "Please report this.",
        )
    write_json(out, made)
    document: dict[str, Any] = {"path": str(out)} | made.model_dump(mode="json")
    shows: list[Callable[[], None]] = [lambda: show(made, out)]
    if explain:
        from remoe_cli.plan.explain.rows import explanation

        with output.progress("Explaining"):
            sections = explanation(made, read, prices, request)
        document["explanation"] = {name: [list(row) for row in rows] for name, rows in sections.items()}
        shows.append(lambda: _show_sections(sections))
    if frontier:
        shows.append(_frontier(document, read, prices, request, out))

    def show_all() -> None:
        for one in shows:
            one()

    output.result(document, show_all)


def _show_sections(sections: dict[str, Any]) -> None:
    from textwrap import fill

    from remoe_cli.plan.explain.rows import SECTIONS

    for name, rows in sections.items():
        output.line(f"\n{SECTIONS[name]}")
        for label, text in rows:
            output.line(fill(text, 118, initial_indent=f"  {label}: ", subsequent_indent="      "))


def _routing(read: Any, data: str | None, field: str, solver: Any) -> PredictedRouting | None:
    if data is None:
        return None
    from remoe_cli.profile.prompts import read_prompts

    texts = read_prompts(data, field)
    with output.progress("Predicting which experts the prompts use"):
        from remoe_cli.plan.problem.predicted import predict_routing  # imports torch, for which a wrong path need not wait

        return predict_routing(read, texts, solver)


def _traffic(read: Any, path: Path | None, per_hour: float | None, n_in: int | None, n_out: int | None) -> Traffic | None:
    """What was said about requests, or None: one warm request of the profile's lengths."""
    from dataclasses import replace

    from remoe_cli.errors import UsageError
    from remoe_cli.plan.problem.traffic import one_length, read_traffic
    from remoe_cli.plan.problem.workload import from_profile

    if per_hour == 0:
        raise UsageError("--requests-per-hour is 0: without requests there is nothing to plan.", "Give the traffic that you expect.")
    if path is not None:
        if n_in is not None or n_out is not None:
            raise UsageError("--requests and --n-in or --n-out both say how long requests are.", "Leave one of them out.")
        traffic = read_traffic(path)
        return traffic if per_hour is None else replace(traffic, per_hour=per_hour, gaps_s=())
    if per_hour is None:
        return None
    lengths = from_profile(read, n_in, n_out).lengths[0]
    return one_length(lengths.n_in, lengths.n_out, per_hour)


def _frontier(document: dict[str, Any], read: Any, prices: Any, request: Any, out: Path) -> Callable[[], None]:
    from remoe_cli.plan.assess.frontier import frontier
    from remoe_cli.report.plan import draw_frontier

    with output.progress("Frontier") as progress:
        points = frontier(read, prices, request, progress)
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

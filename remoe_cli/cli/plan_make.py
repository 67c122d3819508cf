"""`remoe plan`: which experts move into functions, what that costs, and whether it pays."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.options import FIELD_HELP, ProfileArgument, read_data
from remoe_cli.cli.plan_show import show
from remoe_cli.cli.replacing import ReplaceOption, agree_to_replace
from remoe_cli.cli.times import time_in

if TYPE_CHECKING:
    from remoe_cli.plan.document import Plan, PredictedRouting

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
        float | None,
        typer.Option(
            parser=time_in("s", longest=3600),
            metavar="TIME",
            help="Longest mean time to the first token (TTFT), such as 2s.",
            rich_help_panel=_TARGETS,
        ),
    ] = None,
    ttft_percentile: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=100,
            metavar="PERCENT",
            help="Per cent of requests that keep --ttft; by default the mean does.",
            rich_help_panel=_TARGETS,
        ),
    ] = None,
    tpot: Annotated[
        float | None,
        typer.Option(
            parser=time_in("s", longest=60),
            metavar="TIME",
            help="Longest mean time per output token after the first (TPOT), such as 200ms.",
            rich_help_panel=_TARGETS,
        ),
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
    cover: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="SHARE",
            help="Share of --requests to answer, such as 0.99: the longest are refused; by default none is.",
            rich_help_panel=_REQUESTS,
        ),
    ] = None,
    requests_per_hour: Annotated[
        float | None,
        typer.Option(min=0, metavar="N", help="Traffic; idle hours and cold starts are then in the cost.", rich_help_panel=_REQUESTS),
    ] = None,
    concurrency: Annotated[
        int,
        typer.Option(
            min=1,
            max=256,
            metavar="N",
            help="Requests that each main function serves at once: they share its time.",
            rich_help_panel=_REQUESTS,
        ),
    ] = 1,
    speculate: Annotated[
        str,
        typer.Option(
            metavar="auto|off|N",
            help="Draft tokens of a decode pass; auto: as many as are best, by the profile's answers.",
            rich_help_panel=_REQUESTS,
        ),
    ] = "off",
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
        typer.Option(
            parser=time_in("s", least=1),
            metavar="TIME",
            help="When the solver stops, with the best plan it has, such as 5min.",
            rich_help_panel=_ADVANCED,
        ),
    ] = 120.0,
    verbose: output.VerboseOption = False,
    yes: ReplaceOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Choose the experts to move into functions, for the lowest cost within your targets.

    The plan is compared with everything else that could run the model, and says whether moving experts out pays.
    """
    from remoe_cli.artifacts import made_as, write_json
    from remoe_cli.errors import RemoeError, UsageError
    from remoe_cli.model.draft import AUTO_TOKENS, speculate_of
    from remoe_cli.owned import refuse_file
    from remoe_cli.plan.build import make_plan
    from remoe_cli.plan.catalog.catalog import read_catalog
    from remoe_cli.plan.document import Plan
    from remoe_cli.plan.problem.aim import Aim
    from remoe_cli.plan.problem.request import PlanRequest
    from remoe_cli.plan.problem.trace_traffic import read_traffic
    from remoe_cli.plan.verify.check import verify
    from remoe_cli.profile.record import read_profile

    if out.is_dir():
        raise UsageError(f"{out} is a directory.", "Give the plan a file name with -o, such as plans/NAME.json.")
    if out.suffix != ".json":
        raise UsageError(f"{out} is not a name for a plan.", "Give a name that ends in .json.")
    if placement is not None and remote_share is not None:
        raise UsageError("--placement and --remote-share both say which experts go where.", "Leave one of them out.")
    if cover is not None and requests is None:
        raise UsageError("--cover is a share of the requests of a file, and there is none.", "Give the file with --requests.")
    if ttft_percentile is not None and ttft is None and minimize.value != "ttft":
        raise UsageError("--ttft-percentile says how many requests keep --ttft, which is not given.", "Give --ttft too.")
    refuse_file(out, made_as(Plan))
    if frontier:
        from remoe_cli.report.picture import refuse_picture

        refuse_picture(_picture(out))
    agree_to_replace(yes, out, *([_picture(out)] if frontier else []))
    with output.progress("Reading the profile"):
        read = read_profile(profile.resolve())
    prices = read_catalog(catalog)
    traffic = None
    if requests is not None:
        with output.progress("Reading the requests"):
            traffic = read_traffic(requests, 1.0 if cover is None else cover)
    request = PlanRequest(
        aim=Aim(minimize.value, ttft, tpot, budget, ttft_percentile),
        n_in=n_in,
        n_out=n_out,
        traffic=traffic,
        requests_per_hour=requests_per_hour,
        cold_share=cold_share,
        invocations=invocation.value,
        solver=solver.value,
        remote_share=remote_share,
        placement_file=placement,
        routing=_routing(read, data, field, solver.value),
        time_limit_s=time_limit,
        concurrency=concurrency,
        speculate=speculate_of(speculate, AUTO_TOKENS),
    )
    with output.progress("Solving"):
        made = make_plan(read, prices, request)
        findings = verify(made, read, prices, traffic.sizes.rows() if traffic else ())
    if findings:
        raise RemoeError(
            f"The plan states '{findings[0].field}' as {findings[0].stated}, but the verifier finds {findings[0].found}.",
            "Please report this.",
        )
    write_json(out, made)
    document: dict[str, Any] = {"path": str(out)} | made.model_dump(mode="json")
    shows: list[Callable[[], None]] = [lambda: show(made, out)]
    if explain:
        from remoe_cli.plan.explain.why import explanation

        with output.progress("Explaining"):
            sections = explanation(made, read, prices, request)
        document["explanation"] = {name: [list(row) for row in rows] for name, rows in sections.items()}
        shows.append(lambda: _show_sections(sections))
    if frontier:
        shows.append(_frontier(document, made, read, prices, request, out))

    def show_all() -> None:
        for one in shows:
            one()

    output.result(document, show_all)


def _show_sections(sections: dict[str, Any]) -> None:
    from remoe_cli.plan.explain.why import SECTIONS

    for name, rows in sections.items():
        output.line(f"\n{SECTIONS[name]}")
        for label, text in rows:
            output.paragraph(f"{label}: {text}", "  ", " " * 6)


def _routing(read: Any, data: str | None, field: str, solver: Any) -> PredictedRouting | None:
    if data is None:
        return None
    texts = read_data(data, field)
    with output.progress("Predicting which experts the prompts use"):
        from remoe_cli.plan.problem.predicted import predict_routing  # imports torch, for which a wrong path need not wait

        return predict_routing(read, texts, solver)


def _frontier(document: dict[str, Any], made: Plan, read: Any, prices: Any, request: Any, out: Path) -> Callable[[], None]:
    from remoe_cli.plan.assess.frontier import frontier
    from remoe_cli.plan.problem.drafting import depth_of
    from remoe_cli.report.plan import draw_frontier

    with output.progress("Plans of the frontier") as progress:
        points = frontier(read.in_form(made.model.packed), prices, request, progress, depth_of(made))
    picture = _picture(out)
    draw_frontier(points, made, picture)
    document |= {"frontier": [point._asdict() for point in points], "frontier_picture": str(picture)}

    def table() -> None:
        from remoe_cli.plan.wording import dollars

        rows = [(f"{p.tpot_s * 1e3:.4g} ms", dollars(p.cost_usd), f"{p.ttft_s:.3g} s", str(p.remote), p.main) for p in points]
        output.table("Cost of every TPOT", ("TPOT", "a request", "TTFT", "remote experts", "main function"), rows)
        output.line(f"{'picture':<{output.LABEL}}{picture}")

    return table


def _picture(out: Path) -> Path:
    return out.with_name(f"{out.stem}-frontier.png")

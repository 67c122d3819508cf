"""`remoe simulate`: what a plan's deployment would do under a trace of requests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.options import PlanArgument

if TYPE_CHECKING:
    from remoe_cli.simulate.break_even import BreakEvenBursts
    from remoe_cli.simulate.summary import Figure, Summary

_REQUESTS = 20_000
EXAMPLES = examples(
    "remoe simulate plans/olmoe.json --trace AzureLLMInferenceTrace_conv.csv",
    "remoe simulate plans/olmoe.json --trace trace.csv --requests-per-hour 20 --json",
    "remoe simulate plans/olmoe.json --requests-per-hour 20 --burstiness 3",
)


def command(
    plan: PlanArgument,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="Requests with their times, as for 'remoe plan --requests'; by default those of the plan, at random times.",
        ),
    ] = None,
    requests_per_hour: Annotated[
        float | None,
        typer.Option("--requests-per-hour", metavar="N", min=1e-6, help="Let the same requests come faster or slower."),
    ] = None,
    burstiness: Annotated[
        float | None,
        typer.Option(
            "--burstiness",
            metavar="CV",
            min=0.0,
            max=100.0,
            help="Take random times between requests, with this coefficient of variation: above 1 they come in bursts.",
        ),
    ] = None,
    requests: Annotated[int, typer.Option("--requests", metavar="N", min=1, max=10_000_000, help="Requests of each run.")] = _REQUESTS,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, max=1000, help="Runs, with requests drawn anew.")] = 5,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Let the requests of a trace arrive at a plan's deployment and at its alternatives.

    It says what each way of serving takes and costs. The times are those of the cost model; waiting, cold starts, refusals and idle hours
    come from the requests' times.
    """
    from remoe_cli.deploy.inputs import read_inputs
    from remoe_cli.plan.problem.trace_requests import read_requests
    from remoe_cli.simulate.requests import source_of, source_of_traffic
    from remoe_cli.simulate.ways import ways

    with output.progress("Reading the plan"):
        inputs = read_inputs(plan)
    if trace is None:
        from remoe_cli.plan.problem.request import problem_of

        source = source_of_traffic(problem_of(*inputs).workload.traffic, requests_per_hour, burstiness)
    else:
        with output.progress("Reading the trace"):
            source = source_of(read_requests(trace), requests_per_hour, burstiness)
    with output.progress("Simulating"):
        from remoe_cli.simulate.summary import simulated

        found = simulated(ways(inputs, source), source, requests, seeds)
    with output.progress("Break-even traffic"):
        from remoe_cli.simulate.break_even import break_even
        from remoe_cli.simulate.wording import break_even_document

        line = break_even(inputs, source)
    document: dict[str, Any] = {
        "plan": str(plan),
        "trace": None if trace is None else str(trace),
        "requests_per_hour": source.per_hour,
        "burstiness": source.burstiness,
        "requests": requests,
        "seeds": seeds,
        "ways": [_document(one) for one in found],
        "break_even": None if line is None else break_even_document(line),
    }

    def show() -> None:
        _show(found, source.per_hour, requests, seeds)
        if line is not None:
            _show_break_even(line)

    output.result(document, show)


def _document(one: Summary) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return value._asdict()
        return {key: plain(each) for key, each in value.items()} if isinstance(value, dict) else value

    return {key: plain(value) for key, value in one._asdict().items()}


def _show(found: list[Summary], per_hour: float, requests: int, seeds: int) -> None:
    from remoe_cli.plan.wording import dollars, figure
    from remoe_cli.simulate.break_even import MOST_REFUSED

    def times(values: dict[str, Figure], *which: str) -> str:
        return " / ".join(f"{values[each].mean:.3g}" for each in which)

    rows = [
        (
            f"{one.name}, {one.spec}",
            dollars(one.usd_per_hour.mean),
            dollars(one.usd_per_million_tokens.mean),
            times(one.ttft_s, "p50", "p95", "p99"),
            times(one.tpot_s, "p50", "p99"),
            f"{one.cold.mean:.1%}",
            f"{one.refused.mean:.1%}",
        )
        for one in found
    ]
    columns = ("way", "an hour", "1M tokens", "TTFT p50/95/99, s", "TPOT p50/99, s", "cold", "refused")
    output.table(f"{figure(per_hour)} requests an hour, {requests:,} in each of {seeds} run{'s' if seeds > 1 else ''}", columns, rows)
    able = [one for one in found if one.refused.mean <= MOST_REFUSED]
    cheapest = min(able, key=lambda one: one.usd_per_hour.mean, default=None)
    if cheapest is None:
        output.paragraph(f"Each of them leaves more than {MOST_REFUSED:.0%} of the requests without an answer.")
        return
    least, most = dollars(cheapest.usd_per_hour.least), dollars(cheapest.usd_per_hour.most)
    of_runs = "" if least == most else f": {least} to {most} an hour in single runs"
    output.paragraph(f"Cheapest of those that answer at least {1 - MOST_REFUSED:.0%}: {cheapest.name}, {cheapest.spec}{of_runs}.")


def _show_break_even(line: BreakEvenBursts) -> None:
    from remoe_cli.simulate.wording import cheaper_text, has_point, runs_text

    there = f": {runs_text(line)} in single runs. Above, {line.against} costs less" if has_point(line) else ""
    output.paragraph(f"With times between requests as uneven as these (burstiness {line.burstiness:.2g}), {cheaper_text(line)}{there}.")

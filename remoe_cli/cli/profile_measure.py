"""`remoe profile measure`: a copy of a deployment's profile with the call times measured on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.options import DataOption, FieldOption, LimitOption, read_data
from remoe_cli.cli.pipeline_files import refuse_other_file
from remoe_cli.cli.profile_shared import MaxNewTokensOption, OutOption, finish
from remoe_cli.cli.replacing import ReplaceOption, agree_to_replace

if TYPE_CHECKING:
    from remoe_cli.profile.latency_record import Latency

EXAMPLES = examples(
    "remoe profile measure olmoe -o profiles/olmoe-measured",
    "remoe profile measure olmoe --data prompts.jsonl -o profiles/olmoe-measured",
)


def command(
    name: Annotated[
        str, typer.Argument(metavar="NAME", callback=refuse_other_file, help="A deployment that runs on this machine (--target local).")
    ],
    out: OutOption,
    data: DataOption = None,
    field: FieldOption = "prompt",
    limit: LimitOption = 16,
    max_new_tokens: MaxNewTokensOption = 64,
    yes: ReplaceOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Measure a local deployment's warm calls and cold starts, and copy its profile with these times.

    With --data it also answers the prompts, and the profile gets the times of whole answers.
    """
    from remoe_cli.deploy.local.calibrate import calibrate
    from remoe_cli.profile.record import refuse_foreign

    refuse_foreign(out)
    agree_to_replace(yes, out / "profile.json")
    texts = () if data is None else read_data(data, field, limit).texts
    made = calibrate(name, out, texts, max_new_tokens, output.console())
    finish(made, out, measured=_medians(made.record.latency, len(texts)))


def _medians(latency: Latency, answers: int) -> dict[str, tuple[float, str]]:
    """List the medians of what was measured, each with what it is of: answers told of calls where there were any."""
    calls, starts = latency.invocation, latency.cold_start
    assert calls is not None and starts is not None, "they have been measured"
    of_calls = f"the calls of {answers:,} answers" if answers else f"the smallest of {len(calls.samples):,} calls"
    return {
        "a warm call, outside the function": (calls.unbilled_s.p50, of_calls),
        "a warm call, inside, besides computing": (calls.billed_s.p50, of_calls),
        "a cold start": (starts.total_s, f"{starts.starts:,} starts"),
    }

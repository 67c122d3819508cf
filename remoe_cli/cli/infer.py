"""`remoe infer`: run a deployed model, and get text and a receipt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remoe_cli.cli import output
from remoe_cli.cli.target import ProfileOption, RegionOption, Target, TargetOption, account, only_on_aws
from remoe_cli.errors import RemoeError, UsageError

if TYPE_CHECKING:
    from remoe_cli.runtime.client import Endpoint
    from remoe_cli.runtime.prediction import Predict


def command(
    name: Annotated[str, typer.Argument(help="A deployment.")],
    prompt: Annotated[str | None, typer.Option(help="One prompt.")] = None,
    input: Annotated[str | None, typer.Option("--input", help="A file of prompts, as for 'remoe profile'; one answer each.")] = None,
    field: Annotated[str, typer.Option(help="Field of the prompts that holds the text.")] = "prompt",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    target: TargetOption = Target.local,
    region: RegionOption = None,
    profile: ProfileOption = None,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Stream the answer to a prompt, then its receipt. With --input and --json, one document a line."""
    from remoe_cli.cli.prompts import read_prompts
    from remoe_cli.runtime.client import answer

    if (prompt is None) == (input is None):
        raise UsageError("Give either --prompt TEXT or --input FILE.", "See 'remoe infer --help'.")
    only_on_aws(target, region=region, profile=profile)
    endpoint, predict = _reach_on_aws(name, region, profile) if target is Target.aws else _reach_here(name)
    on_text = (lambda piece: None) if output.is_json() else output.piece
    for text in read_prompts(str(input), field).texts if prompt is None else (prompt,):
        document = answer(endpoint, text, max_new_tokens, on_text, predict=predict)
        output.result(document, lambda document=document: show_receipt(document["receipt"]))  # type: ignore[misc]


def _reach_here(name: str) -> tuple[Endpoint, Predict | None]:
    from remoe_cli.deploy.local import target

    return target.reach(name), predictor_of(target.plan_path(name))


def _reach_on_aws(name: str, region: str | None, profile: str | None) -> tuple[Endpoint, Predict | None]:
    from remoe_cli.deploy.aws.reach import reach, told

    where = account(region, profile)
    return reach(where, name), predictor_of(told(where, name, "plan.json"))


def predictor_of(plan: Path) -> Predict | None:
    """What the plan predicts; None, with a message, where its profile is not at hand."""
    from remoe_cli.runtime.prediction import predictor

    try:
        return predictor(plan)
    except RemoeError as error:
        output.say(f"Receipts have no prediction: {error.message}")
        return None


def show_receipt(receipt: dict[str, Any]) -> None:
    """The receipt for people: what was measured beside what was predicted."""
    predicted = receipt["predicted"] or {}
    cost = receipt["cost"]
    rows = [
        ("time to first token", _ms(receipt["ttft_s"]), _ms(predicted.get("ttft_s"))),
        ("time per further token", _ms(receipt["tpot_s"]), _ms(predicted.get("tpot_s"))),
        ("cost of such answers", _usd(cost["total_usd"]), _usd(predicted.get("cost_usd_per_request"))),
        ("  main function", _usd(cost["main_usd"]), ""),
        ("  expert functions", _usd(cost["functions_usd"]), ""),
    ]
    output.line("\n")
    output.table(f"Receipt (prices: catalog '{receipt['catalog']}')", ("", "measured", "predicted"), rows)
    output.line(f"{receipt['prompt_tokens']} prompt tokens, {receipt['generated_tokens']} generated in {receipt['total_s']:.2f} s")
    if receipt["main_load_s"]:
        output.line(f"before that the main function took {receipt['main_load_s']:.1f} s to load, which is in its cost")
    calls = f"{receipt['invocations']} invocations of {len(receipt['functions'])} functions"
    output.line(
        f"{calls}, {receipt['cold_starts']} cold starts, {receipt['retries']} retries, "
        f"{receipt['billed_ms']} ms billed, {receipt['sent_bytes'] / 1e3:.0f} kB sent, {receipt['received_bytes'] / 1e3:.0f} kB received"
    )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def _usd(amount: float | None) -> str:
    from remoe_cli.plan.wording import per_million

    return "-" if amount is None else per_million(amount)

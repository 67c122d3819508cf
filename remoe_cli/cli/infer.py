"""`remoe infer`: run a deployed model, and get text and a receipt."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.options import DataOption, FieldOption, PromptOption, texts_of
from remoe_cli.cli.target import NameArgument, ProfileOption, RegionOption, Target, TargetOption, account, only_on_aws
from remoe_cli.errors import RemoeError, UsageError

if TYPE_CHECKING:
    from remoe_cli.runtime.client import MainAddress
    from remoe_cli.runtime.expected_cost import ExpectedCost

EXAMPLES = examples(
    "remoe infer demo --prompt 'What is the capital of France?'",
    "remoe infer demo --data prompts.jsonl --json > answers.jsonl   # one JSON document a line",
    "git diff | remoe infer demo --prompt -",
)


def command(
    name: NameArgument,
    prompt: PromptOption = None,
    data: DataOption = None,
    field: FieldOption = "prompt",
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Longest answer, in tokens.")] = 256,
    target: TargetOption = Target.local,
    region: RegionOption = None,
    profile: ProfileOption = None,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Ask a deployment, and show the answer and a receipt: its times and costs beside the predicted ones."""
    if (prompt is None) == (data is None):
        raise UsageError("Give either --prompt TEXT or --data FILE.", "See 'remoe infer --help'.")
    only_on_aws(target, region=region, profile=profile)
    endpoint, expected = _reach_on_aws(name, region, profile) if target is Target.aws else _reach_here(name)
    for text in texts_of(prompt, data, field):
        document = ask(endpoint, text, max_new_tokens, expected)
        output.result(document, lambda document=document: show_receipt(document["receipt"]))  # type: ignore[misc]


def ask(endpoint: MainAddress, text: str, max_new_tokens: int, expected: ExpectedCost | None) -> dict[str, Any]:
    """Return the answer to one prompt with its receipt; without --json the text is printed as it comes."""
    from remoe_cli.runtime.client import answer

    with ExitStack() as waiting:
        waiting.enter_context(output.progress("Waiting for the answer"))

        def on_text(piece: str) -> None:
            if not output.is_json():
                waiting.close()
                output.piece(piece)

        return answer(endpoint, text, max_new_tokens, on_text, expected=expected)


def _reach_here(name: str) -> tuple[MainAddress, ExpectedCost | None]:
    from remoe_cli.deploy.local import target

    return target.reach(name), expected_cost_of(target.plan_path(name))


def _reach_on_aws(name: str, region: str | None, profile: str | None) -> tuple[MainAddress, ExpectedCost | None]:
    from remoe_cli.deploy.aws.access import deployed_file, reach

    where = account(region, profile)
    return reach(where, name), expected_cost_of(deployed_file(where, name, "plan.json"))


def expected_cost_of(plan: Path) -> ExpectedCost | None:
    """What the plan predicts; None, with a message, where its profile is not at hand."""
    from remoe_cli.runtime.expected_cost import expected_cost

    try:
        return expected_cost(plan)
    except RemoeError as error:
        output.say(f"Receipts have no prediction: {error.message}")
        return None


def show_receipt(receipt: dict[str, Any]) -> None:
    """The receipt for people: what was measured beside what was predicted."""
    predicted = receipt["predicted"] or {}
    cost = receipt["cost"]
    rows = [
        ("time to first token (TTFT)", _ms(receipt["ttft_s"]), _ms(predicted.get("ttft_s"))),
        ("time per further token (TPOT)", _ms(receipt["tpot_s"]), _ms(predicted.get("tpot_s"))),
        ("cost of such answers", _usd(cost["total_usd"]), _usd(predicted.get("cost_usd_per_request"))),
        ("  main function", _usd(cost["main_usd"]), ""),
        ("  expert functions", _usd(cost["functions_usd"]), ""),
    ]
    output.line("\n")
    output.table(f"Receipt (prices: catalog '{receipt['catalog']}')", ("", "measured", "predicted"), rows)
    tokens = f"{receipt['prompt_tokens']} prompt tokens, {receipt['generated_tokens']} generated in {receipt['total_s']:.2f} s"
    output.line(f"{tokens}; {receipt['invocations']} invocations of {len(receipt['functions'])} functions, {receipt['billed_ms']} ms billed")
    if receipt["main_load_s"]:
        output.line(f"before that the main function took {receipt['main_load_s']:.1f} s to load, which is in its cost")
    payloads = f"{receipt['sent_bytes'] / 1e3:.0f} kB sent, {receipt['received_bytes'] / 1e3:.0f} kB received"
    output.line(f"{receipt['cold_starts']} cold starts, {receipt['retries']} retries, {payloads}")


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def _usd(amount: float | None) -> str:
    from remoe_cli.plan.wording import per_million

    return "-" if amount is None else per_million(amount)

"""`remoe infer`: run a deployed model, and get text and a receipt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.options import DataOption, FieldOption, PromptOption, prompts_of
from remoe_cli.cli.sampling import (
    MaxNewTokensOption,
    MessagesOption,
    MinPOption,
    SeedOption,
    StopOption,
    SystemOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    sampling_of,
    with_system,
)
from remoe_cli.cli.target import NameArgument, ProfileOption, RegionOption, TargetName, TargetOption, pick
from remoe_cli.errors import ArtifactError, DeployError, ModelError, RemoeError, UsageError
from remoe_cli.units import size

if TYPE_CHECKING:
    from remoe_cli.model.chat import Prompt
    from remoe_cli.profile.prompts import PromptSet
    from remoe_cli.runtime.client import MainAddress
    from remoe_cli.runtime.sampling import Sampling

_OF_ALL = (ArtifactError, DeployError, ModelError)  # what is the same for all prompts
EXAMPLES = examples(
    "remoe infer demo --prompt 'What is the capital of France?'",
    "remoe infer demo --data prompts.jsonl --json > answers.jsonl   # one JSON document a line",
    "git diff | remoe infer demo --system 'Review this change.' --temperature 0.7 --prompt -",
)


def command(
    name: NameArgument,
    prompt: PromptOption = None,
    data: DataOption = None,
    field: FieldOption = "prompt",
    messages: MessagesOption = None,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    seed: SeedOption = None,
    stop: StopOption = None,
    target: TargetOption = TargetName.local,
    region: RegionOption = None,
    profile: ProfileOption = None,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Ask a deployment, and show the answer and a receipt: its times and costs beside the predicted ones.

    With --quiet the answer alone is printed.
    """
    if [prompt, data, messages].count(None) != 2:
        raise UsageError("Give either --prompt TEXT, --messages FILE or --data FILE.", "See 'remoe infer --help'.")
    sampling = sampling_of(temperature, top_p, top_k, min_p, seed, stop)
    deployed = pick(target, region, profile)
    address = deployed.main_address(name)
    prompts, failed = prompts_of(prompt, messages or data, field), Failed()
    if messages is not None and len(prompts.texts) != 1:
        raise UsageError(f"{messages} holds {len(prompts.texts)} conversations, not one.", "Give several with --data.")
    for index, text in enumerate(prompts.texts):
        try:
            document = ask(address, with_system(text, system), max_new_tokens, sampling)
        except RemoeError as error:
            if data is None:
                raise
            failed.note(error, prompts, index)
        else:
            failed.last = ""
            say_cut(document, max_new_tokens)
            output.result(document, lambda document=document: None if output.is_quiet() else show_receipt(document["receipt"]))  # type: ignore[misc]
    failed.exit(len(prompts.texts))


@dataclass
class Failed:
    """The prompts of a file that got no answer, each of which is told in its place.

    The others are asked all the same.
    """

    count: int = 0
    last: str = ""

    def note(self, error: RemoeError, prompts: PromptSet, index: int) -> None:
        """Print why a prompt failed, with its row.

        Raises: the error with the row where all further prompts would fail too: the main function is gone, or two prompts in a row end in
        the same failure of an expert function.
        """
        from remoe_cli.runtime.receipt import attach, receipt_of

        here = type(error)(f"{prompts.where(index)}: {error.message}", error.hint)
        if receipt := receipt_of(error):
            attach(here, receipt)
        if not isinstance(error, UsageError) and (isinstance(error, _OF_ALL) or error.message == self.last):
            raise here
        self.count, self.last = self.count + 1, error.message
        output.fail(here, row=prompts.rows[index] if prompts.rows else index + 1)

    def exit(self, asked: int) -> None:
        """End the command with status 1 when a prompt has failed."""
        if self.count:
            output.say(f"{self.count} of {asked} prompts failed.")
            raise typer.Exit(1)


def ask(address: MainAddress, prompt: Prompt, max_new_tokens: int, sampling: Sampling | None = None) -> dict[str, Any]:
    """Return the answer to one prompt with its receipt; without --json the text is printed as it comes."""
    from remoe_cli.runtime.client import answer
    from remoe_cli.runtime.sampling import GREEDY

    begun = False
    with ExitStack() as waiting:
        waiting.enter_context(output.progress("Waiting for the answer"))

        def on_text(piece: str) -> None:
            nonlocal begun
            begun = True
            if not output.is_json():
                if output.shows_bars():  # elsewhere a line on stderr says when no text came for long
                    waiting.close()
                output.piece(piece)

        try:
            return answer(address, prompt, max_new_tokens, on_text, sampling=sampling or GREEDY)
        finally:
            if begun and not output.is_json():
                output.line()  # what is said next is no part of the answer


def say_cut(document: dict[str, Any], max_new_tokens: int) -> None:
    """Say on stderr that an answer ended before the model ended it, where people read it."""
    tokens, reason = document["receipt"]["generated_tokens"], document.get("finish_reason")
    if output.is_json() or reason not in ("length", "time-limit"):
        return
    why = "its time was over" if reason == "time-limit" else "that is the longest that the model or its plan has room for"
    output.say(f"The answer was cut after {tokens} tokens ({'--max-new-tokens' if tokens >= max_new_tokens else why}).")


def show_receipt(receipt: dict[str, Any]) -> None:
    """Print the receipt for people: measured figures beside the predicted ones."""
    predicted = receipt["predicted"] or {}
    cost = receipt["cost"]
    rows = [
        ("time to first token (TTFT)", _ms(receipt["ttft_s"]), _ms(predicted.get("ttft_s"))),
        ("time per further token (TPOT)", _ms(receipt["tpot_s"]), _ms(predicted.get("tpot_s"))),
        ("cost of a million such requests", _usd(cost["total_usd"]), _usd(predicted.get("cost_usd_per_request"))),
        *_main_rows(receipt["main"], cost),
        ("  expert functions", _usd(cost["functions_usd"]), ""),
    ]
    output.line()
    output.table(f"Receipt, at the prices of catalog '{receipt['catalog']}'", ("", "measured", "predicted"), rows)
    if not predicted:
        output.paragraph("Nothing is predicted: an earlier version of remoe has deployed this plan. Deploy it again.")
    tokens = f"{receipt['prompt_tokens']} prompt tokens, {receipt['generated_tokens']} generated tokens"
    output.paragraph(f"{tokens}, {receipt['total_s']:.2f} s")
    if receipt["main_load_s"]:
        loading = f", and {_usd(cost['loading_usd'])} for expert functions, at a million such requests" if cost["loading_usd"] else ""
        output.paragraph(f"Loading the main function took {receipt['main_load_s']:.1f} s before that{loading}. The cost includes it.")
    output.paragraph(_paid(receipt))
    calls = f"{receipt['invocations']} calls of {len(receipt['functions'])} expert functions"
    starts = f"{receipt['cold_starts']} cold start{'' if receipt['cold_starts'] == 1 else 's'}"
    output.paragraph(f"{calls}: {starts}, {receipt['retries']} retries, {receipt['billed_ms']} ms billed")
    if ahead := receipt.get("starts_ahead"):
        output.paragraph(f"Calls that only started a function, before the prompt came to its layer: {ahead}")
    if saved := receipt.get("saved_calls"):
        what = f"{saved} more calls were not made: the main function had their experts in memory."
        output.paragraph(f"{what} They would have cost about {_usd(receipt.get('saved_usd', 0.0))} at a million such requests.")
    if drafted := receipt.get("draft_tokens"):
        by_assistant = receipt.get("assistant_draft_tokens", 0)
        whose = f", of the assistant's {receipt.get('assistant_accepted_tokens', 0)} of {by_assistant}" if by_assistant else ""
        output.paragraph(f"{receipt.get('accepted_tokens', 0)} of {drafted} draft tokens accepted{whose}")
    if hedges := receipt.get("hedges"):
        output.paragraph(f"Calls that were made a second time, because the first one took long: {hedges}")
    if fallbacks := receipt.get("fallbacks"):
        output.paragraph(
            f"{fallbacks} calls had no answer in time: the main function computed their experts itself. 'remoe logs NAME' says why."
        )
    output.paragraph(f"{size(receipt['sent_bytes'])} sent, {size(receipt['received_bytes'])} received")


def _main_rows(main: dict[str, Any], cost: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    yield "  main function", _usd(cost["main_usd"]), ""
    if main["prices"]["share_usd"] is not None:
        yield "    its time", _usd(cost["main_busy_usd"]), ""
        yield "    idle hours, shared by all requests", _usd(cost["main_idle_usd"]), ""


def _paid(receipt: dict[str, Any]) -> str:
    """Say which costs are those of billed time, and which are list price times measured time."""
    main = receipt["main"]
    parts = ["main function: " + ("billed time (REPORT line)" if main["basis"] == "report" else "measured time")]
    if receipt["functions"]:
        parts.append("expert functions: billed time (REPORT lines)")
    text = f"Costs are list prices; {', '.join(parts)}."
    if main["prices"]["rented"] and main["prices"]["share_usd"] is None:
        text += " Its idle hours are not in it, as the traffic is unknown."
    if receipt["unreported"]:
        text += f" What {receipt['unreported']} tries of calls were billed was not known in time. A later receipt may have it."
    return text


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def _usd(amount: float | None) -> str:
    """Write what a million requests cost that cost so much each."""
    from remoe_cli.plan.wording import dollars

    return "-" if amount is None else dollars(amount * 1e6)

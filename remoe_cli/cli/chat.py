"""`remoe chat`: a conversation with a deployed model, turn by turn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.infer import ask, say_cut, show_receipt
from remoe_cli.cli.sampling import (
    MaxNewTokensOption,
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
from remoe_cli.cli.visible import is_utf8
from remoe_cli.errors import RemoeError, UsageError

if TYPE_CHECKING:
    from remoe_cli.model.chat import Prompt

_HELP = "Write a message, or /receipt (what the last answer took and cost), /reset (begin again), /exit."
EXAMPLES = examples("remoe chat demo", "remoe chat demo --system 'Answer in one sentence.' --temperature 0.7")


def command(
    name: NameArgument,
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
    quiet: output.QuietOption = False,
) -> None:
    """Talk to a deployment: each message is answered with all messages before it in mind.

    On a terminal, the arrow keys bring back earlier messages. Elsewhere each line of standard input is one message.
    """
    sampling = sampling_of(temperature, top_p, top_k, min_p, seed, stop)
    deployed = pick(target, region, profile)
    address = deployed.main_address(name)
    with_system("", system)  # so that a wrong one is said now
    output.say(_HELP)
    talk(lambda prompt: ask(address, prompt, max_new_tokens, sampling), system, max_new_tokens)


def talk(answer: Callable[[Prompt], dict[str, Any]], system: str | None, max_new_tokens: int) -> None:
    """Read messages and commands until there are no more; a message that fails is taken back.

    Raises: what `answer` raises, where nobody can write another message.
    """
    from remoe_cli.model.chat import Conversation

    messages: list[dict[str, Any]] = []
    receipt: dict[str, Any] | None = None
    while (text := _read()) is not None:
        match text.strip():
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                messages, receipt = [], None
                output.say("The conversation begins again.")
            case "/receipt" if receipt is not None:
                show_receipt(receipt)
            case "/receipt":
                output.say("There is no answer yet.")
            case word if word.startswith("/") and " " not in word:
                output.say(f"{word} is no command. {_HELP}")
            case _:
                asked = [*messages, {"role": "user", "content": text}]
                try:
                    document = answer(with_system(Conversation(tuple(asked)), system))
                except RemoeError as error:
                    if not sys.stdin.isatty():
                        raise
                    output.say(f"{error.message} {error.hint}")
                    continue
                say_cut(document, max_new_tokens)
                receipt = document["receipt"]
                messages = [*asked, {"role": "assistant", "content": document["text"]}]


def _read() -> str | None:
    """Read one message; None at the end of the input. Raises: UsageError for text that is not UTF-8."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives `input` its history
    try:
        text = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except UnicodeDecodeError:
        text = "\udcff"
    if not is_utf8(text):
        raise UsageError("The message is not UTF-8.", "Write it in UTF-8, as a terminal in a UTF-8 locale does.")
    return text

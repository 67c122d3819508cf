"""Options that say what is asked and how tokens are chosen; `remoe infer` and `remoe chat` have them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from remoe_cli.errors import UsageError

if TYPE_CHECKING:
    from remoe_cli.model.chat import Prompt
    from remoe_cli.runtime.sampling import Sampling

_PANEL = "Sampling"
SystemOption = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt, before the conversation.")]
MessagesOption = Annotated[
    str | None, typer.Option(metavar="FILE", help="One conversation: {\"messages\": [...]} in a .json or .jsonl file; '-' reads it.")
]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Longest answer, in tokens.")]
TemperatureOption = Annotated[
    float, typer.Option(min=0, max=100, metavar="T", rich_help_panel=_PANEL, help="0 takes the likeliest token; 1 draws as the model says.")
]
TopPOption = Annotated[float, typer.Option(metavar="P", rich_help_panel=_PANEL, help="Take the likeliest tokens up to this sum.")]
TopKOption = Annotated[int, typer.Option(min=0, metavar="K", rich_help_panel=_PANEL, help="Take the K likeliest tokens; 0: all.")]
MinPOption = Annotated[
    float, typer.Option(min=0, max=1, metavar="P", rich_help_panel=_PANEL, help="Leave out tokens less likely than P times the likeliest.")
]
SeedOption = Annotated[int | None, typer.Option(metavar="N", rich_help_panel=_PANEL, help="The same seed gives the same answer again.")]
StopOption = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Text that ends an answer; may be given several times.")]


def sampling_of(temperature: float, top_p: float, top_k: int, min_p: float, seed: int | None, stop: list[str] | None) -> Sampling:
    """Make the parameters of a request; raises UsageError that names the option which is wrong."""
    from pydantic import ValidationError

    from remoe_cli.runtime.sampling import Sampling

    try:
        return Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, stop=tuple(stop or ()))
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise UsageError(f"--{option} is wrong: {first['msg']}.", "See 'remoe infer --help'.") from None


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """Put a system prompt before a prompt; raises UsageError where there is one already."""
    from remoe_cli.model.chat import Conversation, conversation

    if system is None:
        return prompt
    if isinstance(prompt, str):
        prompt = Conversation(({"role": "user", "content": prompt},))
    if any(message["role"] == "system" for message in prompt.messages):
        raise UsageError("The conversation has a system prompt, and --system gives another.", "Leave one of them out.")
    (first,) = conversation([{"role": "system", "content": system}], where="--system").messages or (None,)
    return prompt if first is None else Conversation((first, *prompt.messages), prompt.tools)

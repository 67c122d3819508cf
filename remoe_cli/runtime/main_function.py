"""The main function: a loaded model that answers requests.

runtime/server.py takes requests over HTTP, runtime/lambda_main.py takes them as Lambda events.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from remoe_cli import artifacts
from remoe_cli.errors import RemoeError, UsageError
from remoe_cli.model.chat import Prompt, conversation
from remoe_cli.model.draft import Speculate
from remoe_cli.plan.wording import dollars
from remoe_cli.redaction import redacted
from remoe_cli.runtime.answer import Generated, Piece, Stop, TokenCalls, TokenLogprob, ToolCall, Until, together, why_not_begun
from remoe_cli.runtime.invoke import Invocation
from remoe_cli.runtime.kept import LONGEST_USER, Ended, Keep
from remoe_cli.runtime.ledger import Ledger
from remoe_cli.runtime.main_state import MainState, state_of
from remoe_cli.runtime.observed import Observed, observe
from remoe_cli.runtime.receipt import NOT_LOADED, Loading, Receipt, attach, failed_receipt, make_receipt, receipt_of
from remoe_cli.runtime.sampling import CHOICES, Sampling
from remoe_cli.runtime.server_config import ServerConfig

if TYPE_CHECKING:
    from remoe_cli.runtime.engine import Engine
    from remoe_cli.runtime.expected_cost import Predictor
    from remoe_cli.runtime.sequence import TokenSequence


class Request(Sampling):
    """One request, with exactly one of `prompt`, `messages` and `prompt_token_ids`.

    template         whether a prompt is put into the model's chat template
    messages, tools  as in OpenAI's chat API
    max_new_tokens   null: as many as the model has positions for, and the deployment's plan provides for
    n                answers to give, one after another
    user             who asks: kept beside the receipt, and users of one address take turns
    calls            tell the times of all calls of expert functions
    tool_calls       read calls of tools out of the answers
    observed         tell what the client keeps beside the receipt (runtime/observed.py)
    """

    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    template: bool = True
    max_new_tokens: int | None = Field(default=256, ge=1, le=2**31 - 1)
    n: int = Field(default=1, ge=1, le=CHOICES)
    user: str | None = Field(default=None, max_length=LONGEST_USER)
    stream: bool = False
    calls: bool = False
    tool_calls: bool = False
    observed: bool = False

    def asked(self) -> Prompt | None:
        """Return the prompt, or the messages as a conversation; raises UsageError for what is no message."""
        return self.prompt if self.messages is None else conversation(self.messages, self.tools, where="The request")


class Choice(BaseModel):
    """One answer of those that a request asked for.

    stop_string   the request's own, if one ended the answer
    logprobs      of each token, where the request asked for them
    """

    model_config = ConfigDict(frozen=True)

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_string: str | None = Field(default=None, exclude_if=lambda value: value is None)
    logprobs: tuple[TokenLogprob, ...] = Field(default=(), exclude_if=lambda value: not value)
    tool_calls: tuple[ToolCall, ...] = Field(default=(), exclude_if=lambda value: not value)


class Answer(Choice):
    """What the main function answers to one request: its first choice, and any others.

    calls   for calibration: the tokens after the first, and their calls (Generated.further)
    """

    prompt_token_ids: tuple[int, ...]
    receipt: Receipt
    calls: tuple[TokenCalls, ...] | None = None
    observed: Observed | None = Field(default=None, exclude_if=artifacts.is_none)
    others: tuple[Choice, ...] = Field(default=(), exclude_if=lambda value: not value)

    @property
    def choices(self) -> tuple[Choice, ...]:
        return (self, *self.others)


def parse(body: bytes | Mapping[str, Any]) -> Request:
    """Read a request from a JSON body, or from a parsed one.

    Raises: UsageError for a body that is no request.
    """
    try:
        # JSON both times: an array is no tuple to a strict model, and half of a surrogate pair is refused.
        request = Request.model_validate_json(body if isinstance(body, bytes) else json.dumps(body))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))[:100]
        raise UsageError(
            f"The request is wrong{f' at {where!r}' if where else ''}: {first['msg']}.",
            "It is a JSON object with 'prompt', 'messages' or 'prompt_token_ids', and may have 'max_new_tokens' and 'stream'.",
        ) from None
    if [request.prompt, request.messages, request.prompt_token_ids].count(None) != 2:
        raise UsageError("A request has either 'prompt' or 'prompt_token_ids', or 'messages'.", "Give one of the three.")
    if request.messages == ():
        raise UsageError("A request has 'messages' that are empty.", "Give at least one message.")
    if request.tools is not None and request.messages is None:
        raise UsageError("A request has 'tools' without 'messages'.", "Give 'messages', or leave 'tools' out.")
    request.asked()  # so that messages that are none are refused now
    return request


def described(error: Exception) -> dict[str, Any]:
    """Describe an error as a document, of which runtime/client.py makes an error of the same kind.

    It has the receipt of the request, where something was billed for it, and no secret.
    """
    receipt = receipt_of(error)
    billed = {"receipt": receipt.model_dump(mode="json")} if receipt else {}
    if isinstance(error, RemoeError):
        return {"kind": error.kind, "message": redacted(error.message), "hint": redacted(error.hint)} | billed
    return {
        "kind": "Internal",
        "message": redacted(f"{type(error).__name__}: {error}"),
        "hint": "See 'remoe logs NAME --function main'; please report it.",
    } | billed


def until(limit_s: float, *cancelling: Event) -> Until:
    """Make the `stopped` of an answer that ends at an event, or when `time.monotonic()` passes `limit_s`."""
    return Until(limit_s, cancelling)


# What answers a request: it asks for sequences one after another, and gets each when it has ended.
Answering = Generator["TokenSequence", Generated, Answer]


@dataclass(frozen=True)
class MainFunction:
    """A loaded main function.

    `answer` answers one request; a server lets several go on at once (scheduler.py).

    loading         how it was loaded
    loading_calls   of expert functions, meanwhile
    spent           what expert functions have been billed
    expected        predicts what a request takes and costs; None in a deployment of an earlier version
    keep            keeps the receipt of each request; None where nobody does
    created         when it was loaded, in seconds since 1970
    """

    config: ServerConfig
    engine: Engine
    loading: Loading = NOT_LOADED
    loading_calls: tuple[Invocation, ...] = ()
    spent: Ledger = field(default_factory=Ledger)
    expected: Predictor | None = None
    keep: Keep | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        """Return what clients call the model: its name on the hub, or its folder's name."""
        path = self.config.model.path
        return Path(path).name if Path(path).is_absolute() else path

    @property
    def loading_billed(self) -> str:
        """Say what loading was billed, which is in no receipt of a main function that is always on."""
        spent = self.spent.loading
        return f"Expert functions were billed {spent.billed_ms} ms in {spent.invocations} calls meanwhile, {dollars(spent.usd)} in all."

    @property
    def loading_receipt(self) -> Receipt:
        return failed_receipt(self.config.prices, 0.0, (), self.loading, self.loading_calls)

    def refuse(self, request: Request) -> None:
        """Raise UsageError for unknown token ids, an answer that is too long, or a wrong grammar."""
        if request.grammar is not None:
            self.engine.grammars.check(request.grammar)
        if request.prompt_token_ids is not None:
            self.engine.refuse(request.prompt_token_ids, request.max_new_tokens or 1)

    @property
    def concurrency(self) -> int:
        """Return how many requests may be answered at once.

        As many as the plan counts on, if the model's family can share a step.
        """
        return self.config.concurrency if self.config.concurrency > 1 and self.engine.batches else 1

    @property
    def speculate(self) -> Speculate:
        """Return how many draft tokens a pass may have: as deployed, if the model's family takes drafts."""
        return self.config.speculate if self.config.speculate != "off" and self.engine.drafts else "off"

    def answer(
        self,
        request: Request,
        on_piece: Callable[[Piece], None] = lambda piece: None,
        stopped: Callable[[], Stop | None] = lambda: None,
        *,
        first: bool = False,
    ) -> Answer:
        """Answer a request alone. Raises: what `answering` raises."""
        answering = self.answering(request, on_piece, stopped, first=first)
        try:
            sequence = next(answering)
            while True:
                try:
                    made = self.engine.run(sequence)
                except Exception as error:
                    sequence = answering.throw(error)
                else:
                    sequence = answering.send(made)
        except StopIteration as end:
            answer: Answer = end.value
            return answer

    def answering(
        self, request: Request, on_piece: Callable[[Piece], None], stopped: Callable[[], Stop | None], *, first: bool = False
    ) -> Answering:
        """Ask for the sequences of all answers to a request, one after another, and return the answer.

        `stopped` is asked after every token. `first` tells that this function was loaded for this request, which pays for it.

        Raises: what Engine.sequence raises and what ends a sequence, and DeployError when the answer has to end before it has begun. The
        error carries the receipt of what was billed until then.
        """
        begun_s, prices = time.perf_counter(), self.config.prices
        loading, loading_calls = (self.loading, self.loading_calls) if first else (NOT_LOADED, ())
        made: list[Generated] = []
        sequence: TokenSequence | None = None
        readers = self.engine.readers(request.tools or (), request.n) if request.tool_calls else None
        pass_on = readers.pass_on(on_piece) if readers else on_piece
        try:
            if early := why_not_begun(stopped()):
                raise early
            ids = self.prompt_ids(request)
            new = self._room(len(ids)) if request.max_new_tokens is None else request.max_new_tokens
            self.config.refuse_unserved(len(ids), new)
            for index in range(request.n):
                if made and (reason := stopped()):
                    made.append(Generated(tuple(ids), (), "", reason, (), ()))
                    continue
                of_choice = lambda piece, index=index: pass_on(replace(piece, choice=index))  # noqa: E731
                sequence = self.engine.sequence(ids, new, of_choice, stopped, request.of_choice(index), self.speculate)
                made.append((yield sequence))
                sequence = None
        except Exception as error:
            calls, paid_s = [call for each in made for call in each.billed], [each.paid_s for each in made]
            if sequence is not None:
                calls += sequence.parts
                paid_s.append(sequence.main_s)
            alone = all(each.parts is None for each in made) and (sequence is None or sequence.alone)
            seconds = time.perf_counter() - begun_s
            receipt = failed_receipt(prices, seconds, calls, loading, loading_calls, paid_s=None if alone else sum(paid_s))
            left = stopped() == "cancelled"
            (self.spent.cancelled if left else self.spent.answers).add(receipt)
            if self.keep:
                self.keep(Ended("cancelled" if left else "failed", receipt, request.user))
            if calls or first:
                attach(error, receipt)
            raise
        receipt = make_receipt(together(made), prices, loading, loading_calls)
        receipt = receipt.model_copy(update={"main": receipt.main.model_copy(update={"device": self.engine.device})})
        left = made[-1].finish_reason == "cancelled"
        (self.spent.cancelled if left else self.spent.answers).add(receipt)
        if self.expected:
            further = [len(each.token_ids) - 1 for each in made if each.token_ids]
            receipt = receipt.model_copy(update={"predicted": self.expected(receipt.prompt_tokens, *further)})
        observed = observe(made, self.config.model.revision) if self.keep or request.observed else None
        if self.keep:
            self.keep(Ended("cancelled" if left else "answered", receipt, request.user, observed))
        if readers:
            readers.finish(on_piece)
        of_first, *others = (_choice(each, **(readers.of_choice(index) if readers else {})) for index, each in enumerate(made))
        return Answer(
            **dict(of_first),
            prompt_token_ids=made[0].prompt_token_ids,
            receipt=receipt,
            calls=made[0].further if request.calls else None,
            observed=observed if request.observed else None,
            others=tuple(others),
        )

    def prompt_ids(self, request: Request) -> Sequence[int]:
        """Return the tokens of a request's prompt; raises UsageError for one that the chat template refuses."""
        asked = request.asked()
        if asked is None:
            return request.prompt_token_ids or ()
        return self.engine.text_ids(asked) if isinstance(asked, str) and not request.template else self.engine.prompt_ids(asked)

    def _room(self, prompt_tokens: int) -> int:
        """Return how many new tokens the model has positions for and the plan provides for; at least 1, which then is refused."""
        positions, served = self.engine.positions, self.config.served
        most = [] if positions is None else [positions - prompt_tokens]
        if served is not None:
            most += [served.n_out + 1, served.tokens + 1 - prompt_tokens]
        return max(1, min(most, default=2**31 - 1 - prompt_tokens))

    def state(self) -> MainState:
        return state_of(self.config, self.engine, self.concurrency, self.speculate, self.spent)


def _choice(made: Generated, **read: Any) -> Choice:
    fields = {name: getattr(made, name) for name in ("text", "token_ids", "finish_reason", "stop_string", "logprobs")}
    return Choice(**fields | read)

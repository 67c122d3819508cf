"""Generate text with a model of which only the non-expert weights and the local experts are loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.logits_process import LogitsProcessorList

from remoe_cli.errors import LongRequestError, ModelError, RemoeError, UsageError
from remoe_cli.model.assistant import Assistant, load_assistant
from remoe_cli.model.batch_cache import croppable, joinable
from remoe_cli.model.chat import Prompt
from remoe_cli.model.checkpoint import Checkpoint, reason
from remoe_cli.model.draft import Drafts, Speculate
from remoe_cli.model.experts import Attachment, attach, expert_layers
from remoe_cli.model.generation import stop_strings, warning
from remoe_cli.model.loader import copy_weights, load, load_gpu_experts
from remoe_cli.model.products import prepare_products
from remoe_cli.model.shared_experts import start_early
from remoe_cli.model.spec import ONE_AT_A_TIME, MoeSpec
from remoe_cli.model.tokens import encode, load_tokenizer
from remoe_cli.runtime.answer import Generated, Piece, Stop
from remoe_cli.runtime.batch import Batch
from remoe_cli.runtime.choose import processors
from remoe_cli.runtime.device import Device, choose, describe, full_memory_named
from remoe_cli.runtime.device_choice import DeviceChoice
from remoe_cli.runtime.dispatch import Dispatcher
from remoe_cli.runtime.follow import Grammars
from remoe_cli.runtime.invoke import Connect, Invocation
from remoe_cli.runtime.remote_function import RemoteFunction
from remoe_cli.runtime.sampling import GREEDY, Sampling
from remoe_cli.runtime.sequence import Inputs, Stream, TokenSequence
from remoe_cli.runtime.served_hits import Hits
from remoe_cli.runtime.server_config import StartPolicy
from remoe_cli.runtime.start_ahead import Starting, start_all
from remoe_cli.runtime.tool_calls import Reader, Readers
from remoe_cli.runtime.tool_formats import ToolFormat, format_of, why_none

_log = logging.getLogger(__name__)  # without a handler, its warnings go to stderr: the log of a main function


@dataclass(frozen=True)
class Engine:
    """A loaded model, its tokenizer, and the dispatcher that is attached to its MoE layers.

    stop     the model's own stop strings
    device   of everything but the experts, and of those that the dispatcher has on it
    uncounted  makes what counts how often the tokens of an answer choose each expert
    assistant  drafts where nothing is found; None: nobody does
    """

    model: PreTrainedModel
    tokenizer: Any
    dispatcher: Dispatcher
    attachment: Attachment
    stop: Sequence[str]
    device: Device
    uncounted: Callable[[], Hits]
    assistant: Assistant | None = None

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        return encode(self.tokenizer, prompt)

    def text_ids(self, text: str) -> list[int]:
        """Encode a text as it stands, outside the chat template."""
        return list(self.tokenizer(text)["input_ids"])

    @property
    def batches(self) -> bool:
        """Whether several requests of this model can be answered at once (model/batch_cache.py)."""
        family = self.model.config.get_text_config(decoder=True).model_type
        return family not in ONE_AT_A_TIME and joinable(self._empty_cache)

    @property
    def drafts(self) -> bool:
        """Whether a pass may take draft tokens: what is wrong of them can be taken back."""
        return croppable(self._empty_cache)

    @cached_property
    def _empty_cache(self) -> Cache | None:
        inputs, _ = self._prepared((0,), 1, LogitsProcessorList(), {})
        return inputs.cache(self.model)

    def warm_up(self) -> None:
        """Generate one token: proves the hook, and pages the weights in, before anybody waits for an answer.

        Raises: ModelError when the model's settings let no token be generated, and what `generate` raises.
        """
        try:
            generated = self.generate([0], 1)
        except RemoeError:
            raise
        except Exception as error:  # transformers checks some of generation_config.json only here
            raise ModelError(f"The model cannot generate: {reason(error)}", "Check its generation_config.json.") from None
        self.dispatcher.sent.extend(generated.invocations)  # they are calls of loading, and not of an answer
        self.attachment.check_fired(1)
        if self.assistant:
            with torch.inference_mode():
                self.assistant.begin()([0], 1)

    def generate(
        self,
        prompt_ids: Iterable[int],
        max_new_tokens: int,
        on_piece: Callable[[Piece], None] = lambda piece: None,
        stopped: Callable[[], Stop | None] = lambda: None,
        sampling: Sampling = GREEDY,
        speculate: Speculate = "off",
    ) -> Generated:
        """Answer one prompt alone. Calls of an answer that fails stay with the dispatcher.

        Raises: what `sequence` raises, InvokeError when an expert function fails, and DeployError when a GPU's memory is full.
        """
        sequence = self.sequence(prompt_ids, max_new_tokens, on_piece, stopped, sampling, speculate)
        try:
            return self.run(sequence)
        except Exception:
            self.dispatcher.sent[:0] = sequence.invocations
            raise

    def run(self, sequence: TokenSequence) -> Generated:
        """Generate a sequence to its end, alone. Raises: what ends it without an answer."""
        batch = self.batch()
        batch.add(sequence)
        while not sequence.ended:
            batch.step()
        if sequence.error is not None:
            raise sequence.error
        return sequence.generated()

    def batch(self) -> Batch:
        """Make a batch without sequences. One at a time is used: they share the hook."""
        return Batch(self.model, self.dispatcher)

    def sequence(
        self,
        prompt_ids: Iterable[int],
        max_new_tokens: int,
        on_piece: Callable[[Piece], None] = lambda piece: None,
        stopped: Callable[[], Stop | None] = lambda: None,
        sampling: Sampling = GREEDY,
        speculate: Speculate = "off",
    ) -> TokenSequence:
        """Begin an answer with tokens that `sampling` chooses; `on_piece` is called as text becomes whole.

        `stopped` is asked after every token; the answer ends when it returns a reason. `speculate` is how long its drafts may be; they
        change no token.

        Raises: what `refuse` raises, and UsageError for parameters that this model cannot follow.
        """
        ids = tuple(prompt_ids)
        self.refuse(ids, max_new_tokens)
        chosen, noted = processors(sampling, len(ids), self.vocabulary, self.model.device, self.grammars.follow)
        settings = {} if sampling.repetition_penalty is None else {"repetition_penalty": 1.0}  # not the model's own too
        given, made = self._prepared(ids, max_new_tokens, chosen, settings)
        return TokenSequence(
            prompt_ids=ids,
            max_new_tokens=max_new_tokens,
            inputs=given,
            processors=made,
            ends=frozenset(self.ends),
            stopped=stopped,
            strings=sampling.stop,
            hits=self.uncounted(),
            stream=Stream(self.tokenizer, (*self.stop, *sampling.stop), on_piece, noted, sampling.skip_special_tokens),
            drafts=Drafts(speculate, self.assistant.begin() if self.assistant and speculate != "off" else None),
        )

    def _prepared(
        self, ids: tuple[int, ...], new: int, chosen: LogitsProcessorList, settings: Mapping[str, Any]
    ) -> tuple[Inputs, LogitsProcessorList]:
        """Let transformers check the model's own settings, and prepare what changes logits and what the model is given.

        It would go on with a way of decoding that is its caller's. Ours is in batch.py.
        """
        prepared: dict[str, Any] = self.model.generate(
            input_ids=torch.tensor([ids], device=self.model.device),
            attention_mask=torch.ones((1, len(ids)), dtype=torch.long, device=self.model.device),
            max_new_tokens=new,
            do_sample=False,  # the last of the processors draws the token
            logits_processor=chosen,
            cache_implementation=None,
            disable_compile=True,
            pad_token_id=self.model.generation_config.pad_token_id or 0,
            custom_generate=lambda model, input_ids, **prepared: prepared,
            **settings,
        )
        own = ("logits_processor", "stopping_criteria", "generation_config", "attention_mask", "position_ids", "past_key_values")
        given = {name: value for name, value in prepared.items() if name not in own}
        inputs = Inputs(given, positions=prepared.get("position_ids") is not None, cached=prepared.get("past_key_values") is not None)
        return inputs, prepared["logits_processor"]

    @property
    def defaults(self) -> dict[str, Any]:
        """Return the sampling parameters of the model's own settings, for requests that have none.

        There are none where the settings ask for greedy decoding.
        """
        settings = self.model.generation_config
        found = {name: getattr(settings, name, None) for name in ("temperature", "top_p", "top_k", "min_p")}
        return {name: value for name, value in found.items() if value is not None} if settings.do_sample is not False else {}

    @property
    def ends(self) -> tuple[int, ...]:
        """Return the tokens that end an answer."""
        eos = self.model.generation_config.eos_token_id
        return (eos,) if isinstance(eos, int) else tuple(eos or ())

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.vocabulary, self.ends)

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """Return how the model writes calls of tools; None where that is not known, or it takes none."""
        return format_of(self.tokenizer)

    @property
    def no_tools(self) -> str:
        """Say for people why the model has no `tool_format`."""
        return why_none(self.tokenizer)

    def readers(self, tools: Sequence[Mapping[str, Any]], answers: int) -> Readers:
        """Make what reads calls of tools out of some answers; raises UsageError for a model that writes none."""
        if self.tool_format is None:
            raise UsageError(self.no_tools, "Leave the tools out.")
        field, hidden = self.tool_format.field, [*self.tokenizer.all_special_tokens, *self.tool_format.dropped]
        ends = [self.tokenizer.decode([token]) for token in self.ends]
        return Readers([Reader(field, tools, ends, hidden) for _ in range(answers)])

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def positions(self) -> int | None:
        """Return how many tokens the model has positions for; None where it has no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def refuse(self, ids: Sequence[int], new: int) -> None:
        """Raise UsageError for a prompt that this model cannot read, or an answer that it cannot give."""
        prompt, limit, vocabulary = len(ids), self.positions, self.vocabulary
        if wrong := next((token for token in ids if not 0 <= token < vocabulary), None):
            raise UsageError(
                f"The token id {wrong} is not in the model's vocabulary of {vocabulary} tokens.", f"Token ids are 0 to {vocabulary - 1}."
            )
        if not prompt:
            raise UsageError("The prompt has no tokens.", "Give a prompt with some text.")
        if new < 1:
            raise UsageError(f"max_new_tokens is {new}, but an answer has at least one token.", "Give 1 or more.")
        if limit is not None and prompt + new > limit:
            raise LongRequestError(
                f"{prompt} prompt tokens and {new} new ones exceed the model's {limit} positions.",
                "Shorten the prompt, or ask for fewer new tokens.",
            )


def start_engine(
    checkpoint: Checkpoint,
    spec: MoeSpec,
    functions: Mapping[int, Sequence[RemoteFunction]],
    connect: Connect,
    *,
    gpu: bool = False,
    gpu_experts: Mapping[int, Sequence[int]] = MappingProxyType({}),
    device: DeviceChoice | None = None,
    copied: bool = False,
    sent: list[Invocation] | None = None,
    policy: StartPolicy | None = None,
    starting: Starting | None = None,
    assistant: Checkpoint | None = None,
) -> Engine:
    """Load the main function's part of the model, and attach a dispatcher for the remote experts.

    `functions` is by hidden layer, and so is `gpu_experts`. With `gpu`, everything but the experts is on the machine's GPU, and
    `gpu_experts` too, unless `device` says otherwise; on a CPU they are local experts as the rest. With `copied`, no weight stays mapped
    from its file. The expert functions start while the model loads (docs/reference/method.md, section 10), and read the experts that the
    prompts of `policy` will probably need; `starting`: they start already. `sent` takes their calls, also when this fails. `assistant` is
    loaded to the same device.

    Raises: InvokeError when an expert function cannot start, DeployError when there is no GPU that can be used, or its memory is full.
    """
    at = choose(gpu, device)  # before anything is started that costs money
    there = {layer: tuple(sorted(experts)) for layer, experts in gpu_experts.items()} if at != "cpu" else {}
    elsewhere = {layer: tuple(e for f in remote for e in f.experts) for layer, remote in functions.items()}
    local = spec.local_experts({n: elsewhere.get(n, ()) + there.get(n, ()) for n in {*elsewhere, *there}})
    starting = starting or start_all(functions, connect, [] if sent is None else sent, policy)
    dispatcher = Dispatcher(
        client=starting.client,
        local={layer: {e: row for row, e in enumerate(experts)} for layer, experts in local.items()},
        remote=functions,
        pool=starting.pool,
        sent=starting.sent,
        policy=policy,
    )
    dispatcher.caller.renew = starting.renew
    dispatcher.started(starting)
    try:
        with full_memory_named("Free the GPU, or serve on one with as much memory as the plan counts on."):
            model = load(checkpoint, local, device=at)
            dispatcher.gpu = load_gpu_experts(checkpoint, model, there, at)
            vocabulary = int(model.get_input_embeddings().weight.shape[0])
            loaded = load_assistant(assistant, vocabulary, at, copied=copied) if assistant else None
        prepare_products(model, [layer.module for layer in expert_layers(model)])
        if copied:
            copy_weights(model)
        if at != "cpu":
            dispatcher.starts = start_early(model)
        for started in starting.starts:
            started.result()
        tokenizer = load_tokenizer(checkpoint)
    finally:
        dispatcher.settle()
    if aside := warning(checkpoint):
        _log.warning(aside)
    uncounted = partial(Hits, spec.moe_layers, spec.experts_per_layer)
    attachment, stop = attach(model, dispatcher), stop_strings(checkpoint)
    return Engine(model, tokenizer, dispatcher, attachment, stop, describe(model.device), uncounted, loaded)

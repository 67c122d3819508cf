"""Runs a model on prompts, batch by batch, and writes a profile directory.

Prompts of similar length run together: within a window of 16 batches they are sorted by length, so that there is little padding. The
batches, and so all numbers, are the same whether a run is whole, cut into shards, or interrupted.

During a run, DIR/partial/ holds a safetensors file for each batch that is done, and a fingerprint of everything that decides the
counts. After an interruption the same command goes on after these batches; another command starts again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from remoe_cli import artifacts, bounded, interrupts, recognise
from remoe_cli.errors import ArtifactError, ModelError, UsageError
from remoe_cli.model.chat import Prompt
from remoe_cli.model.checkpoint import Checkpoint, find_named
from remoe_cli.model.spec import read_spec
from remoe_cli.profile.latency_record import Latency
from remoe_cli.profile.loss_record import QuantisationLoss
from remoe_cli.profile.merge import Arrays, join
from remoe_cli.profile.partial import Inputs, batches_of, delete_batches, file_of, folder_of, is_of, read_batch, size_of
from remoe_cli.profile.prompts import PromptSet
from remoe_cli.profile.record import (
    TRACE_TOKENS,
    DatasetRef,
    DatasetShard,
    ModelRef,
    Profile,
    ProfileRecord,
    RecordingSettings,
    read_profile,
    refuse_foreign,
    write_profile,
)
from remoe_cli.progress import Progress, no_progress

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from remoe_cli.model.assistant import Assistant

_PartOf = TypeVar("_PartOf", bound=artifacts.Part)
# Batches whose prompts are sorted together. Larger windows save little more padding, and a resumed run tokenises a window again.
_WINDOW = 16
# For progress only: a forward pass takes about as long as so many tokens of each prompt, besides those that it computes.
_PASS_TOKENS = 8


@interrupts.kept()
def profile(
    model: str,
    prompts: PromptSet,
    out: Path,
    *,
    max_new_tokens: int,
    max_prompt_tokens: int,
    batch_size: int,
    progress: Progress = no_progress,
    say: Callable[[str], None] = lambda message: None,
    shard: tuple[int, int] | None = None,
    latency: Latency | None = None,
    device_map: str | None = None,
    device: str = "cpu",
    may_replace: Callable[[Path], None] = lambda path: None,
    experts: Literal["int8", "int4"] | None = None,
    assistant: str | None = None,
) -> Profile:
    """Profile `model` on `prompts` into the directory `out`.

    `progress` opens a display for each stage. In the stage of the prompts it reports an int when a batch is written, and a float within a
    batch. `say` shows a message. `shard` (I, N) profiles slice I of N of the prompts. Times are measured unless `latency` is given.
    `device_map` is that of transformers. Everything but the experts is on `device`. `experts` is the form to which expert functions'
    experts are quantised: then times are those of that form, and what it loses is measured too. `assistant` is a model whose drafts are
    counted and timed too; where `latency` is given, it has its times. `may_replace` raises where a profile with other inputs, or what is
    finished of one, must stay.
    """
    from remoe_cli.model.generation import stop_strings, warning
    from remoe_cli.model.tokens import has_chat_template, load_tokenizer
    from remoe_cli.model.vectors import prompt_features

    refuse_foreign(out)
    with progress("Finding the model"):
        checkpoint = find_named(model)
        spec = read_spec(checkpoint, experts)
        tokenizer = load_tokenizer(checkpoint)
    if aside := warning(checkpoint):
        say(aside)
    with progress("Checking the model's files", of_bytes=True) as report:
        revision = checkpoint.identify(report)
    beside, drafting = None if assistant is None else find_named(assistant), None
    if beside is not None:
        from remoe_cli.profile.assistant import assistant_ref

        with progress("Checking the assistant's files", of_bytes=True) as report:
            drafting = assistant_ref(checkpoint, tokenizer, beside, report)
    with progress("Checking the prompts"):
        _check_prompts(tokenizer, prompts, say)
    inputs = Inputs(
        model=ModelRef(path=checkpoint.name, revision=revision),
        dataset=DatasetRef(
            source=prompts.source,
            field=prompts.field,
            prompts=len(prompts.texts),
            sha256=prompts.sha256,
            shard=DatasetShard(number=shard[0], of=shard[1]) if shard else None,
        ),
        settings=RecordingSettings(
            max_new_tokens=max_new_tokens,
            max_prompt_tokens=max_prompt_tokens,
            batch_size=batch_size,
            chat_template=has_chat_template(tokenizer),
            dtype=spec.dtype,
        ),
        spec=spec,
        assistant=drafting,
    )
    on_gpu = None if device_map else device != "cpu"
    if (finished := _finished(out, inputs, latency, on_gpu)) is not None:
        say(f"{out} is finished already: it was made of this model and these prompts, in the same way. Nothing was run.")
        return finished
    if (out / "profile.json").is_file():
        say(f"{out} holds a profile of another model, of other prompts or with other settings, which is replaced at the end.")
        may_replace(out / "profile.json")
    elif (fingerprint := out / "partial" / "inputs.json").is_file() and not is_of(fingerprint, inputs):
        say(f"{out} holds a part of a profile of another model, of other prompts or with other settings, which is deleted.")
        may_replace(fingerprint.parent)
    batches = batches_of(inputs)
    partial = folder_of(out, inputs)
    missing = [batch for batch in batches if not file_of(partial, batch).is_file()]
    total = sum(size_of(inputs, batch) for batch in batches)
    done = total - sum(size_of(inputs, batch) for batch in missing)
    measured = partial / "latency.json"
    if measured.is_file() and not _is_measured(_measured(measured), on_gpu):
        measured.unlink()
    compared = partial / "loss.json"
    loaded = helper = None
    if missing or not (latency or measured.is_file()) or not (experts is None or compared.is_file()):
        with progress(f"Loading {checkpoint.name}"):
            loaded, load_s = _load(checkpoint, device_map, device)
            helper = None if beside is None else _assistant(beside, loaded)
        if experts is not None and not compared.is_file():
            with progress("Measuring what quantised experts lose") as report:
                artifacts.write_json(compared, _loss(loaded, tokenizer, inputs, prompts.texts, experts, report), recognise.ANY)
        if not (latency or measured.is_file()):
            from remoe_cli.model.quantise import BY_NAME
            from remoe_cli.profile.function_latency import computes_packed
            from remoe_cli.profile.latency import measure

            with progress("Measuring how long things take on this machine"):
                to = None if experts is None else BY_NAME[experts]
                either = spec.stored is not None and spec.stored.either and computes_packed(say)
                packed = checkpoint if either or (spec.is_packed and to is None) else None
                latency_here = measure(loaded, load_s, packed, to, either=either)
                if helper is not None:
                    from remoe_cli.profile.assistant import time_assistant

                    latency_here = latency_here.model_copy(update={"assistant": time_assistant(helper)})
                artifacts.write_json(measured, latency_here, recognise.ANY)
    with progress("Profiling prompts") as report:
        report(done, total)
        if loaded is not None:
            stop = stop_strings(checkpoint)
            on_part = lambda part: report(done + part, total)  # noqa: E731
            run = record(loaded, tokenizer, inputs, prompts.texts, missing, partial, on_part, stop, helper)
            for batch in run:
                done += size_of(inputs, batch)
                report(done, total)
    del loaded, helper
    with progress("Writing the profile"):
        arrays = join([read_batch(file_of(partial, batch)) for batch in batches])
        texts = [prompts.texts[p] for p in arrays["prompt_index"]]
        arrays |= prompt_features(checkpoint, texts, max_prompt_tokens)
        if checkpoint.identify() != revision:
            raise ModelError(f"The model {checkpoint.name} has changed while it was profiled.", "Run the command again: it starts anew.")
        if beside is not None and drafting is not None and beside.identify() != drafting.revision:
            raise ModelError(f"The assistant {beside.name} has changed meanwhile.", "Run the command again: it starts anew.")
        latency = latency or _measured(measured)
        return _finish(out, partial, inputs, arrays, latency, None if experts is None else _read(compared, QuantisationLoss))


def _loss(
    model: PreTrainedModel,
    tokenizer: Any,
    inputs: Inputs,
    texts: Sequence[Prompt],
    experts: str,
    report: Callable[[float, float | None], None],
) -> QuantisationLoss:
    """Compare the model with the one with quantised experts, on some prompts, evenly over all: the same ones in every shard."""
    from remoe_cli.model.quantise import BY_NAME
    from remoe_cli.profile.loss import PROMPTS, TEXT_TOKENS, measure_loss

    count = min(PROMPTS, len(texts))
    some = [texts[number * len(texts) // count] for number in range(count)]
    ids = _encode(tokenizer, some, min(TEXT_TOKENS, inputs.settings.max_prompt_tokens), model)
    return measure_loss(model, ids, BY_NAME[experts], lambda share: report(share * count, count))


def _measured(path: Path) -> Latency:
    return _read(path, Latency)


def _read(path: Path, kind: type[_PartOf]) -> _PartOf:
    try:
        return kind.model_validate(bounded.read_json(path, bounded.DOCUMENT))
    except (OSError, ValueError):
        raise ArtifactError(f"{path} is damaged.", f"Delete {path}, and run the command again.") from None


def _is_measured(latency: Latency, on_gpu: bool | None) -> bool:
    """Tell whether times were measured, here or elsewhere, on a GPU or not (None: nobody says on what)."""
    return latency.source == "measured" and on_gpu in (None, latency.gpu_expert is not None)


def _finished(out: Path, inputs: Inputs, latency: Latency | None, on_gpu: bool | None) -> Profile | None:
    """Read the profile that a run with the same inputs has finished in `out`, if there is one.

    Its times are those of `latency`, or were measured on this machine or another.
    """
    if not (out / "profile.json").is_file():
        return None
    try:
        profile = read_profile(out)
    except ArtifactError:
        return None
    record = profile.record
    decide = ("model", "dataset", "settings", "spec", "assistant")
    same = all(getattr(record, name) == getattr(inputs, name) for name in decide)
    times = _is_measured(record.latency, on_gpu) if latency is None else record.latency == latency
    return profile if same and times else None


def _check_prompts(tokenizer: Any, prompts: PromptSet, say: Callable[[str], None]) -> None:
    """Find prompts that the chat template refuses before the model is loaded; raises UsageError with the row of the first."""
    from remoe_cli.model.tokens import check_prompt, has_chat_template

    if not has_chat_template(tokenizer) and not all(isinstance(prompt, str) for prompt in prompts.texts):
        say("The model has no chat template: the messages of a conversation are joined by blank lines.")
    for index, prompt in enumerate(prompts.texts):
        try:
            check_prompt(tokenizer, prompt)
        except UsageError as error:
            raise UsageError(f"{prompts.where(index)}: {error.message}", error.hint) from None


def _load(checkpoint: Checkpoint, device_map: str | None, device: str) -> tuple[PreTrainedModel, float]:
    """Load the model; also returns the seconds that this took."""
    from remoe_cli.model.loader import load

    start = time.perf_counter()
    return load(checkpoint, device_map=device_map, device=device), time.perf_counter() - start


def _assistant(checkpoint: Checkpoint, model: PreTrainedModel) -> Assistant:
    from remoe_cli.model.assistant import load_assistant

    return load_assistant(checkpoint, int(model.get_input_embeddings().weight.shape[0]), str(model.device))


def record(
    model: PreTrainedModel,
    tokenizer: Any,
    inputs: Inputs,
    texts: Sequence[Prompt],
    batches: Sequence[int],
    partial: Path,
    on_part: Callable[[float], None] = lambda prompts: None,
    stop: Sequence[str] = (),
    assistant: Assistant | None = None,
) -> Iterator[int]:
    """Run batches, and yield the number of each when its file in `partial` is written.

    The numbers are given in ascending order.

    `on_part` is called while a batch runs: with the share of its work that is done, times its number of prompts.
    The texts `stop` end an answer. What `assistant` would have drafted is counted too.
    """
    from remoe_cli.model.experts import ExpertLayer, attach
    from remoe_cli.model.generation import StopStrings
    from remoe_cli.model.products import prepare_products
    from remoe_cli.profile.routing import RoutingRecorder, record_batch

    stopping = StopStrings(tokenizer, stop) if stop else None
    settings = inputs.settings
    recorder = RoutingRecorder()
    size, work, whole = 0, 0.0, 1.0

    def runner(layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        nonlocal work
        interrupts.check()
        on_part(size * work / whole)
        work += _PASS_TOKENS + len(index) / size
        return recorder(layer, hidden, index, weights)

    attachment = attach(model, runner)
    prepare_products(model, [layer.module for layer in attachment.layers])
    trace = max(1, TRACE_TOKENS // inputs.dataset.prompts)
    for window, numbers in groupby(batches, key=lambda batch: batch // _WINDOW):
        first = window * _WINDOW * settings.batch_size
        ids = _encode(tokenizer, texts[first : first + _WINDOW * settings.batch_size], settings.max_prompt_tokens, model)
        # The longest first: what memory does not hold is found out at once.
        order = np.argsort([-len(i) for i in ids], kind="stable")
        for batch in numbers:
            place = batch % _WINDOW * settings.batch_size
            mine = order[place : place + settings.batch_size]
            size, work = len(mine), 0.0
            tokens = max(len(ids[p]) for p in mine) + settings.max_new_tokens - 1
            whole = len(attachment.layers) * (tokens + settings.max_new_tokens * _PASS_TOKENS)
            attachment.calls.clear()
            experts, mine_ids = inputs.spec.experts_per_layer, [ids[p] for p in mine]
            routing = record_batch(model, recorder, mine_ids, experts, settings.max_new_tokens, trace, stopping, assistant)
            attachment.check_fired(max(attachment.calls.values(), default=0) or 1)
            known = {name: array for name, array in asdict(routing).items() if array is not None}
            artifacts.write_arrays(file_of(partial, batch), known | {"prompt_index": (first + mine).astype(np.int32)}, "batch")
            interrupts.check()
            yield batch


def _encode(tokenizer: Any, texts: Sequence[Prompt], limit: int, model: PreTrainedModel) -> list[list[int]]:
    from remoe_cli.model.tokens import encode, known
    from remoe_cli.model.vectors import bags

    bags(tokenizer, texts, limit)  # refuses a text without tokens now, not when all is done and prompt_features finds it
    return known([encode(tokenizer, text, limit) for text in texts], model)


def _finish(out: Path, partial: Path, inputs: Inputs, arrays: Arrays, latency: Latency, loss: QuantisationLoss | None) -> Profile:
    """Write the profile and delete the batches. Their fingerprint goes first: without it, batches that a kill leaves are not used."""
    if inputs.dataset.shard is None:
        del arrays["prompt_index"]
    record = ProfileRecord(
        model=inputs.model,
        dataset=inputs.dataset,
        settings=inputs.settings,
        spec=inputs.spec,
        latency=latency,
        assistant=inputs.assistant,
        loss=loss,
        arrays_sha256="",
    )
    profile = write_profile(out, record, arrays)
    (partial / "inputs.json").unlink()
    delete_batches(partial)
    with suppress(OSError):  # somebody has put another file there
        partial.rmdir()
    return profile

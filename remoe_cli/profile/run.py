"""`remoe profile`: prompts through the model, batch by batch, into a profile directory.

While it runs, DIR/partial/ holds one safetensors file a batch and a fingerprint of everything that decides the counts.
An interrupted run keeps the batches that are done; the same command goes on after them, another one starts anew.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_cli import artifacts
from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.model.checkpoint import Checkpoint, find
from remoe_cli.model.spec import MoeSpec, read_spec
from remoe_cli.profile.prompts import PromptSet
from remoe_cli.profile.record import DatasetRef, Latency, ModelRef, Profile, ProfileRecord, Settings, write_profile

# Single-token routing kept for the expected maximum of local and remote time (planning section 1).
_TRACE_TOKENS = 32_768
Arrays = dict[str, npt.NDArray[Any]]


class Inputs(artifacts.Document):
    """Everything that decides the counts: the fingerprint of a run, and how a rerun knows that it may go on."""

    schema_version: str = "remoe.profile-inputs/1"
    model: ModelRef
    dataset: DatasetRef
    settings: Settings
    spec: MoeSpec


def profile(
    model: str,
    prompts: PromptSet,
    out: Path,
    *,
    max_new_tokens: int,
    max_prompt_tokens: int,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> Profile:
    """Profile `model` on `prompts` into the directory `out`; `progress(done, total)` is called after each batch."""
    from remoe_cli.model.tokens import has_chat_template, load_tokenizer

    checkpoint = find(model)
    spec = read_spec(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    inputs = Inputs(
        model=ModelRef(path=checkpoint.name, revision=checkpoint.revision),
        dataset=DatasetRef(source=prompts.source, field=prompts.field, prompts=len(prompts.texts), sha256=prompts.sha256),
        settings=Settings(
            max_new_tokens=max_new_tokens,
            max_prompt_tokens=max_prompt_tokens,
            batch_size=batch_size,
            chat_template=has_chat_template(tokenizer),
            dtype=spec.dtype,
        ),
        spec=spec,
    )
    partial = _partial_folder(out, inputs)
    for done in _run(checkpoint, tokenizer, inputs, prompts.texts, partial):
        progress(done, len(prompts.texts))
    return _finish(out, partial, inputs)


def _partial_folder(out: Path, inputs: Inputs) -> Path:
    """The folder of finished batches, emptied when it belongs to another run; refuses to write over foreign files."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file.", "Give a directory with -o.")
    partial = out / "partial"
    fingerprint = partial / "inputs.json"
    ours = (out / "profile.json").is_file() or fingerprint.is_file()
    if not ours and any(path.is_file() for path in out.rglob("*")):
        raise UsageError(f"{out} holds other files and no profile.", "Give an empty or new directory with -o.")
    if _is_of(fingerprint, inputs):
        return partial
    # Before the fingerprint changes, so that a crash between the two leaves no batch of another run behind.
    for stale in (*partial.glob("batch-*.safetensors"), partial / "latency.json"):
        stale.unlink(missing_ok=True)
    artifacts.write_json(fingerprint, inputs)
    return partial


def _is_of(fingerprint: Path, inputs: Inputs) -> bool:
    try:
        return artifacts.read_json(fingerprint, Inputs) == inputs
    except ArtifactError:
        return False


def _batches(texts: tuple[str, ...], size: int) -> Iterator[tuple[Path, tuple[str, ...]]]:
    for first in range(0, len(texts), size):
        yield Path(f"batch-{first:07d}.safetensors"), texts[first : first + size]


def _run(checkpoint: Checkpoint, tokenizer: Any, inputs: Inputs, texts: tuple[str, ...], partial: Path) -> Iterator[int]:
    """Run the batches that are not there yet; yields how many prompts are done. The model is loaded only if it is needed."""
    settings = inputs.settings
    batches = list(_batches(texts, settings.batch_size))
    missing = [b for b in batches if not (partial / b[0]).is_file()]
    done = len(texts) - sum(len(t) for _, t in missing)
    yield done
    if not missing and (partial / "latency.json").is_file():
        return
    from remoe_cli.model.experts import attach
    from remoe_cli.model.loader import load
    from remoe_cli.model.tokens import encode
    from remoe_cli.profile.latency import measure
    from remoe_cli.profile.routing import RoutingRecorder, prompt_vector, record_batch

    start = time.perf_counter()
    model = load(checkpoint)
    if not (partial / "latency.json").is_file():
        artifacts.write_json(partial / "latency.json", measure(model, time.perf_counter() - start))
    recorder = RoutingRecorder()
    attachment = attach(model, recorder)
    embeddings = model.get_input_embeddings().weight.detach()
    trace = max(1, _TRACE_TOKENS // len(texts))
    for name, batch in missing:
        ids = [encode(tokenizer, text, settings.max_prompt_tokens) for text in batch]
        if not all(ids):
            raise UsageError(f"The tokenizer makes no tokens of the prompt {batch[ids.index([])]!r}.", "Remove it from the dataset.")
        attachment.calls.clear()
        routing = record_batch(model, recorder, ids, inputs.spec.experts_per_layer, settings.max_new_tokens, trace)
        attachment.check_fired(max(attachment.calls.values(), default=0) or 1)
        plain = [tokenizer(text, add_special_tokens=False)["input_ids"][: settings.max_prompt_tokens] for text in batch]
        vectors = np.stack([prompt_vector(embeddings, p) for p in plain])
        artifacts.write_arrays(partial / name, asdict(routing) | {"prompt_vectors": vectors})
        done += len(batch)
        yield done


def _read_batch(file: Path) -> Arrays:
    try:
        return artifacts.read_arrays(file)
    except ArtifactError as error:
        raise ArtifactError(error.message, f"Delete {file} and repeat the command: it goes on from the other batches.") from None


def _finish(out: Path, partial: Path, inputs: Inputs) -> Profile:
    """Join the batches into the profile and remove them."""
    parts = [_read_batch(file) for file in sorted(partial.glob("batch-*.safetensors"))]
    first = np.cumsum([0, *(len(p["prompt_tokens"]) for p in parts)])
    for part, offset in zip(parts, first, strict=False):
        part["trace_prompt"] = part["trace_prompt"] + np.int32(offset)
    arrays = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    latency = Latency.model_validate_json((partial / "latency.json").read_text(encoding="utf-8"))
    record = ProfileRecord(
        model=inputs.model, dataset=inputs.dataset, settings=inputs.settings, spec=inputs.spec, latency=latency, arrays_sha256=""
    )
    profile = write_profile(out, record, arrays)
    shutil.rmtree(partial)
    return profile

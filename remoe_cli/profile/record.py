"""The profile: `remoe profile` writes it, `remoe plan` starts from it.

A profile is a directory:

    profile.json         a ProfileRecord: model, dataset, settings, routing, sizes, latencies, digest of the arrays
    arrays.safetensors   P prompts, L MoE layers, E experts a layer, k = top-k, T traced tokens, d = width of an embedding
        prefill_counts   int32 [P, L, E]   prompt tokens routed to each expert; each row sums to prompt_tokens * k
        decode_counts    int32 [P, L, E]   the same for generated tokens that were fed back; sums to decode_tokens * k
        prompt_tokens    int32 [P]
        decode_tokens    int32 [P]         forward passes of one token: generated tokens minus one
        prompt_vectors   float32 [P, d]    sums of L2-normalised token embeddings (method.md, section 5); d = 0 without embeddings
        trace_ids        int16 [T, L, k]   top-k expert ids of single tokens, -1 where a slot was skipped (RoutingRef says which tokens)
        trace_prompt     int32 [T]         the prompt of each traced token
        bag_sizes        int32 [P]         only with texts: distinct tokens of each prompt,
        bag_tokens       int32 [N]         their ids, prompt after prompt,
        bag_counts       int32 [N]         and how often each occurs (model/vectors.py)
        draft_passes     int32 [P, D, W]   only where answers were recorded of a model that takes drafts: decode passes of 1, 2, .. W rows
                                           that the answer would have had with drafts, for each length D of drafts (acceptance.py)
        assisted_passes  int32 [P, D, W]   only with an assistant: the same, with its drafts where nothing was found
        assistant_tokens int32 [P, D, 2]   only with an assistant: tokens that it would have drafted, and read beside these (acceptance.py)
        prompt_index     int32 [P]         only in a shard: the place of each prompt in the whole dataset, ascending

Recorded rows sum to less where the model skips slots. Imported routing may miss layers, phases, tokens or lengths. What is missing is
zero in the counts and -1 in the trace; the rest has the same sums in all layers, and RoutingRef says what the profile has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from remoe_cli import artifacts, owned, recognise
from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.model.spec import AssistantSpec, MoeSpec
from remoe_cli.profile.acceptance import MEASURED, MOST_ROWS
from remoe_cli.profile.latency_record import Latency
from remoe_cli.profile.loss_record import QuantisationLoss

Phase = Literal["prefill", "decode"]
TRACE_TOKENS = 32_768  # kept for the expected maximum of local and remote time (method.md, section 3)


class ModelRef(artifacts.Part):
    """A checkpoint. `revision` is the hub's commit, or `local:` and the digest of all files that are read."""

    path: str
    revision: str


class AssistantRef(ModelRef):
    """An assistant (model/assistant.py), and its sizes."""

    spec: AssistantSpec


class DatasetShard(artifacts.Part):
    """Shard `number`, from 1, of the `of` shards of a dataset."""

    number: artifacts.Replicas
    of: artifacts.Replicas


class DatasetRef(artifacts.Part):
    """The prompts of a profile. In a shard it names the whole dataset.

    prompts   how many there are
    sha256    of their texts, in order; of the routing file for imported routing without texts
    """

    source: str
    field: str
    prompts: artifacts.Tokens
    sha256: str
    shard: DatasetShard | None = None


class RecordingSettings(artifacts.Part):
    """How the routing was recorded. Other settings would give other counts."""

    max_new_tokens: artifacts.Tokens
    max_prompt_tokens: artifacts.Tokens
    batch_size: artifacts.Tokens
    chat_template: bool
    dtype: str


class RoutingRef(artifacts.Part):
    """Where the routing comes from, and what it covers; the defaults are those of recorded routing.

    format   the format of the imported file
    sha256   the digest of the imported file
    row      what one row of the counts stands for; lengths and predictions are those of prompts for `prompt` only
    layers   hidden-layer indices of the MoE layers that have routing; None for all
    phases   the phases that have routing
    trace    what the traced tokens are: recorded decode tokens, recorded prompt tokens, or drawn from the counts
    """

    source: Literal["recorded", "imported"] = "recorded"
    format: str | None = None
    sha256: str | None = None
    row: str = "prompt"
    layers: tuple[artifacts.LayerIndex, ...] | None = None
    phases: tuple[Phase, ...] = ("prefill", "decode")
    trace: Literal["decode", "prefill", "drawn"] = "decode"


class ProfileRecord(artifacts.Document):
    """The file profile.json.

    settings        None for imported routing, whose recording is not known
    assistant       the model whose drafts were measured beside those that are found in a text; None: there was none
    loss            what experts that are quantised on request lose; None where they are not
    vectors         the checkpoint whose embeddings made the prompt vectors; None for the profiled model itself
    arrays_sha256   digest of arrays.safetensors
    """

    schema_version: str = "remoe.profile/3"
    model: ModelRef
    dataset: DatasetRef
    settings: RecordingSettings | None
    routing: RoutingRef = RoutingRef()
    vectors: ModelRef | None = None
    spec: MoeSpec
    assistant: AssistantRef | None = Field(default=None, exclude_if=artifacts.is_none)
    latency: Latency
    loss: QuantisationLoss | None = Field(default=None, exclude_if=artifacts.is_none)
    arrays_sha256: str


def packed_form(spec: MoeSpec, latency: Latency) -> tuple[MoeSpec, Latency]:
    """Describe functions that compute from stored bytes, where they may; else change nothing."""
    if spec.stored is None or not spec.stored.either or latency.packed_expert is None:
        return spec, latency
    times = {"remote_expert": latency.packed_expert, "packed_expert": None, "unquantised_expert": latency.remote_expert}
    stored = spec.stored.model_copy(update={"packed": True, "either": False})
    return spec.model_copy(update={"stored": stored}), latency.model_copy(update=times)


@dataclass(frozen=True)
class Profile:
    """A profile, and the directory that it is in."""

    path: Path
    record: ProfileRecord
    arrays: dict[str, npt.NDArray[Any]]

    @property
    def sha256(self) -> str:
        """The digest of profile.json, which holds the digest of the arrays."""
        return artifacts.sha256_file(self.path / "profile.json")

    def as_stored(self) -> Profile | None:
        """Return the profile of experts as they are stored; None where none are quantised on request."""
        record, latency = self.record, self.record.latency
        if record.spec.remote is None or latency.unquantised_expert is None:
            return None
        times = latency.model_copy(update={"remote_expert": latency.unquantised_expert, "unquantised_expert": None})
        spec = record.spec.model_copy(update={"remote": None})
        return replace(self, record=record.model_copy(update={"spec": spec, "latency": times, "loss": None}))

    def in_form(self, packed: bool) -> Profile:
        """Return the profile of functions that compute experts as a plan says, where they may do either.

        Their times are those of that form, and those of dequantised experts are `unquantised_expert` then.
        """
        spec, latency = packed_form(self.record.spec, self.record.latency) if packed else (self.record.spec, self.record.latency)
        return replace(self, record=self.record.model_copy(update={"spec": spec, "latency": latency}))

    def counts(self, phase: Phase) -> npt.NDArray[np.int32]:
        """Get the counts [P, L, E] of a phase, or those of the other phase if it has no routing."""
        phases = self.record.routing.phases
        counts: npt.NDArray[np.int32] = self.arrays[f"{phase if phase in phases else phases[0]}_counts"]
        return counts


def write_profile(path: Path, record: ProfileRecord, arrays: dict[str, npt.NDArray[Any]]) -> Profile:
    """Write both files of a profile; `record.arrays_sha256` is set here.

    Raises: ArtifactError when `read_profile` would refuse the profile, UsageError where `refuse_foreign` does; nothing is written then.
    """
    _check(path, record, arrays)
    refuse_foreign(path)
    document, file = path / "profile.json", path / "arrays.safetensors"
    with owned.writing(document, _PROFILE) as new_document, owned.writing(file, artifacts.arrays_beside(document, _KIND)) as new_file:
        artifacts.save_arrays(new_file, arrays, _KIND)
        record = record.model_copy(update={"arrays_sha256": artifacts.sha256_file(new_file)})
        new_document.write_text(artifacts.json_text(record), encoding="utf-8")
    return Profile(path, record, arrays)


_KIND = "profile"
_PROFILE = artifacts.made_as(ProfileRecord)
_PREDICTOR = recognise.document("remoe.predictor")  # of predict/train.py
_INPUTS = recognise.document("remoe.profile-inputs")  # of profile/run.py


def refuse_foreign(out: Path) -> None:
    """Refuse a directory in which a profile would replace files that remoe did not make.

    Other files in a profile's directory stay.

    Raises: UsageError for a directory that holds files and is no profile, for a file or link in the place of one of a profile's files,
    and where no directory can be made.
    """
    owned.refuse_place(out)
    if not out.exists():
        return
    partial = out / "partial"
    owned.refuse_place(partial)
    made = [path for path, kind in ((out / "profile.json", _PROFILE), (partial / "inputs.json", _INPUTS)) if owned.is_made(path, kind)]
    if not made:
        owned.refuse_foreign(out, owned.foreign_files(out, lambda name: False))
    for path, kind in ((out / "profile.json", _PROFILE), (out / "predictor.json", _PREDICTOR), (partial / "inputs.json", _INPUTS)):
        owned.refuse_file(path, kind)
    owned.refuse_file(out / "arrays.safetensors", artifacts.arrays_beside(out / "profile.json", _KIND))
    owned.refuse_file(out / "predictor.safetensors", artifacts.arrays_beside(out / "predictor.json", "predictor"))


# The shapes in this module's docstring.
AXES = {
    "prefill_counts": "PLE",
    "decode_counts": "PLE",
    "prompt_tokens": "P",
    "decode_tokens": "P",
    "prompt_vectors": "Pd",
    "trace_ids": "TLk",
    "trace_prompt": "T",
}
WITH_TEXTS = {"bag_sizes": "P", "bag_tokens": "N", "bag_counts": "N"}  # all or none
WITH_ANSWERS = {"draft_passes": "PDW"}
WITH_ASSISTANT = {"assisted_passes": "PDW", "assistant_tokens": "PDA"}  # all or none, and only with answers
OPTIONAL = (WITH_TEXTS, WITH_ANSWERS, WITH_ASSISTANT)
IN_SHARD = {"prompt_index": "P"}


def read_profile(path: Path) -> Profile:
    """Read and check a profile.

    Raises: UsageError when there is no profile at this path; ArtifactError when it is damaged, or its arrays do not fit each other.
    """
    if not (path / "profile.json").is_file():
        if path.is_file():
            raise UsageError(f"{path} is a file.", "PROFILE is the folder that 'remoe profile' wrote.")
        what = f"{path} is not a profile: it has no profile.json." if path.is_dir() else f"There is no folder {path}."
        raise UsageError(what, "Make a profile with 'remoe profile MODEL --data PROMPTS -o DIR'.")
    record = artifacts.read_json(path / "profile.json", ProfileRecord)
    file = path / "arrays.safetensors"
    artifacts.check_arrays(file)  # before it is digested
    if artifacts.sha256_file(file) != record.arrays_sha256:
        raise ArtifactError(f"{file} is not the file that profile.json names (its sha256 differs).", "Profile again, or restore the file.")
    arrays = artifacts.read_arrays(file)
    _check(path, record, arrays)
    return Profile(path, record, arrays)


def read_profile_of(plan: Path, profile: Path) -> Profile:
    """Read the profile that a plan was made from.

    Raises: ArtifactError when it is not on this machine, or is damaged.
    """
    if not (profile / "profile.json").is_file():
        raise ArtifactError(
            f"The plan {plan} was made from the profile {profile}, which is not on this machine.",
            "Make the profile and the plan again here, or give a plan that was made on this machine.",
        )
    return read_profile(profile)


def _check(path: Path, record: ProfileRecord, arrays: dict[str, npt.NDArray[Any]]) -> None:
    spec, routing = record.spec, record.routing
    shapes = {name: array.shape for name, array in arrays.items()}
    sizes = {"P": shapes.get("prompt_tokens"), "T": shapes.get("trace_prompt"), "d": shapes.get("prompt_vectors", ())[1:]}
    letters = {name: (size or (0,))[0] for name, size in sizes.items()}
    letters |= {"L": len(spec.moe_layers), "E": spec.experts_per_layer, "k": spec.top_k}
    letters["N"] = int(arrays["bag_sizes"].sum()) if "bag_sizes" in arrays else 0
    letters |= {"D": len(MEASURED), "W": MOST_ROWS, "A": 2}
    kinds = [kind for kind in OPTIONAL if kind.keys() & arrays.keys()]
    more = {name: axes for kind in kinds for name, axes in kind.items()}
    if (WITH_ASSISTANT in kinds) != (record.assistant is not None and WITH_ANSWERS in kinds) or (
        record.assistant is not None and record.latency.assistant is None
    ):
        raise ArtifactError(f"{path}: what it knows of drafts is not that of the assistant that it names.", "Profile again.")
    more |= IN_SHARD if record.dataset.shard else {}
    for name, axes in (AXES | more).items():
        shape = tuple(letters[axis] for axis in axes)
        if shapes.get(name) != shape:
            raise ArtifactError(f"{path}: {name} has shape {shapes.get(name)}, and {shape} is needed.", "Profile again.")
    there = np.isin(spec.moe_layers, spec.moe_layers if routing.layers is None else routing.layers)
    if not routing.phases or int(there.sum()) != (len(there) if routing.layers is None else len(routing.layers)):
        raise ArtifactError(f"{path}: the layers or phases of its routing are not those of the model.", "Profile again.")
    for phase in ("prefill", "decode"):
        counts, tokens = arrays[f"{phase}_counts"], arrays["prompt_tokens" if phase == "prefill" else "decode_tokens"]
        sums = counts.sum(axis=2, dtype=np.int64)
        if (counts < 0).any() or (sums > tokens[:, None].astype(np.int64) * spec.top_k).any():
            raise ArtifactError(f"{path}: {phase}_counts do not fit {phase} tokens and top-{spec.top_k}.", "Profile again.")
        if sums[:, ~there].any() or (phase not in routing.phases and sums.any()):
            raise ArtifactError(f"{path}: {phase}_counts hold routing that profile.json does not name.", "Profile again.")
        if routing.source == "imported" and (sums[:, there] != sums[:, there][:, :1]).any():
            raise ArtifactError(f"{path}: the sums of {phase}_counts differ between layers.", "Import the routing again.")
    for name in {"draft_passes", "assisted_passes"} & arrays.keys():
        passes, tokens = arrays[name].astype(np.int64), arrays["decode_tokens"][:, None]
        rows = passes @ np.arange(1, MOST_ROWS + 1)
        if (passes < 0).any() or (passes.sum(axis=2) > tokens).any() or (rows < tokens).any():
            raise ArtifactError(f"{path}: {name} do not fit the decode tokens.", "Profile again.")
    if "assistant_tokens" in arrays and (arrays["assistant_tokens"] < 0).any():
        raise ArtifactError(f"{path}: assistant_tokens has numbers below 0.", "Profile again.")
    traced = arrays["trace_ids"]
    if ((traced < -1) | (traced >= spec.experts_per_layer)).any() or (traced[:, ~there] != -1).any():
        raise ArtifactError(f"{path}: trace_ids holds ids that are not experts of the model.", "Profile again.")
    if ((arrays["trace_prompt"] < 0) | (arrays["trace_prompt"] >= letters["P"])).any():
        raise ArtifactError(f"{path}: trace_prompt names prompts that the profile does not have.", "Profile again.")

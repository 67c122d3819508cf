"""The profile: what `remoe profile` leaves behind and `remoe plan` starts from.

A profile is a directory:

    profile.json         a ProfileRecord: model, dataset, settings, sizes, latencies, digest of the arrays
    arrays.safetensors   P prompts, L MoE layers, E experts a layer, k = top-k, T traced decode tokens, d = hidden size
        prefill_counts   int32 [P, L, E]   prompt tokens routed to each expert; each row sums to prompt_tokens * k
        decode_counts    int32 [P, L, E]   the same for generated tokens that were fed back; sums to decode_tokens * k
        prompt_tokens    int32 [P]
        decode_tokens    int32 [P]         forward passes of one token: generated tokens less one
        prompt_vectors   float32 [P, d]    sum of L2-normalised token embeddings (method section 5)
        trace_ids        int16 [T, L, k]   top-k expert ids of single decode tokens, -1 where a slot was skipped
        trace_prompt     int32 [T]         the prompt each traced token belongs to
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from remoe_cli import artifacts
from remoe_cli.errors import ArtifactError
from remoe_cli.model.spec import MoeSpec


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelRef(_Part):
    """The model that was profiled. `revision` is the hub commit, or `local:` and the digest of its config.json."""

    path: str
    revision: str


class DatasetRef(_Part):
    """The prompts. `sha256` is over their texts, in order."""

    source: str
    field: str
    prompts: int
    sha256: str


class Settings(_Part):
    """What else decides the counts."""

    max_new_tokens: int
    max_prompt_tokens: int
    batch_size: int
    chat_template: bool
    dtype: str


class Linear(_Part):
    """Time of a piece of work for n tokens: 0 for n = 0, else fixed_s + per_token_s * n, in seconds."""

    fixed_s: float
    per_token_s: float

    def seconds(self, tokens: npt.ArrayLike) -> Any:
        n = np.asarray(tokens, dtype=np.float64)
        return np.where(n > 0, self.fixed_s + self.per_token_s * n, 0.0)


class Latency(_Part):
    """Times measured on the machine that ran the profile (method section 2); every number is in seconds.

    nonexpert_prefill   all non-expert modules of the whole model, for n prompt tokens (sum over layers of tau_f_l)
    nonexpert_decode_s  the same for one generated token (sum over layers of t_f_l)
    local_expert        one expert for n tokens by the main process (tau_c_l(w, n)), at `main_vcpus`
    remote_expert       one expert for n tokens by the function's own arithmetic (tau_c_l(y, n)), on one whole vCPU
    load_s              reading the main model from disk
    """

    machine: str
    measured_on: str
    main_vcpus: int
    nonexpert_prefill: Linear
    nonexpert_decode_s: float
    local_expert: Linear
    remote_expert: Linear
    load_s: float


class ProfileRecord(artifacts.Document):
    schema_version: str = "remoe.profile/1"
    model: ModelRef
    dataset: DatasetRef
    settings: Settings
    spec: MoeSpec
    latency: Latency
    arrays_sha256: str


@dataclass(frozen=True)
class Profile:
    """A profile as read from its directory."""

    path: Path
    record: ProfileRecord
    arrays: dict[str, npt.NDArray[Any]]

    @property
    def sha256(self) -> str:
        """Digest of profile.json, which itself names the digest of the arrays."""
        return artifacts.sha256_file(self.path / "profile.json")


def write_profile(path: Path, record: ProfileRecord, arrays: dict[str, npt.NDArray[Any]]) -> Profile:
    """Write both files; `record.arrays_sha256` is filled in here."""
    path.mkdir(parents=True, exist_ok=True)
    artifacts.write_arrays(path / "arrays.safetensors", arrays)
    digest = artifacts.sha256_file(path / "arrays.safetensors")
    record = record.model_copy(update={"arrays_sha256": digest})
    artifacts.write_json(path / "profile.json", record)
    return Profile(path, record, arrays)


# The shapes that this module's docstring gives.
_AXES = {
    "prefill_counts": "PLE",
    "decode_counts": "PLE",
    "prompt_tokens": "P",
    "decode_tokens": "P",
    "prompt_vectors": "Pd",
    "trace_ids": "TLk",
    "trace_prompt": "T",
}


def read_profile(path: Path) -> Profile:
    """Read and check a profile directory; raises ArtifactError when it is missing, damaged or does not add up."""
    if not (path / "profile.json").is_file():
        raise ArtifactError(
            f"{path} is not a profile: it has no profile.json.", "Make one with 'remoe profile MODEL --data PROMPTS -o DIR'."
        )
    record = artifacts.read_json(path / "profile.json", ProfileRecord)
    file = path / "arrays.safetensors"
    if file.is_file() and artifacts.sha256_file(file) != record.arrays_sha256:
        raise ArtifactError(f"{file} is not the file that profile.json names (its sha256 differs).", "Profile again, or restore the file.")
    arrays = artifacts.read_arrays(file)
    _check(path, record.spec, arrays)
    return Profile(path, record, arrays)


def _check(path: Path, spec: MoeSpec, arrays: dict[str, npt.NDArray[Any]]) -> None:
    shapes = {name: array.shape for name, array in arrays.items()}
    sizes = {"P": shapes.get("prompt_tokens"), "T": shapes.get("trace_prompt"), "d": shapes.get("prompt_vectors", ())[1:]}
    letters = {name: (size or (0,))[0] for name, size in sizes.items()}
    letters |= {"L": len(spec.moe_layers), "E": spec.experts_per_layer, "k": spec.top_k}
    for name, axes in _AXES.items():
        shape = tuple(letters[axis] for axis in axes)
        if shapes.get(name) != shape:
            raise ArtifactError(f"{path}: {name} has shape {shapes.get(name)}, the profile needs {shape}.", "Profile again.")
    for phase, tokens in (("prefill_counts", "prompt_tokens"), ("decode_counts", "decode_tokens")):
        if (arrays[phase] < 0).any() or (arrays[phase].sum(axis=2) > arrays[tokens][:, None] * spec.top_k).any():
            raise ArtifactError(f"{path}: {phase} does not fit {tokens} and top-{spec.top_k}.", "Profile again.")

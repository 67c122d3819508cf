"""From a file of routing to a profile: recognise the format, check, fill in what can be known, write.

The format is seen in the file's first bytes, not in its name. Phases that a file does not name are taken from the prompts' own token
numbers where these fit one phase only, else the routing is that of prompts. What is lacking is not made up: the counts of a phase
without routing stay zero and planning uses the other phase's, single tokens that were not recorded are drawn from the counts
(draw.py), and the profile's RoutingRef says both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_cli.artifacts import sha256_file
from remoe_cli.errors import UsageError
from remoe_cli.model.checkpoint import Checkpoint, find
from remoe_cli.model.spec import MoeSpec, read_spec
from remoe_cli.profile.imports.arrays import read_arrays_file
from remoe_cli.profile.imports.draw import draw_trace
from remoe_cli.profile.imports.responses import read_responses
from remoe_cli.profile.imports.rows import Counted, Ints, Rows, Traced, counted_rows, refuse, traced_rows, whole
from remoe_cli.profile.imports.sglang_dump import read_sglang_dump
from remoe_cli.profile.imports.table import is_table, read_table
from remoe_cli.profile.imports.torch_zip import is_torch_zip
from remoe_cli.profile.latency_record import Latency
from remoe_cli.profile.prompts import PromptSet
from remoe_cli.profile.record import DatasetRef, ModelRef, Phase, Profile, ProfileRecord, RoutingRef, write_profile

Arrays = dict[str, npt.NDArray[Any]]
_FIELDS: dict[Phase, str] = {"prefill": "n_prompt_tokens", "decode": "n_decode_tokens"}


@dataclass(frozen=True)
class ImportedRouting:
    """The profile's arrays but for those of the prompts' texts, and where they come from."""

    arrays: Arrays
    routing: RoutingRef

    @property
    def rows(self) -> int:
        return len(self.arrays["prompt_tokens"])


def import_profile(
    model: str,
    file: Path,
    out: Path,
    *,
    latency: Latency,
    prompts: PromptSet | None = None,
    vectors_from: str | None = None,
    max_prompt_tokens: int = 1024,
) -> Profile:
    """Write the profile of `model` (a folder with config.json is enough) whose routing is in `file`; nothing is written if it is refused.

    Prompt vectors come from the embeddings of `vectors_from`, or of the model itself where it has weights and a tokenizer, cut to
    `max_prompt_tokens`; without texts or embeddings they have no width.
    """
    _check_out(out)
    checkpoint = find(model)
    spec = read_spec(checkpoint)
    imported = import_routing(file, spec, model=Path(checkpoint.name).name, prompts=prompts)
    embedding = find(vectors_from) if vectors_from else checkpoint if _has_embeddings(checkpoint) else None
    arrays = imported.arrays | {"prompt_vectors": np.empty((imported.rows, 0), dtype=np.float32)}
    if prompts is None and vectors_from:
        raise UsageError("Prompt vectors need the prompts' texts.", "Give them with --data, or leave --vectors-from out.")
    if prompts is not None and embedding is not None:
        from remoe_cli.model.vectors import prompt_features

        arrays |= prompt_features(embedding, prompts.texts, max_prompt_tokens)
    digest = imported.routing.sha256 or ""
    record = ProfileRecord(
        model=ModelRef(path=checkpoint.name, revision=checkpoint.revision),
        dataset=DatasetRef(
            source=prompts.source if prompts else str(file),
            field=prompts.field if prompts else "",
            prompts=imported.rows,
            sha256=prompts.sha256 if prompts else digest,
        ),
        settings=None,
        routing=imported.routing,
        vectors=ModelRef(path=embedding.name, revision=embedding.revision) if prompts and embedding and vectors_from else None,
        spec=spec,
        latency=latency,
        arrays_sha256="",
    )
    return write_profile(out, record, arrays)


def import_routing(file: Path, spec: MoeSpec, *, model: str = "", prompts: PromptSet | None = None) -> ImportedRouting:
    """Read a file of routing of a model of sizes `spec`; `model` is the name to look for in a table of several models.

    Raises UsageError when the file cannot be read, is of no known format, or does not fit the model or the prompts.
    """
    try:
        found = _read(file, spec, model)
        rows = counted_rows(found, spec, str(file)) if isinstance(found, Counted) else traced_rows(found, spec, str(file))
        lengths = _lengths(prompts, len(next(iter(rows.counts.values()))), str(file))
        if _phase_unsaid(found):
            rows = _as_phase(rows, lengths)
        _check_lengths(rows, lengths, str(file))
        return ImportedRouting(*_arrays(rows, lengths, found, spec, sha256_file(file)))
    except MemoryError:
        raise refuse(file, "it takes more memory than there is", "Import it in parts.") from None
    except OSError as error:
        raise refuse(file, f"it cannot be read ({error.strerror or error})", "Check the path and your rights to it.") from None


def _read(file: Path, spec: MoeSpec, model: str) -> Counted | Traced:
    with file.open("rb") as stream:
        start = stream.read(2**16)
    if start[:2] == b"PK" and is_torch_zip(file):
        return read_sglang_dump(file, spec)
    # A safetensors file has the length of its header first: eight bytes, of which no sane header needs the last two.
    if start[:2] == b"PK" or start[:6] == b"\x93NUMPY" or (start[6:8] == b"\0\0" and start[8:9] == b"{"):
        return read_arrays_file(file, spec)
    if start.lstrip()[:1] == b"{":
        return read_responses(file, spec)
    if is_table(start):
        return read_table(file, spec, model)
    raise refuse(
        file,
        "its format is not known",
        "Known are counts or ids as .npz, .npy or .safetensors, server responses as JSON lines, SGLang's .pt dumps, and tables as CSV.",
    )


def _phase_unsaid(found: Counted | Traced) -> bool:
    return None in found.counts if isinstance(found, Counted) else found.prompt_tokens is None


def _lengths(prompts: PromptSet | None, rows: int, where: str) -> dict[Phase, Ints]:
    """The numbers of tokens that the rows of prompts state themselves, by phase, where every row does."""
    if prompts is None:
        return {}
    if len(prompts.texts) != rows:
        raise refuse(where, f"it has {rows} rows, and {prompts.source} has {len(prompts.texts)} prompts", "Give the prompts of these rows.")
    lengths: dict[Phase, Ints] = {}
    for phase, field in _FIELDS.items():
        if stated := prompts.stated.get(field):
            for number, length in enumerate(stated):
                if type(length) is not int:
                    raise refuse(f"{prompts.source}, prompt {number}", f"its {field} is no whole number", "Mend the row.")
            lengths[phase] = whole(np.array(stated), f"{prompts.source}: {field}").astype(np.int64)
    return lengths


def _as_phase(rows: Rows, lengths: dict[Phase, Ints]) -> Rows:
    """The rows as those of the phase whose stated lengths they have; of prompts when nothing is stated or both fit."""
    tokens = rows.tokens["prefill"]
    fitting = [phase for phase, stated in lengths.items() if np.array_equal(stated, tokens)]
    if fitting != ["decode"]:
        return rows
    return replace(rows, counts={"decode": rows.counts["prefill"]}, tokens={"decode": tokens}, trace_phase=rows.trace_phase and "decode")


def _check_lengths(rows: Rows, lengths: dict[Phase, Ints], where: str) -> None:
    for phase, tokens in rows.tokens.items():
        if phase in lengths and (wrong := tokens != lengths[phase]).any():
            row = int(wrong.argmax())
            raise refuse(
                f"{where}, row {row}", f"it has {phase} routing of {tokens[row]} tokens, and its prompt states {lengths[phase][row]}"
            )


def _arrays(rows: Rows, lengths: dict[Phase, Ints], found: Counted | Traced, spec: MoeSpec, digest: str) -> tuple[Arrays, RoutingRef]:
    phases: tuple[Phase, ...] = tuple(phase for phase in _FIELDS if phase in rows.counts)
    shape = next(iter(rows.counts.values())).shape
    nothing = np.zeros(shape[0], dtype=np.int64)
    ids, owner = rows.trace_ids, rows.trace_prompt
    drawn = not len(ids)
    if drawn:
        ids, owner = draw_trace(rows.counts[phases[-1]], rows.counts[phases[-1]].sum(axis=2).max(axis=1) // spec.top_k, spec.top_k)
    arrays: Arrays = {"trace_ids": ids, "trace_prompt": owner}
    for phase in _FIELDS:
        name = "prompt_tokens" if phase == "prefill" else "decode_tokens"
        arrays[f"{phase}_counts"] = rows.counts[phase].astype(np.int32) if phase in phases else np.zeros(shape, dtype=np.int32)
        arrays[name] = rows.tokens.get(phase, lengths.get(phase, nothing)).astype(np.int32)
    ref = RoutingRef(
        source="imported",
        format=found.format,
        sha256=digest,
        row=found.row,
        layers=rows.layers,
        phases=phases,
        trace="drawn" if drawn else rows.trace_phase or "decode",
    )
    return arrays, ref


def _has_embeddings(checkpoint: Checkpoint) -> bool:
    tokenizer = any((checkpoint.path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return tokenizer and any(checkpoint.path.glob("*.safetensors"))


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file.", "Give a directory with -o.")
    if out.is_dir() and any(out.iterdir()) and not (out / "profile.json").is_file():
        raise UsageError(f"{out} holds other files and no profile.", "Give an empty or new directory with -o.")

"""Making a profile from a file of routing: read it, check it, add what is known, write the profile.

A file that does not name its phase has that of the prompts' own token numbers (n_prompt_tokens, n_decode_tokens) where they fit one
phase only, else it is taken as routing of prompts. What is missing is not invented: the counts of a phase without routing stay zero, and
planning uses the other phase's; tokens that were not recorded are drawn from the counts (draw.py). The profile's RoutingRef says both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from remoe_cli.artifacts import sha256_file
from remoe_cli.errors import UsageError
from remoe_cli.model.checkpoint import Checkpoint, find_named
from remoe_cli.model.spec import MoeSpec, read_spec
from remoe_cli.profile.imports.check_counts import counted_rows
from remoe_cli.profile.imports.check_ids import traced_rows
from remoe_cli.profile.imports.checks import CheckedRouting, CountedRouting, Ints, Routing, refuse, whole
from remoe_cli.profile.imports.draw import draw_trace
from remoe_cli.profile.imports.formats import read_routing
from remoe_cli.profile.latency_record import Latency
from remoe_cli.profile.prompts import PromptSet
from remoe_cli.profile.record import DatasetRef, ModelRef, Phase, Profile, ProfileRecord, RoutingRef, refuse_foreign, write_profile

Arrays = dict[str, npt.NDArray[Any]]
_FIELDS: dict[Phase, str] = {"prefill": "n_prompt_tokens", "decode": "n_decode_tokens"}


@dataclass(frozen=True)
class ImportedRouting:
    """Routing from a file.

    arrays    those of a profile (profile/record.py), without the ones that are made of the prompts' texts
    routing   where they come from, and what is missing
    prompts   those of the rows, where they are known
    remarks   sentences on what of the file is not in the arrays
    """

    arrays: Arrays
    routing: RoutingRef
    prompts: PromptSet | None = None
    remarks: tuple[str, ...] = ()

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
    experts: Literal["int8", "int4"] | None = None,
    say: Callable[[str], object] = lambda remark: None,
) -> Profile:
    """Write the profile of a model whose routing is in `file`.

    A folder with the model's config.json is enough for `model`. `experts` is the form to which expert functions' experts are quantised;
    what that loses stays unknown, as the model is not run. `say` gets a sentence for each thing of the file that is left out.

    Prompt vectors come from the embeddings of the checkpoint `vectors_from`, else of the model itself if its folder has weights and a
    tokenizer; prompts are cut to `max_prompt_tokens` for them. Without texts or embeddings their width is 0.

    Raises: UsageError and ModelError when something cannot be read or does not fit; nothing is written then.
    """
    refuse_foreign(out)
    checkpoint = find_named(model)
    spec = read_spec(checkpoint, experts)
    imported = import_routing(file, spec, model=Path(checkpoint.name).name, prompts=prompts)
    prompts = imported.prompts
    embedding = find_named(vectors_from) if vectors_from else checkpoint if _has_embeddings(checkpoint) else None
    arrays = imported.arrays | {"prompt_vectors": np.empty((imported.rows, 0), dtype=np.float32)}
    if prompts is None and vectors_from:
        raise UsageError("Prompt vectors need the prompts' texts.", "Give the prompts with --data, or leave --vectors-from out.")
    if prompts is not None and embedding is not None:
        from remoe_cli.model.vectors import prompt_features

        arrays |= prompt_features(embedding, prompts.texts, max_prompt_tokens)
    for remark in imported.remarks:
        say(remark)
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
    """Read and check a file of routing of a model with the sizes `spec`.

    `model` is the name to look for in a file with routing of several models.

    Raises: UsageError when the file cannot be read, has no known format, or does not fit the model or the prompts.
    """
    try:
        routing = read_routing(file, spec, model)
        rows = counted_rows(routing, spec, str(file)) if isinstance(routing, CountedRouting) else traced_rows(routing, spec, str(file))
        prompts = None if prompts is None else _of_rows(prompts, routing)
        lengths = _lengths(prompts, len(next(iter(rows.counts.values()))), str(file))
        if not _names_phases(routing):
            rows = _as_phase(rows, lengths)
        _check_lengths(rows, lengths, str(file))
        arrays, ref = _arrays(rows, lengths, routing, spec, sha256_file(file))
        return ImportedRouting(arrays, ref, prompts, routing.remarks + rows.remarks)
    except MemoryError:
        raise refuse(file, "it takes more memory than this machine has", "Import its rows in several files.") from None
    except OSError as error:
        raise refuse(file, f"it cannot be read ({error.strerror or error})", "Check the path and your rights to it.") from None


def _of_rows(prompts: PromptSet, routing: Routing) -> PromptSet:
    """Choose the prompt of each row, where there is one for each request of the file.

    Some requests of a file are left out, and some are more than one row.
    """
    if isinstance(routing, CountedRouting) or routing.requests is None or len(prompts.texts) != routing.read:
        return prompts
    requests = routing.requests.tolist()
    return replace(
        prompts,
        texts=tuple(prompts.texts[request] for request in requests),
        rows=tuple(prompts.rows[request] for request in requests) if prompts.rows else (),
        stated={name: tuple(lengths[request] for request in requests) for name, lengths in prompts.stated.items()},
    )


def _names_phases(routing: Routing) -> bool:
    return None not in routing.counts if isinstance(routing, CountedRouting) else routing.prompt_tokens is not None


def _lengths(prompts: PromptSet | None, rows: int, where: str) -> dict[Phase, Ints]:
    """Return the numbers of tokens that the rows of prompts state, by phase, where every row states one."""
    if prompts is None:
        return {}
    if len(prompts.texts) != rows:
        raise refuse(
            where,
            f"it has {rows} rows, and {prompts.source} has {len(prompts.texts)} prompts",
            "Give one prompt for each row of the file.",
        )
    lengths: dict[Phase, Ints] = {}
    for phase, field in _FIELDS.items():
        if stated := prompts.stated.get(field):
            for number, length in enumerate(stated):
                if type(length) is not int:
                    raise refuse(f"{prompts.source}, prompt {number}", f"its {field} is no whole number", "Correct the row.")
            lengths[phase] = whole(np.array(stated), f"{prompts.source}: {field}").astype(np.int64)
    return lengths


def _as_phase(rows: CheckedRouting, lengths: dict[Phase, Ints]) -> CheckedRouting:
    """Give the rows the phase whose stated lengths they have; prefill when none or both fit."""
    tokens = rows.tokens["prefill"]
    fitting = [phase for phase, stated in lengths.items() if np.array_equal(stated, tokens)]
    if fitting != ["decode"]:
        return rows
    return replace(rows, counts={"decode": rows.counts["prefill"]}, tokens={"decode": tokens}, trace_phase=rows.trace_phase and "decode")


def _check_lengths(rows: CheckedRouting, lengths: dict[Phase, Ints], where: str) -> None:
    for phase, tokens in rows.tokens.items():
        if phase in lengths and (wrong := tokens != lengths[phase]).any():
            row = int(wrong.argmax())
            raise refuse(
                f"{where}, row {row}", f"it has {phase} routing of {tokens[row]} tokens, and its prompt states {lengths[phase][row]}"
            )


def _arrays(rows: CheckedRouting, lengths: dict[Phase, Ints], routing: Routing, spec: MoeSpec, digest: str) -> tuple[Arrays, RoutingRef]:
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
        arrays[f"{phase}_counts"] = rows.counts[phase] if phase in phases else np.zeros(shape, dtype=np.int32)
        arrays[name] = rows.tokens.get(phase, lengths.get(phase, nothing)).astype(np.int32)
    ref = RoutingRef(
        source="imported",
        format=routing.format,
        sha256=digest,
        row=routing.row,
        layers=rows.layers,
        phases=phases,
        trace="drawn" if drawn else rows.trace_phase or "decode",
    )
    return arrays, ref


def _has_embeddings(checkpoint: Checkpoint) -> bool:
    tokenizer = any((checkpoint.path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return tokenizer and any(checkpoint.path.glob("*.safetensors"))

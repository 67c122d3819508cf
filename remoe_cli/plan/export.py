"""Expert placement and hot experts in the form that other programs read.

    program        file    what it reads, and where
    ktransformers  .pt     {"logical_count": tensor [hidden layers, experts]} for --init-expert-location (newer: --kt-expert-frequency-file)
                           with --kt-expert-placement-strategy frequency: it puts the experts with the largest numbers on the GPU
    sglang         .json   the same as lists, for --init-expert-location: its load balancer (EPLB) starts from it
    llama.cpp      .txt    arguments: --override-tensor keeps the experts of whole layers in CPU memory
    exllamav3      .txt    arguments: --moe_cpu_offload keeps the experts of the first N MoE layers in CPU memory

vLLM has no such file: its load balancer counts while it serves, and `EPLBConfig` has no field for a start.

Source: `compute_initial_expert_location_metadata` in sglang/srt/eplb/expert_location.py; `_load_activation_frequency` and
`generate_gpu_experts_masks` of KTransformers' SGLang and kt-kernel; `LLM_FFN_EXPS_REGEX` in llama.cpp's common/common.h; `-mcl` in
exllamav3/model_init.py (1.4.9); `EPLBConfig` in vllm/config/parallel.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remoe_cli import owned
from remoe_cli.errors import UsageError
from remoe_cli.plan.arrays import Ints
from remoe_cli.plan.document import Plan, read_plan
from remoe_cli.profile.record import Profile, read_profile, read_profile_of
from remoe_cli.recognise import naming

SCHEMA = "remoe.export/1"
MADE = naming("file for another program", "remoe.export/")


@dataclass(frozen=True)
class Source:
    """What is exported: a profile, and the plan that was made from it, if one was given."""

    profile: Profile
    plan: Plan | None


@dataclass(frozen=True)
class Format:
    """How one program reads placement.

    suffix       of the file
    needs_plan   why a profile is not enough; empty where it is
    write        writes the file
    """

    suffix: str
    needs_plan: str
    write: Callable[[Source, Path], None]


def read_source(path: Path) -> Source:
    """Read a profile's folder, or a plan's file and the profile that it was made from.

    Raises: what `read_profile`, `read_plan` and `read_profile_of` raise.
    """
    if not path.is_file():
        return Source(read_profile(path), None)
    plan = read_plan(path)
    return Source(read_profile_of(path, Path(plan.profile.path)), plan)


def export(path: Path, program: str, out: Path) -> Source:
    """Write what `program` reads of a profile or plan to `out`.

    Raises: UsageError for a name with another suffix, and where a plan is needed.
    """
    form = format_of(program, out)
    source = read_source(path)
    if form.needs_plan and source.plan is None:
        raise UsageError(f"{path} is a profile, and {form.needs_plan}.", f"Give a plan: remoe export PLAN --to {program} -o FILE.")
    with owned.writing(out, MADE) as temporary:
        form.write(source, temporary)
    return source


def format_of(program: str, out: Path) -> Format:
    """Look up how a program reads placement, for a file of this name.

    Raises: as `export`, before anything is read.
    """
    form = FORMATS[program]
    if out.suffix != form.suffix:
        raise UsageError(f"A file for {program} ends in {form.suffix}, and {out} does not.", f"Give a name that ends in {form.suffix}.")
    owned.refuse_file(out, MADE)
    return form


def use_counts(source: Source) -> Ints:
    """Count the tokens that chose each expert, in prefill and decode together.

    Layers without experts have 0. Experts that the plan has on the GPU count more than all others, so that who takes the largest numbers
    takes these.

    Shapes: int64 [hidden layers, E].
    """
    spec, arrays = source.profile.record.spec, source.profile.arrays
    counts = np.zeros((spec.hidden_layers, spec.experts_per_layer), dtype=np.int64)
    counts[list(spec.moe_layers)] = sum(arrays[f"{phase}_counts"].sum(axis=0, dtype=np.int64) for phase in ("prefill", "decode"))
    more = int(counts.max()) + 1
    for layer in source.plan.layers if source.plan else ():
        counts[layer.layer, list(layer.gpu)] += more
    return counts


def cpu_layers(plan: Plan) -> tuple[int, ...]:
    """Choose the MoE layers whose experts stay in CPU memory, where a program places whole layers only.

    As many layers as the plan's experts on the GPU would fill are there, those that have most of them in the plan.
    """
    fitting = sum(len(layer.gpu) for layer in plan.layers) // plan.model.experts_per_layer
    by_gpu = sorted(plan.layers, key=lambda layer: (-len(layer.gpu), layer.layer))
    return tuple(sorted(layer.layer for layer in by_gpu[fitting:]))


def _sglang(source: Source, out: Path) -> None:
    data = {"schema_version": SCHEMA, "logical_count": use_counts(source).tolist()}
    out.write_text(json.dumps(data) + "\n", encoding="utf-8")


def _ktransformers(source: Source, out: Path) -> None:
    import torch

    data: dict[str, Any] = {"schema_version": SCHEMA, "logical_count": torch.from_numpy(use_counts(source))}
    torch.save(data, out)


def _llama_cpp(source: Source, out: Path) -> None:
    layers = "|".join(map(str, cpu_layers(_plan(source))))
    options = f"--override-tensor blk\\.({layers})\\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU" if layers else ""
    _arguments(f"--n-gpu-layers 999 {options}".strip(), "llama-server -m MODEL.gguf $(grep -v '^#' FILE)", out)


def _exllamav3(source: Source, out: Path) -> None:
    _arguments(f"--moe_cpu_offload {len(cpu_layers(_plan(source)))}", "as many layers as planned; exllamav3 takes the first ones", out)


def _arguments(options: str, remark: str, out: Path) -> None:
    out.write_text(f"# {SCHEMA}: {remark}\n{options}\n", encoding="utf-8")


def _plan(source: Source) -> Plan:
    assert source.plan is not None, "the format needs a plan"
    return source.plan


_LAYERS = "{} places whole layers, so it has to be known how many experts fit the GPU"
FORMATS = {
    "ktransformers": Format(".pt", "", _ktransformers),
    "sglang": Format(".json", "", _sglang),
    "llama.cpp": Format(".txt", _LAYERS.format("llama.cpp"), _llama_cpp),
    "exllamav3": Format(".txt", _LAYERS.format("exllamav3"), _exllamav3),
}

"""Measuring an expert's time in an expert function, by tokens and by the vCPUs of its memory.

The function's arithmetic runs in a process of its own (function_timing.py), with one thread, under the CPU quotas that the local twin
sets. On a machine where no quota can be set, the process is timed on one whole vCPU. How a quota slows a call is known, so the curve has
that form. The points are calls with one expert. Another form may be nearer to them, but it does not know how a call with several experts
waits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from remoe_cli import cages, interrupts, lambda_limits
from remoe_cli.errors import ModelError
from remoe_cli.function.errors import FunctionProcessorError
from remoe_cli.function.packed import library
from remoe_cli.model.checkpoint import Checkpoint
from remoe_cli.model.experts import ExpertLayer
from remoe_cli.model.quantise import Integers, quantised_bytes
from remoe_cli.model.shards import write_shard, write_shards
from remoe_cli.model.spec import read_spec
from remoe_cli.profile.curves import fit, quota
from remoe_cli.profile.latency_record import MeasuredPoint, Timing

_TOKENS = (1, 4, 16, 64, 256)
_MEMORY_MB = (1024, 512, 128)
_BEYOND_CACHE_BYTES = 128 << 20
_PROCESSORS = (
    "Functions compute these experts from their stored bytes. Profile on an x86-64 processor with AVX2 and FMA or on arm64, or take all"
    " times from a description with --latency-from."
)
PERIOD_S = cages.PERIOD_US / 1e6


def function_expert(layers: Sequence[ExpertLayer], packed: Checkpoint | None = None, to: Integers | None = None) -> Timing:
    """Measure and fit the time of one expert of these layers, whose parameters must be on the CPU.

    `packed` is their checkpoint where functions compute from its own bytes; `to` is the form to which experts are quantised.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = _shards(folder, layers, to) if packed is None else _packed_shards(folder, layers, packed)
        points = list(_points(list(shards), "ready" if packed is None and to is None else "packed"))
    return fit(points, [quota(PERIOD_S)])


def computes_packed(say: Callable[[str], None]) -> bool:
    """Tell whether FP8 experts can be timed as they are stored here, too; `say` why not."""
    try:
        library()
    except FunctionProcessorError as error:
        say(f"Experts are timed dequantised alone, so plans of this profile have functions dequantise them: {error}.")
        return False
    return True


def _shards(folder: Path, layers: Sequence[ExpertLayer], to: Integers | None = None) -> Iterator[Path]:
    """Write shards of experts until they are larger than a processor's cache."""
    each = sum(p.numel() * p.element_size() for p in layers[0].parameters().values()) // layers[0].experts
    each = each if to is None else quantised_bytes(layers[0], to.name, None)
    for layer, experts in _beyond_cache(layers, each):
        path = folder / f"{layer.layer}.safetensors"
        write_shard(path, layer, experts, to=to)
        yield path


def _packed_shards(folder: Path, layers: Sequence[ExpertLayer], checkpoint: Checkpoint) -> Iterator[Path]:
    """Write the same in the checkpoint's own bytes."""
    each = read_spec(checkpoint).fetched_expert_bytes
    groups = {layer.layer: [experts] for layer, experts in _beyond_cache(layers, each)}
    return (shard.path for shard in write_shards(checkpoint, groups, each, folder))


def _beyond_cache(layers: Sequence[ExpertLayer], each_bytes: int) -> Iterator[tuple[ExpertLayer, range]]:
    """Choose experts that together are larger than a processor's cache, or all."""
    held = 0
    for layer in layers:
        wanted = min(layer.experts, -(-(_BEYOND_CACHE_BYTES - held) // each_bytes))
        if wanted <= 0:
            return
        held += wanted * each_bytes
        yield layer, range(wanted)


def _points(shards: list[Path], form: str = "ready") -> Iterator[MeasuredPoint]:
    with _group() as group:
        command = [sys.executable, "-P", "-m", "remoe_cli.profile.function_timing", str(PERIOD_S), form, *map(str, shards)]
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        argv = cages.inside([group[1]], command) if group else command
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) as child:
            try:
                assert child.stdin and child.stdout and child.stderr
                for vcpus in (1.0, *map(lambda_limits.vcpus, _MEMORY_MB if group else ())):  # whole first: the process is still starting
                    interrupts.check()
                    if group:
                        cages.set_cpu_share(*group, vcpus)
                    child.stdin.write(json.dumps(_TOKENS) + "\n")
                    child.stdin.flush()
                    answer = child.stdout.readline()
                    if not answer:
                        raise _failed(child.stderr.read())
                    yield from (MeasuredPoint(tokens=n, vcpus=vcpus, seconds=s) for n, s in json.loads(answer))
            except BrokenPipeError:
                raise _failed(child.stderr.read() if child.stderr else "") from None
            finally:
                child.kill()


@contextmanager
def _group() -> Iterator[tuple[cages.Mechanism, Path] | None]:
    """Make a control group whose CPU quota can be set; yield its mechanism and it, or None where none can be made."""
    mechanism = cages.probe(f"remoe-profile-{os.getpid()}")
    try:
        if mechanism.cpu_root is None:
            yield None
        else:
            group = mechanism.cpu_root / "function"
            group.mkdir()
            yield mechanism, group
    finally:
        for root in mechanism.groups:
            cages.remove(root)


def _failed(stderr: str) -> ModelError:
    reason = (stderr.strip().splitlines() or ["the process gave no reason"])[-1]
    kind, _, words = reason.partition(": ")
    cannot = "The time of the function's arithmetic cannot be measured:"
    if kind.rpartition(".")[2] == FunctionProcessorError.__name__:
        return ModelError(f"{cannot} {words}.", _PROCESSORS)
    return ModelError(f"{cannot} {reason}", "Run 'pip check'.")

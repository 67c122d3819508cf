"""What other programs read: each file is read in the way of that program's own source, which plan/export.py names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from remoe_cli.artifacts import write_json
from remoe_cli.cli.export import Program
from remoe_cli.errors import UsageError
from remoe_cli.plan.document import LayerPlan, Plan, Source
from remoe_cli.plan.export import FORMATS, cpu_layers, export
from remoe_cli.profile.record import Profile
from tests.support.synthetic import plan_by_hand, synthetic_profile

LAYERS, EXPERTS = 3, 4  # MoE layers 1 to 3 of 4
GPU = ((0, 2), (), (0, 1, 2, 3))


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return synthetic_profile(tmp_path_factory.mktemp("profile"), layers=LAYERS, experts=EXPERTS)


@pytest.fixture(scope="module")
def plan(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = a_plan(profile, GPU)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    write_json(path, made)
    return path


def a_plan(profile: Profile, gpu: tuple[tuple[int, ...], ...]) -> Plan:
    layers = tuple(LayerPlan(layer=1 + index, remote=(), memory_mb=0, replicas=0, gpu=there) for index, there in enumerate(gpu))
    made = plan_by_hand(layers, profile=Source(path=str(profile.path), sha256=profile.sha256))
    return made.model_copy(update={"model": made.model.model_copy(update={"experts_per_layer": EXPERTS})})


def logical_count(path: Path) -> torch.Tensor:
    """As `compute_initial_expert_location_metadata` of SGLang and `_load_activation_frequency` of KTransformers read a file."""
    data: Any = torch.load(path, weights_only=True) if path.suffix == ".pt" else json.loads(path.read_text())
    assert "logical_count" in data and "physical_to_logical_map" not in data  # which would be a placement
    count = data["logical_count"]
    return count if isinstance(count, torch.Tensor) else torch.tensor(count)


@pytest.mark.parametrize(("program", "suffix"), [("sglang", ".json"), ("ktransformers", ".pt")])
def test_counts_are_those_of_all_hidden_layers(profile: Profile, program: str, suffix: str, tmp_path: Path) -> None:
    export(profile.path, program, tmp_path / f"out{suffix}")
    count = logical_count(tmp_path / f"out{suffix}")
    assert tuple(count.shape) == (1 + LAYERS, EXPERTS) and not count.is_floating_point()
    used = profile.arrays["prefill_counts"].sum(axis=0) + profile.arrays["decode_counts"].sum(axis=0)
    assert count[0].tolist() == [0] * EXPERTS and count[1:].tolist() == used.tolist()


def test_the_plans_experts_are_the_ones_that_ktransformers_puts_on_the_gpu(plan: Path, tmp_path: Path) -> None:
    """`generate_gpu_experts_masks` takes the largest numbers of all layers."""
    export(plan, "ktransformers", tmp_path / "out.pt")
    count = logical_count(tmp_path / "out.pt")
    mask = torch.zeros(count.numel(), dtype=torch.bool)
    mask[torch.topk(count.float().flatten(), k=sum(map(len, GPU))).indices] = True
    assert [torch.nonzero(row).flatten().tolist() for row in mask.view(count.shape)[1:]] == [list(there) for there in GPU]


def arguments(path: Path) -> list[str]:
    return " ".join(line for line in path.read_text().splitlines() if not line.startswith("#")).split()


def test_llama_cpp_keeps_whole_layers_in_cpu_memory(plan: Path, profile: Profile, tmp_path: Path) -> None:
    """Six of four experts a layer fill one layer on the GPU: the third, which has most. `-ot` is cut at '=', then searched for."""
    export(plan, "llama.cpp", tmp_path / "out.txt")
    options = arguments(tmp_path / "out.txt")
    assert options[:3] == ["--n-gpu-layers", "999", "--override-tensor"] and len(options) == 4
    pattern, _, buffer = options[3].partition("=")
    assert buffer == "CPU" and "," not in pattern
    tensors = [f"blk.{layer}.ffn_{name}.weight" for layer in (1, 2, 3, 11, 12) for name in ("up_exps", "down_exps", "gate_up_exps", "norm")]
    on_cpu = [tensor for tensor in tensors if re.search(pattern, tensor)]
    assert on_cpu == [f"blk.{layer}.ffn_{name}.weight" for layer in (1, 2) for name in ("up_exps", "down_exps", "gate_up_exps")]
    assert cpu_layers(a_plan(profile, ((0,), (1,), (2,)))) == (1, 2, 3)
    assert cpu_layers(a_plan(profile, (tuple(range(EXPERTS)),) * LAYERS)) == ()


def test_exllamav3_takes_a_number_of_layers(plan: Path, tmp_path: Path) -> None:
    export(plan, "exllamav3", tmp_path / "out.txt")
    assert arguments(tmp_path / "out.txt") == ["--moe_cpu_offload", "2"]


@pytest.mark.parametrize("program", ["llama.cpp", "exllamav3"])
def test_whole_layers_need_a_plan(profile: Profile, program: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"is a profile, and {re.escape(program)} places whole layers"):
        export(profile.path, program, tmp_path / "out.txt")
    assert not (tmp_path / "out.txt").exists()


def test_every_program_that_is_offered_has_a_file() -> None:
    assert {program.value for program in Program} == set(FORMATS)


@pytest.mark.parametrize("program", list(FORMATS))
def test_the_suffix_is_the_programs(profile: Profile, program: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"A file for {program} ends in"):
        export(profile.path, program, tmp_path / "out.csv")


@pytest.mark.parametrize("program", list(FORMATS))
def test_own_files_are_replaced_and_others_are_not(plan: Path, program: str, tmp_path: Path) -> None:
    out = tmp_path / f"out{FORMATS[program].suffix}"
    export(plan, program, out)
    first = out.read_bytes()
    export(plan, program, out)
    assert out.read_bytes() == first
    out.write_bytes(b"years of work")
    with pytest.raises(UsageError, match="not a file for another program that remoe made"):
        export(plan, program, out)
    assert out.read_bytes() == b"years of work"

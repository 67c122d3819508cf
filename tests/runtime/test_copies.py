"""What a MoE layer asks of a GPU in a step: at most two copies and one wait, with two tiers of experts and with three.

No GPU is needed: tests/support/labelled.py. It gives the process a device of its own, so all families run in one child.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from remoe_cli.model import experts, gpu_experts
from remoe_cli.model.checkpoint import find
from remoe_cli.model.experts import ExpertLayer, attach, expert_layers, run_expert
from remoe_cli.model.loader import expert_bytes_held, load
from remoe_cli.model.spec import read_spec
from remoe_cli.profile import latency, pass_times
from remoe_cli.profile.curves import PHYSICAL, fit
from remoe_cli.profile.latency_record import Latency
from remoe_cli.profile.routing import RoutingRecorder, record_batch
from remoe_cli.runtime import engine
from remoe_cli.runtime.dispatch import Dispatcher
from remoe_cli.runtime.remote_function import RemoteFunction
from remoe_cli.runtime.start_ahead import Starting
from tests.support import forked
from tests.support.families import EXPERTS, FAMILIES, save
from tests.support.harness import PROMPT, InProcessExperts
from tests.support.labelled import NAME, Asked, LabelledTensor, labelled, register

NEW_TOKENS = 5
# Experts by tier; the rest are in functions.
TIERS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "two": ((0, 2, 5), ()),
    "three": ((0, 2), (3, 4, 7)),
    "three, grouped": ((0, 2), (3, 4, 7)),
    "GPU": ((), tuple(range(EXPERTS))),
}
CASES = [(family, tiers) for family in FAMILIES for tiers in ("two", "three")] + [
    *((family, "three, grouped") for family in ("mixtral", "gpt_oss", "nemotron_h", "deepseek_v3", "granitemoe", "ernie4_5_moe")),
    *(("mixtral", "GPU"), ("gpt_oss", "GPU")),
]
# Families with shared experts: those that compute them before the routed ones, and those that do after.
SHARED_FIRST = {"afmoe", "ernie4_5_moe", "hunyuan_v1_moe", "qwen2_moe", "qwen3_next"}
SHARED_LAST = {"deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "granitemoeshared", "nemotron_h"}


def copy_of_each(layer: ExpertLayer, row: int, x: Tensor) -> Tensor:
    """What run_expert was before: each expert's rows go to its device and back."""
    return run_expert(layer, row, x.to(NAME).to("cpu"))


def counting_there(index: Any, count: int) -> Any:
    """What the grouping was before: the device counts, and the host waits for it."""
    LabelledTensor(torch.from_numpy(index.copy())).reshape(-1).bincount().tolist()
    return BY_EXPERT(index, count)


BY_EXPERT = experts.by_expert
BREAKS: dict[str, tuple[str, Callable[..., Any]]] = {
    "a copy for each expert": ("run_expert", copy_of_each),
    "a count on the device": ("by_expert", counting_there),
}


def begin() -> None:
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # labels are seen in this thread only
    register()


def serve(folder: str, family: str, tiers: str, broken: str = "") -> dict[str, Any]:
    """Load to the labelled device and generate; return what each step of each MoE block has asked of the device."""
    reference = save(family, torch.float32, Path(folder), fused=tiers == "three")
    expected = generated(reference, "cpu")
    checkpoint, layers = find(folder), [x.layer for x in expert_layers(reference)]
    local, gpu = TIERS[tiers]
    away = tuple(e for e in range(EXPERTS) if e not in local + gpu)
    functions = {layer: (RemoteFunction(f"layer-{layer}", away, 1, 0.0),) for layer in layers if away}
    remote = InProcessExperts(reference)
    steps: list[tuple[list[str], list[str]]] = []
    with labelled() as asked, torch.no_grad(), ExitStack() as stack:
        for owner, name, stand_in in (
            (engine, "choose", lambda *_: NAME),
            (engine, "load_tokenizer", lambda _: None),
            (engine, "start_all", lambda *_: Starting(None, lambda: None, ThreadPoolExecutor(1), [], {})),
            (Dispatcher, "_send", lambda _, *sent: remote.send(*sent)),
            *((gpu_experts, "_grouped_without_wait", lambda _: True) for _ in range(tiers == "three, grouped")),
            *((experts, *BREAKS[name]) for name in [broken] if name),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        started = engine.start_engine(
            checkpoint, read_spec(checkpoint), functions, lambda *_: None, gpu=True, gpu_experts=dict.fromkeys(layers, gpu), copied=True
        )
        model = started.model
        places = {t.device.type for t in (*model.parameters(), *model.buffers()) if id(t) not in host_ids(model)}
        held = expert_bytes_held(model) / expert_bytes_held(reference)
        for layer in expert_layers(model):
            block = model.get_submodule(layer.name.rpartition(".")[0])
            block.register_forward_pre_hook(lambda *_: asked.clear())
            block.register_forward_hook(lambda *_: steps.append((list(asked.copies), list(asked.waits))))
        tokens = generated(model, NAME)
        early = [start.__self__.early for start in started.dispatcher.starts.values()]  # type: ignore[attr-defined]
    found = {"same": tokens == expected, "steps": steps, "early": early, "layers": len(layers), "remote": remote.rows}
    return found | {"places": sorted(places), "held": held}


def host_ids(model: Any) -> set[int]:
    return {id(p) for layer in expert_layers(model) for p in layer.parameters().values()}


def generated(model: Any, device: str) -> list[int]:
    """The tokens of greedy generation; not in inference mode, which a tensor with a label does not always survive."""
    with torch.no_grad():
        ids = PROMPT[:1].to(device)
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "disable_compile": True, "pad_token_id": 0}
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        return out[0].cpu().tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def child() -> Iterator[ProcessPoolExecutor]:
    with forked.pool(begin) as made:
        yield made


def result(child: ProcessPoolExecutor, folder: Path, *arguments: str) -> dict[str, Any]:
    return child.submit(serve, str(folder), *arguments).result(280)


@pytest.mark.sweep
@pytest.mark.parametrize(("family", "tiers"), CASES)
def test_a_step_of_a_layer_takes_two_copies_and_one_wait_at_most(
    family: str, tiers: str, child: ProcessPoolExecutor, tmp_path: Path
) -> None:
    found = result(child, tmp_path, family, tiers)
    assert found["same"] and found["places"] == [NAME] and found["held"] == len(TIERS[tiers][0]) / EXPERTS
    assert len(found["steps"]) == found["layers"] * NEW_TOKENS
    copies = 1 if tiers == "GPU" else 2
    for asked_copies, waits in found["steps"]:
        assert len(asked_copies) <= copies and waits == ["event"], (asked_copies, waits)
    assert (found["remote"] > 0) == (tiers != "GPU")
    assert found["early"] == [family in SHARED_LAST] * (found["layers"] if family in SHARED_FIRST | SHARED_LAST else 0)


@pytest.mark.parametrize("broken", BREAKS)
def test_a_copy_too_many_and_a_wait_too_many_are_seen(broken: str, child: ProcessPoolExecutor, tmp_path: Path) -> None:
    """Negative control."""
    steps = result(child, tmp_path, "mixtral", "two", broken)["steps"]
    assert any(len(copies) > 2 or len(waits) > 1 for copies, waits in steps)


def test_operands_of_two_devices_are_refused_and_waits_are_counted() -> None:
    run = forked.complete(mixed)
    assert run.returncode == 0, run.stderr


def mixed() -> None:
    register()
    far, near = LabelledTensor(torch.arange(3.0)), torch.ones(3)
    with labelled() as asked:
        with pytest.raises(RuntimeError, match="same device"):
            far + near
        for ask in WAITS:
            asked.clear()
            ask(far)
            assert len(asked.waits) == 1, asked
        check_copies(asked, far)


WAITS: tuple[Callable[[Tensor], Any], ...] = (
    lambda x: x.tolist(),
    lambda x: x[1].item(),
    lambda x: x.cpu(),
    lambda x: x.to("cpu", non_blocking=True),  # into memory that is not pinned
    lambda x: x.nonzero(),
    lambda x: bool((x > 1).any()),
    lambda x: x[x > 1],
    lambda x: torch.ones(3).to(NAME),
)


def check_copies(asked: Asked, far: Tensor) -> None:
    pinned, event = torch.zeros(3, pin_memory=True), torch.Event(torch.device(NAME))
    asked.clear()
    pinned.copy_(far, non_blocking=True)
    event.record()
    assert pinned.tolist() == [0, 0, 0] and len(asked.copies) == 1 and not asked.waits
    event.synchronize()
    assert pinned.tolist() == [0, 1, 2] and asked.waits == ["event"]
    assert (pinned.to(NAME, non_blocking=True) + far).tolist() == [0, 2, 4] and len(asked.copies) == 3


def test_a_profile_with_a_gpu_has_times_of_each_place(tmp_path: Path) -> None:
    run = forked.complete(measured, str(tmp_path))
    assert run.returncode == 0, run.stderr
    found = Latency.model_validate_json(run.stdout)
    assert found.copy_s.per_token_s >= 0 < found.copy_s.seconds(16) < 1
    assert found.gpu_expert is not None and {(p.tokens, p.vcpus) for p in found.gpu_expert.points} == {
        (n, 1.0) for n in (1, 4, 16, 64, 256)
    }
    assert all(0 < p.seconds < 1 for p in (*found.gpu_expert.points, *found.local_expert.points))
    assert found.nonexpert_layers is not None
    assert 0 < found.nonexpert_decode_s < 5 and (np.array(found.nonexpert_layers.seconds) > 0).all()


def measured(folder: str) -> None:
    """Profile on the labelled device: routing as on the CPU, and times, in which copies and experts take their own."""
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    register()
    whole = save("mixtral", torch.float32, Path(folder), fused=False)
    prompts = [[1, 2, 3], list(range(20, 40))]
    expected = recorded(whole, prompts)
    with labelled(), mock.patch.object(pass_times, "now", clock), ExitStack() as stack:
        model = load(find(folder), device=NAME)
        for ours, theirs in zip(recorded(model, prompts), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for module, name, stand_in in ((latency, "now", clock), (latency, "_ROUND_S", 0.005), (pass_times, "_FORWARD_S", 0.02)):
            stack.enter_context(mock.patch.object(module, name, stand_in))
        stack.enter_context(mock.patch.object(latency, "function_expert", lambda layers, *_: fit(latency._alone(layers), [PHYSICAL])))
        sys.stdout.write(latency.measure(model, 1.0).model_dump_json())


def recorded(model: Any, prompts: list[list[int]]) -> list[Any]:
    recorder = RoutingRecorder()
    attach(model, recorder)
    return list(vars(record_batch(model, recorder, prompts, EXPERTS, 4, 100)).values())


def clock(_: object) -> float:
    return time.perf_counter()

"""What a MoE layer asks of a GPU in a step: at most two copies and one wait, with two tiers of experts and with three.

No GPU is needed: tests/support/labelled.py. It gives the process a device of its own, so each family runs in a child.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from remoe_cli.model import experts
from remoe_cli.model.experts import ExpertLayer, attach, expert_layers, run_expert
from remoe_cli.model.gpu_experts import gpu_experts
from remoe_cli.model.shared_experts import start_early
from remoe_cli.runtime.dispatch import Dispatcher
from tests.support import forked
from tests.support.families import EXPERTS, FAMILIES, build
from tests.support.harness import PROMPT, InProcessExperts
from tests.support.labelled import NAME, Asked, LabelledTensor, label_non_experts, labelled, register

NEW_TOKENS = 5
# Experts by tier; the rest are in functions.
TIERS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "two": ((0, 2, 5), ()),
    "three": ((0, 2), (3, 4, 7)),
    "GPU": ((), tuple(range(EXPERTS))),
}
CASES = [(family, tiers) for family in FAMILIES for tiers in ("two", "three")] + [("mixtral", "GPU"), ("gpt_oss", "GPU")]
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


def serve(family: str, tiers: str, broken: str = "") -> None:
    """Generate with a model on the labelled device, and print what each step of each MoE block has asked of it."""
    register()
    reference, model = build(family), build(family)
    expected = generated(reference, "cpu")
    layers = expert_layers(model)
    local, gpu = TIERS[tiers]
    remote = InProcessExperts(reference)
    steps: list[tuple[list[str], list[str]]] = []
    with labelled() as asked, ThreadPoolExecutor(1) as pool, torch.no_grad():
        on_gpu = {x.layer: gpu_experts(x.module, gpu, there(x, gpu), EXPERTS) for x in layers if gpu}
        for layer in layers:
            for name, p in layer.parameters().items():
                layer.module._parameters[name] = torch.nn.Parameter(p.data[list(local)].clone(), requires_grad=False)
        label_non_experts(model)
        starts = start_early(model)
        runner = Dispatcher(None, {x.layer: {e: i for i, e in enumerate(local)} for x in layers}, {}, pool, gpu=on_gpu, starts=starts)
        runner._send = remote.send  # type: ignore[method-assign]
        attach(model, runner)
        for layer in layers:
            block = model.get_submodule(layer.name.rpartition(".")[0])
            block.register_forward_pre_hook(lambda *_: asked.clear())
            block.register_forward_hook(lambda *_: steps.append((list(asked.copies), list(asked.waits))))
        with mock.patch.object(experts, *BREAKS[broken]) if broken else nullcontext():
            tokens = generated(model, NAME)
        early = [start.__self__.early for start in starts.values()]  # type: ignore[attr-defined]
    json.dump({"same": tokens == expected, "steps": steps, "early": early, "layers": len(layers), "remote": remote.rows}, sys.stdout)


def there(layer: ExpertLayer, chosen: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: LabelledTensor(p.data[list(chosen)]) for name, p in layer.parameters().items()}


def generated(model: Any, device: str) -> list[int]:
    """The tokens of greedy generation; not in inference mode, which a tensor with a label does not always survive."""
    with torch.no_grad():
        ids = PROMPT[:1].to(device)
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "disable_compile": True, "pad_token_id": 0}
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        return out[0].cpu().tolist()  # type: ignore[no-any-return]


def result(*arguments: str) -> dict[str, Any]:
    run = forked.complete(serve, *arguments)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("family", "tiers"), CASES)
def test_a_step_of_a_layer_takes_two_copies_and_one_wait_at_most(family: str, tiers: str) -> None:
    found = result(family, tiers)
    assert found["same"]
    assert len(found["steps"]) == found["layers"] * NEW_TOKENS
    copies = 1 if tiers == "GPU" else 2
    for asked_copies, waits in found["steps"]:
        assert len(asked_copies) <= copies and waits == ["event"], (asked_copies, waits)
    assert (found["remote"] > 0) == (tiers != "GPU")
    assert found["early"] == [family in SHARED_LAST] * (found["layers"] if family in SHARED_FIRST | SHARED_LAST else 0)


@pytest.mark.parametrize("broken", BREAKS)
def test_a_copy_too_many_and_a_wait_too_many_are_seen(broken: str) -> None:
    """Negative control."""
    steps = result("mixtral", "two", broken)["steps"]
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

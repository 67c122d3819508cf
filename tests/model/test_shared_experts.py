"""Shared experts that are started in the hook: computed once, from the right input, and only where their call follows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from remoe_cli.model.experts import ExpertLayer, attach, run_experts
from remoe_cli.model.shared_experts import start_early
from tests.support.families import build
from tests.support.harness import logits


def started(model: PreTrainedModel, fail: list[bool]) -> list[Any]:
    """Attach a runner that starts the shared experts, and fails once where `fail` says so; what starts them."""
    starts = start_early(model)

    def run(layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        starts[layer.layer](hidden)
        if fail and fail.pop():
            raise InterruptedError
        return run_experts(layer, hidden, index, weights, {e: e for e in range(layer.experts)}, lambda *_: dict)

    attach(model, run)
    return [start.__self__ for start in starts.values()]  # type: ignore[attr-defined]


def calls(model: PreTrainedModel, name: str) -> list[str]:
    """Note when the shared experts of each block compute, and when the block calls them."""
    noted: list[str] = []
    for module_name, module in model.named_modules():
        if module_name.endswith(name):
            module.get_submodule("down_proj").register_forward_hook(lambda *_: noted.append("computed"))
            module.register_forward_pre_hook(lambda *_: noted.append("called"))
    return noted


@pytest.mark.parametrize(
    ("family", "name"), [("deepseek_v3", "shared_experts"), ("glm4_moe", "shared_experts"), ("dots1", "shared_experts")]
)
def test_from_the_second_pass_on_they_compute_before_their_call(family: str, name: str) -> None:
    model = build(family)
    expected = logits(model)
    noted = calls(model, name)
    started(model, [])
    assert torch.equal(logits(model), expected) and noted == ["called", "computed"] * 2
    noted.clear()
    assert torch.equal(logits(model), expected) and noted == ["computed", "called"] * 2


def test_those_that_come_first_stay_as_they_are() -> None:
    model = build("qwen2_moe")
    expected = logits(model)
    noted = calls(model, "shared_expert")
    shared = started(model, [])
    assert torch.equal(logits(model), expected) and torch.equal(logits(model), expected)
    assert noted == ["called", "computed"] * 4 and [x.early for x in shared] == [False, False]


def test_a_pass_that_failed_leaves_nothing_behind() -> None:
    model = build("deepseek_v3")
    expected, fail = logits(model), list[bool]()
    started(model, fail)
    assert torch.equal(logits(model), expected)
    fail += [True, False]
    with pytest.raises(InterruptedError):
        logits(model)
    assert torch.equal(logits(model), expected)


def test_another_input_of_the_same_size_is_computed_from_that() -> None:
    """Also where it takes the place of the first in memory."""
    model: Any = build("deepseek_v3")
    blocks = [layer.mlp for layer in model.model.layers[1:]]
    expected = logits(model)
    shared = started(model, [])
    for block in blocks:
        block.shared_experts.register_forward_pre_hook(lambda _, given: (given[0].clone(),))
    assert torch.equal(logits(model), expected) and torch.equal(logits(model), expected)
    assert [x.early for x in shared] == [False, False]

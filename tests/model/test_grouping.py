"""Sums of weighted outputs: bit for bit those of transformers' eager loop, in every family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from remoe_cli.model.experts import ExpertLayer, expert_layers, run_expert, run_experts
from remoe_cli.model.grouping import add_slots, by_expert, device_sum, rows_of, weighted_sum
from tests.support.families import EXPERTS, FAMILIES, build

# Tokens, slots, and whether slots of a token may name the same expert.
SHAPES = [(1, 1, False), (1, 6, False), (1, 6, True), (3, 2, False), (40, 4, False), (40, 4, True)]


def drawn(layer: ExpertLayer, tokens: int, slots: int, again: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * 100 + slots)
    hidden = torch.randn((tokens, layer.width), generator=generator).to(dtype)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:slots] for _ in range(tokens)])
    if again:
        index = torch.randint(EXPERTS, (tokens, slots), generator=generator)
    weights = torch.rand((tokens, slots), generator=generator) * 3 ** torch.randn((tokens, slots), generator=generator)
    return hidden, index, weights


def eager(layer: ExpertLayer, *inputs: Tensor) -> Tensor:
    module: Any = layer.module
    return type(module).forward.__wrapped__(module, *inputs)  # type: ignore[no-any-return]


def remote(layer: ExpertLayer, rows: dict[int, Tensor]) -> Any:
    return lambda: {e: run_expert(layer, e, x) for e, x in rows.items()}


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_those_of_the_eager_loop_to_the_bit(family: str, dtype: torch.dtype) -> None:
    layer = expert_layers(build(family, dtype))[0]
    for tokens, slots, again in SHAPES:
        hidden, index, weights = drawn(layer, tokens, slots, again, dtype)
        for of_weights in (torch.float32, dtype):
            inputs = (hidden, index, weights.to(of_weights))
            with torch.no_grad():
                ours = run_experts(layer, *inputs, {e: e for e in range(0, EXPERTS, 3)}, remote)
                assert torch.equal(ours, eager(layer, *inputs)), (tokens, slots, again, of_weights)
                # Slots without an expert add nothing, wherever they stand.
                widened = [torch.cat([x, x[:, :1]], dim=1) for x in inputs[1:]]
                widened[0][:, -1] = EXPERTS
                flipped = [x.flip(1) for x in widened]
                assert torch.equal(run_experts(layer, hidden, *flipped, {}, remote), eager(layer, hidden, *(x.flip(1) for x in inputs[1:])))


def test_another_order_of_sums_is_another_sum() -> None:
    """Negative control: rounding tells the orders apart."""
    layer = expert_layers(build("mixtral", torch.bfloat16))[0]
    hidden, index, weights = drawn(layer, 40, 4, True, torch.bfloat16)
    grouping = by_expert(index.numpy(), EXPERTS)
    with torch.no_grad():
        outputs = [run_expert(layer, e, rows_of(hidden, grouping, start, end)) for e, start, end in grouping.groups]
        expected = eager(layer, hidden, index, weights)
        assert torch.equal(weighted_sum(outputs, hidden, weights, grouping, torch.bfloat16), expected)
        descending = replace(grouping, groups=grouping.groups[::-1])
        assert not torch.equal(weighted_sum(outputs[::-1], hidden, weights, descending, torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_on_a_device_are_those_of_the_eager_loop_too(dtype: torch.dtype) -> None:
    layer = expert_layers(build("mixtral", dtype))[0]
    for tokens, slots, again in SHAPES:
        if again:
            continue  # no router names an expert twice for a token
        hidden, index, weights = drawn(layer, tokens, slots, again, dtype)
        grouping = by_expert(index.numpy(), EXPERTS)
        with torch.no_grad():
            outputs = torch.empty(tokens * slots, layer.width, dtype=dtype)
            for expert, start, end in grouping.groups:
                outputs[torch.from_numpy(grouping.flat[start:end])] = run_expert(layer, expert, rows_of(hidden, grouping, start, end))
            assert torch.equal(device_sum(outputs, index, weights, dtype), eager(layer, hidden, index, weights))


def test_rows_are_in_the_order_of_eager() -> None:
    """Ascending by expert; within one by slot, then by token; those without an expert at the end."""
    grouping = by_expert(torch.tensor([[5, 2], [2, 9], [2, 5]]).numpy(), experts=8)
    assert grouping.groups == ((2, 0, 3), (5, 3, 5))
    assert grouping.tokens.tolist() == [1, 2, 0, 0, 2, 1]
    assert grouping.flat.tolist() == [2, 4, 1, 0, 5, 3]
    ours, others = grouping.divided((5, 7))
    assert (ours.groups, others.groups) == (((5, 3, 5),), ((2, 0, 3),))
    assert others.places.tolist() == [2, 4, 1]


def test_a_device_computes_the_same_order() -> None:
    index = torch.randint(9, (50, 3), generator=torch.Generator().manual_seed(0))
    grouping = by_expert(index.numpy(), experts=8)
    assert [x.tolist() for x in grouping.on_device(index)] == [grouping.tokens.tolist(), grouping.flat.tolist()]


def test_slots_are_added_one_after_the_other() -> None:
    outputs = torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16).view(1, 3, 1)
    assert add_slots(outputs).item() == 256 and add_slots(outputs.flip(1)).item() == 258

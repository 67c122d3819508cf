"""The hook: once a layer, for the model it is attached to and no other, and never silently bypassed."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from remoe_cli.errors import ModelError
from remoe_cli.model.experts import ExpertLayer, Runner, attach, expert_layers, run_expert, run_experts
from tests.support.families import FAMILIES, build
from tests.support.harness import greedy, logits, serve


def all_local(layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return run_experts(layer, hidden, index, weights, {e: e for e in range(layer.experts)}, lambda *_: dict)


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
def test_the_hook_fires_once_a_layer_and_pass_and_says_which_layer(family: str) -> None:
    model = build(family)
    expected = logits(model)
    seen: list[int] = []

    def see(layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        seen.append(layer.layer)
        assert layer.module is model.get_submodule(layer.name)
        return all_local(layer, hidden, index, weights)

    attachment = attach(model, see)
    assert (logits(model) - expected).abs().max() < 1e-4
    assert seen == [x.layer for x in attachment.layers]
    attachment.check_fired(1)
    greedy(model, 4)
    attachment.check_fired(5)


def test_a_layer_that_did_not_fire_is_noticed() -> None:
    model = build("mixtral")
    attachment = attach(model, all_local)
    with pytest.raises(ModelError, match="Layer 0 called the experts hook 0 times in 1 forward passes"):
        attachment.check_fired(1)
    bypassed: Any = attachment.layers[1].module
    bypassed.forward = type(bypassed).forward.__wrapped__.__get__(bypassed)
    logits(model)
    with pytest.raises(ModelError, match="Layer 1 called the experts hook 0 times in 1 forward passes"):
        attachment.check_fired(1)


def test_a_layer_that_fired_twice_is_noticed() -> None:
    model = build("mixtral")
    attachment = attach(model, all_local)
    logits(model)
    attachment.layers[0].module(torch.zeros(1, 64), torch.zeros((1, 2), dtype=torch.long), torch.zeros(1, 2))
    with pytest.raises(ModelError, match="Layer 0 called the experts hook 2 times"):
        attachment.check_fired(1)


def test_kernels_that_replace_blocks_are_refused() -> None:
    model: Any = build("gpt_oss")
    model._use_kernels = True
    assert model.use_kernels
    with pytest.raises(ModelError, match="use_kernels"):
        attach(model, all_local)


def test_two_attached_models_do_not_mix() -> None:
    one, other = build("mixtral", seed=1), build("mixtral", seed=2)
    expected = [logits(one), logits(other)]
    calls: list[str] = []

    def named(name: str) -> Runner:
        def run(layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            calls.append(name)
            return all_local(layer, hidden, index, weights)

        return run

    first, second = attach(one, named("one")), attach(other, named("other"))
    assert torch.equal(logits(one), expected[0])
    assert torch.equal(logits(other), expected[1])
    assert calls == ["one", "one", "other", "other"]
    first.check_fired(1)
    second.check_fired(1)


def test_attaching_again_replaces_the_runner() -> None:
    model = build("mixtral")
    first = attach(model, all_local)
    second = attach(model, lambda layer, hidden, index, weights: torch.zeros_like(hidden))
    logits(model)
    second.check_fired(1)
    assert not first.calls


def test_a_copy_of_an_attached_model_does_not_run_unattached() -> None:
    model = build("mixtral")
    expected = logits(model)
    attach(model, all_local)
    twin = copy.deepcopy(model)
    with pytest.raises(ModelError, match="remoe is not attached to") as refused:
        logits(twin)
    assert "copy" in refused.value.hint
    attach(twin, all_local).check_fired(0)
    assert torch.equal(logits(twin), expected)


def test_an_attached_model_is_freed_with_its_last_reference() -> None:
    model = build("mixtral")
    attach(model, all_local)
    logits(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_ids_beyond_the_experts_mean_no_expert(family: str) -> None:
    """zaya routes a token that skips to id E; its weight must not be spent on anybody."""
    layer = expert_layers(build(family))[0]
    x = torch.randn((3, layer.width), generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[2, 8], [8, 9], [8, 2]])
    weights = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]])
    asked: list[int] = []

    def remote(_: ExpertLayer, rows: dict[int, Tensor]) -> Any:
        asked.extend(rows)
        return lambda: {e: run_expert(layer, e, r) for e, r in rows.items()}

    with torch.no_grad():
        expected = run_expert(layer, 2, x) * torch.tensor([[0.25], [0.0], [0.5]])
        assert torch.allclose(run_experts(layer, x, index, weights, {2: 2}, remote), expected, atol=1e-6)
        assert asked == []
        assert torch.allclose(run_experts(layer, x, index, weights, {}, remote), expected, atol=1e-6)
    assert asked == [2]


def test_no_tokens_give_no_rows_and_no_call() -> None:
    layer = expert_layers(build("mixtral"))[0]
    empty = run_experts(
        layer, torch.empty(0, 64), torch.empty((0, 2), dtype=torch.long), torch.empty(0, 2), {}, lambda *_: pytest.fail("asked")
    )
    assert empty.shape == (0, 64)


class Watched(torch.nn.Module):
    """An activation function that writes down when it runs."""

    def __init__(self, function: Any, order: list[str]) -> None:
        super().__init__()
        self._function, self._order = function, order

    def forward(self, x: Tensor) -> Tensor:
        self._order.append("ran")
        return self._function(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_local_experts_run_between_sending_and_waiting(family: str) -> None:
    model = build(family)
    expected = logits(model)
    order: list[str] = []

    def send(layer: ExpertLayer, rows: dict[int, Tensor]) -> Any:
        answers = {e: run_expert(layer, e, x) for e, x in rows.items()}
        order.append("sent")

        def wait() -> dict[int, Tensor]:
            order.append("waited")
            return answers

        return wait

    layers = expert_layers(model)
    for layer in layers:
        layer.module.act_fn = Watched(layer.module.act_fn, [])
    serve(model, {x.layer: tuple(range(4)) for x in layers}, send)
    assert (logits(model) - expected).abs().max() < 1e-4
    order.clear()
    for layer in layers:
        layer.module.act_fn._order = order  # type: ignore[union-attr]
    logits(model)
    # Four experts run to answer the remote rows, then four between sending and waiting.
    assert order == [*["ran"] * 4, "sent", *["ran"] * 4, "waited"] * len(layers)


def test_bfloat16_sums_round_as_in_the_eager_loop() -> None:
    model = build("mixtral", torch.bfloat16)
    expected = logits(model)
    attach(model, all_local)
    assert torch.equal(logits(model), expected)

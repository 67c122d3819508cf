"""Products in torch's order: the model's numbers to the bit, in every family, with torch's threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remoe_cli.function.products import Order, are_needed, orders
from remoe_cli.model import ordered, products
from remoe_cli.model.experts import attach, expert_layers
from remoe_cli.model.loader import expert_bytes_held
from remoe_cli.model.ordered import OrderedLinear, linear, order_weights
from tests.model.test_blocked import _all_local, _logits
from tests.support.families import FAMILIES, build

pytestmark = pytest.mark.skipif(not orders(), reason="this processor has none of the instructions that the library needs")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is known of sizes, and afterwards what was known before."""
    monkeypatch.setattr(ordered, "_sizes", set())
    monkeypatch.setattr(ordered, "_known", {})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_of_a_model_stays(family: str) -> None:
    model = build(family, torch.bfloat16)
    attach(model, _all_local)
    layers = expert_layers(model)
    expected, held = _logits(model), expert_bytes_held(model)
    addresses = [p.data_ptr() for p in model.parameters()]
    order_weights(model, [layer.module for layer in layers])
    assert torch.equal(_logits(model), expected)
    assert (expert_bytes_held(model), [p.data_ptr() for p in model.parameters()]) == (held, addresses)


@pytest.mark.skipif(not are_needed(), reason="with instructions for bfloat16 torch adds up in other orders")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("has_bias", [False, True])
def test_where_they_are_needed_most_products_are_taken(threads: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(threads)
    asked: list[int] = []
    product = ordered._product
    monkeypatch.setattr(ordered, "_product", lambda order, x, *rest: (asked.append(len(x)), product(order, x, *rest))[1])
    layer: Any = nn.Linear(592, 200, bias=has_bias, dtype=torch.bfloat16).requires_grad_(False)
    order_weights(layer, [])
    assert isinstance(layer, OrderedLinear)
    asked.clear()
    for rows in (1, 2, 3, 5, 8, 40, 100):
        x = torch.randn(rows, 592, dtype=torch.bfloat16)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert {1, 8, 40, 100} <= set(asked)


@pytest.mark.skipif(not are_needed(), reason="with instructions for bfloat16 torch adds up in other orders")
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_rows_that_threads_do_not_share_evenly_stay_with_torch(threads: int) -> None:
    """Half of what is added up takes the other half nearly away: one row in another order has some 5 of 512 other numbers."""
    torch.set_num_threads(threads)
    layer: Any = nn.Linear(1024, 512, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight[:, 512:] = -layer.weight[:, :512] * 1.01
    order_weights(layer, [])
    assert isinstance(layer, OrderedLinear)
    for rows in (*range(1, 34), 63, 64, 65, 127, 128, 129):
        x = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
        x[:, 512:] = x[:, :512]
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)), rows


@pytest.fixture
def without_onednn() -> Iterator[None]:
    """As on a processor that oneDNN has no products in bfloat16 for: torch's own loops."""
    if not are_needed():
        pytest.skip("with instructions for bfloat16 torch's loops use them")
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags warns of another setting
    yield
    torch._C._set_mkldnn_enabled(True)


@pytest.mark.usefixtures("without_onednn")
def test_torchs_own_loops_add_up_in_dots_and_in_fours() -> None:
    layer: Any = nn.Linear(592, 200, dtype=torch.bfloat16).requires_grad_(False)
    order_weights(layer, [])
    assert ordered._orders((layer.weight.shape, True, False)) == ordered._Known(Order.DOTS, Order.DOTS, 2)
    assert ordered._orders((torch.Size([592, 200]), False, True)) == ordered._Known(Order.FOURS, Order.FOURS, 2)


@pytest.mark.usefixtures("without_onednn")
def test_experts_that_are_stored_the_other_way_round_are_taken_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gpt_oss", torch.bfloat16)
    attach(model, _all_local)
    layers = expert_layers(model)
    assert layers[0].module.is_transposed
    expected = _logits(model)
    order_weights(model, [layer.module for layer in layers])
    taken: list[Order] = []
    product = ordered._product
    monkeypatch.setattr(ordered, "_product", lambda order, *rest: (taken.append(order), product(order, *rest))[1])
    assert torch.equal(_logits(model), expected)
    assert {Order.DOTS, Order.FOURS} == set(taken)


def test_a_size_that_was_tried_with_other_threads_is_tried_again() -> None:
    torch.set_num_threads(1)
    layer: Any = nn.Linear(64, 64, dtype=torch.bfloat16).requires_grad_(False)
    order_weights(layer, [])
    torch.set_num_threads(2)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    if isinstance(layer, OrderedLinear):
        assert {threads for _, threads in ordered._known} == {1, 2}


def test_a_product_with_other_bits_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    product = ordered._product
    monkeypatch.setattr(ordered, "_product", lambda *a: product(*a) * 1.01)
    model = build("mixtral", torch.bfloat16)
    order_weights(model, [layer.module for layer in expert_layers(model)])
    assert not any(isinstance(module, OrderedLinear) for module in model.modules())
    assert not ordered._sizes


def test_other_types_strides_and_sizes_stay_with_torch() -> None:
    layers: list[Any] = [nn.Linear(64, 64), nn.Linear(24, 64, dtype=torch.bfloat16), nn.Linear(64, 64, dtype=torch.float16)]
    for layer in layers:
        order_weights(layer, [])
        assert type(layer) is nn.Linear
    plain: Any = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    order_weights(plain, [])
    x = torch.randn(6, 128, dtype=torch.bfloat16)[:, ::2]  # not contiguous
    assert torch.equal(plain(x), F.linear(x.contiguous(), plain.weight))
    assert torch.equal(linear(torch.ones(2, 64), torch.ones(64, 64)), F.linear(torch.ones(2, 64), torch.ones(64, 64)))
    assert plain(x[:0]).shape == (0, 64)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # torch's own sentence, and nothing read beside the rows
        plain(torch.ones(2, 48, dtype=torch.bfloat16))


def test_shared_weights_are_taken_too() -> None:
    """Nothing is copied, so an output layer that is the embedding gains as well."""
    model = build("mixtral", torch.bfloat16, tie_word_embeddings=True)
    order_weights(model, [])
    assert model.lm_head.weight is model.get_input_embeddings().weight
    if are_needed():
        assert isinstance(model.lm_head, OrderedLinear)


@pytest.mark.parametrize("needed", [False, True])
def test_each_processor_gets_its_products(needed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(products, "are_needed", lambda: needed)
    monkeypatch.setattr(products, "order_weights", lambda *_: called.append("ordered"))
    monkeypatch.setattr(products, "block_weights", lambda *_: called.append("blocked"))
    products.prepare_products(nn.Linear(2, 2), [])
    assert called == ["ordered" if needed else "blocked"]


def test_without_torchs_team_more_threads_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered, "_team", lambda: None)
    torch.set_num_threads(2)
    layer: Any = nn.Linear(64, 64, dtype=torch.bfloat16)
    order_weights(layer, [])
    assert type(layer) is nn.Linear


def test_a_team_of_threads_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered, "_ALONE", 1)
    weight = torch.randn(208, 64, dtype=torch.bfloat16)
    for order in orders():
        for rows in (1, 3, 5, 40):
            x = torch.randn(rows, 64, dtype=torch.bfloat16)
            found: list[Tensor] = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(ordered._product(order, x, weight.t().contiguous() if order is Order.FOURS else weight, None))
            assert torch.equal(*found)

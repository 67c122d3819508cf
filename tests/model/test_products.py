"""Products with bfloat16 weights: each way gives torch's numbers, and is used where it was found to be faster."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remoe_cli.model import products
from remoe_cli.model.experts import expert_layers, run_expert
from remoe_cli.model.products import Ways, choose_products, linear, own, widened
from tests.support.families import build


def drawn(rows: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(inputs)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((*rows, inputs), (outputs, inputs), (outputs,)))
    return x, weight, bias


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [((1,), 64, 96), ((2, 1, 5), 64, 96), ((40,), 96, 3), ((9,), 1000, 1200)])
@pytest.mark.parametrize("way", [own, widened])
def test_each_way_is_the_product_rounded_once(way: products.Way, rows: tuple[int, ...], inputs: int, outputs: int, bias: bool) -> None:
    x, weight, b = drawn(rows, inputs, outputs)
    exact = x.double() @ weight.double().t() + (b.double() if bias else 0)
    got = way(x, weight, b if bias else None)
    assert got.dtype is torch.bfloat16 and got.shape == (*rows, outputs)
    # Half of a bfloat16 step, and what float32 sums are off by.
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(9, 1000, 1200), (40, 96, 64)])
def test_a_matrix_that_is_stored_the_other_way_round_is_widened_in_its_own_blocks(rows: int, inputs: int, outputs: int) -> None:
    x, weight, bias = drawn((rows,), inputs, outputs)
    expected, got = widened(x, weight, bias), widened(x, weight.t().contiguous().t(), bias)
    assert torch.allclose(got.float(), expected.float(), rtol=2**-7, atol=1e-3)


def test_torchs_own_product_is_not_used_for_a_matrix_that_is_stored_the_other_way_round(used: list[str]) -> None:
    """It takes many times as long there: of gpt_oss, whose experts are stored so."""
    x, weight, _ = drawn((1,), 64, 96)
    linear(x, weight.t().contiguous().t())
    assert used == []
    linear(x, weight)
    assert used == ["own"]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `linear` has multiplied by."""
    used: list[str] = []
    for name in ("own", "widened"):
        way = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *given, name=name, way=way: used.append(name) or way(*given))
    monkeypatch.setattr(products, "ways", lambda: Ways(own=True, widened=True))
    return used


def test_the_way_goes_by_rows_and_numbers(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, wanted in (
        ((1,), ["own"]),
        ((1, 1), ["own"]),
        ((2,), []),
        ((7,), []),
        ((8,), ["widened"]),
        ((2, 5), ["widened"]),
        ((0,), []),
    ):
        used.clear()
        x, weight, _ = drawn(rows, 64, 96)
        assert torch.allclose(linear(x, weight).float(), F.linear(x, weight).float(), rtol=2**-7, atol=1e-3)
        assert used == wanted, rows
    used.clear()
    for dtype in (torch.float32, torch.float16):
        x, weight, bias = drawn((9,), 64, 96, dtype)
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    monkeypatch.setattr(products, "ways", lambda: Ways(own=False, widened=False))
    x, weight, bias = drawn((9,), 64, 96)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias)) and used == []


def test_onednn_is_used_again_after_a_product_without_it() -> None:
    assert torch._C._get_mkldnn_enabled()
    own(*drawn((1,), 64, 96))
    with pytest.raises(RuntimeError):
        own(torch.ones(1, 3, dtype=torch.bfloat16), torch.ones(4, 5, dtype=torch.bfloat16))
    assert torch._C._get_mkldnn_enabled()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_layers_and_experts_multiply_by_it(family: str, used: list[str]) -> None:
    """gpt_oss has biases, and stores its experts the other way round."""
    model, x = build(family, torch.bfloat16), torch.arange(12).unsqueeze(0)
    layer = expert_layers(model)[0]
    rows = torch.randn((9, layer.width), generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.inference_mode():
        before, expert = model(x).logits, run_expert(layer, 2, rows)
        assert used == ["widened"] * 2
        linears = [module for module in model.modules() if type(module) is nn.Linear]
        choose_products(model)
        used.clear()
        after = model(x).logits
    assert used.count("widened") >= len(linears) > 8
    assert (after.float() - before.float()).abs().max() <= 0.05 * before.float().abs().max()
    assert torch.isfinite(expert.float()).all()


def test_what_pays_is_measured_once() -> None:
    found = products.ways()
    assert found is products.ways() and isinstance(found, Ways)
    assert not products._pays(F.linear, 1, [torch.ones((256, 256), dtype=torch.bfloat16)])

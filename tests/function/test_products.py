"""Products that add up in torch's order: every number, at every size, and nothing beside the arrays."""

from __future__ import annotations

import numpy as np
import pytest

from remoe_cli.function import products
from remoe_cli.function.expert_ffn import Array, Expert, FfnSpec, Floats, narrow, rounded, widen
from remoe_cli.function.products import Order, are_needed, fits, multiply, order_for, orders

pytestmark = pytest.mark.skipif(not orders(), reason="this processor has none of the instructions that the library needs")


def _hard(rows: int, columns: int, seed: int) -> Array:
    """Make numbers of which half takes the other half nearly away in a product, so that it tells its order."""
    numbers = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    half = columns // 2
    numbers[:, half : 2 * half] = -numbers[:, :half] * 1.01 if seed % 2 else numbers[:, :half]
    return narrow(numbers, "bfloat16")


def _fused(sums: Floats, x: Floats, w: Floats) -> Floats:
    """Add products as one instruction does, which rounds once."""
    return (np.longdouble(x) * np.longdouble(w) + sums).astype(np.float32)


def _dots(x: Floats, w: Floats) -> Floats:
    """Add up in the order DOTS, as torch's bf16_dot_with_fp32_arith does: x [n, in], w [m, in]; returns [n, m]."""
    x, w = x[:, None], w[None]
    end = x.shape[-1] // 64 * 64
    sums = np.zeros((*np.broadcast_shapes(x.shape[:-1], w.shape[:-1]), 8, 8), dtype=np.float32)
    for k in range(0, end, 64):
        sums = _fused(sums, x[..., k : k + 64].reshape(*x.shape[:-1], 8, 8), w[..., k : k + 64].reshape(*w.shape[:-1], 8, 8))
    rest = np.zeros((*sums.shape[:2], 8), dtype=np.float32)
    for k in range(end, x.shape[-1], 8):
        rest = _fused(rest, x[..., k : k + 8], w[..., k : k + 8])
    for half in (4, 2, 1):
        sums = sums[..., :half, :] + sums[..., half : 2 * half, :]
    both = np.stack([sums[..., 0, :], rest])
    for half in (4, 2, 1):
        both = both[..., :half] + both[..., half : 2 * half]
    return np.asarray(both[0, ..., 0] + both[1, ..., 0])


def _blocks(x: Floats, w: Floats) -> Floats:
    """Add up in the order BLOCKS, as oneDNN's gemm for AVX-512 does."""
    x, w = x[:, None], w[None]
    columns = x.shape[-1]
    each = columns if columns <= 384 else (columns + 1) // 2 if columns < 1536 else 768
    total: Floats | None = None
    for start in range(0, columns, each):
        sums = np.zeros(np.broadcast_shapes(x.shape[:-1], w.shape[:-1]), dtype=np.float32)
        for k in range(start, min(start + each, columns), 2):
            for at in (k + 1, k):
                sums = _fused(sums, x[..., at], w[..., at])
        total = sums if total is None else total + sums
    assert total is not None
    return total


def _fours(x: Floats, w: Floats) -> Floats:
    """Add up in the order FOURS, as torch's gemm_notrans_ does."""
    sums = np.zeros((4, len(x), len(w)), dtype=np.float32)
    for k in range(x.shape[1]):
        sums[k % 4] = _fused(sums[k % 4], x[:, None, k], w[None, :, k])
    return np.asarray(((sums[0] + sums[1]) + sums[2]) + sums[3])


_ADDED = {Order.DOTS: _dots, Order.BLOCKS: _blocks, Order.FOURS: _fours}
_OUT = {Order.DOTS: 13, Order.BLOCKS: 13, Order.FOURS: 24}


def _multiply(order: Order, x: Array, w: Array, bias: Array | None = None) -> Array:
    """Multiply by w [out, in], which is stored as the order wants it."""
    w = np.ascontiguousarray(w.T).T if order is Order.FOURS else w
    y = np.full((len(x), len(w)), 0xDEAD, dtype=np.uint16)
    at = None if bias is None else bias.ctypes.data
    multiply(order, w.ctypes.data, at, x.ctypes.data, y.ctypes.data, (len(w), w.shape[1], len(x)))
    return y


@pytest.mark.parametrize("order", sorted(orders()))
@pytest.mark.parametrize("columns", [16, 64, 80, 384, 400, 576, 1552])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17, 33, 66])
def test_every_number_is_added_up_in_the_order(order: Order, columns: int, rows: int) -> None:
    x, w, bias = _hard(rows, columns, 2), _hard(_OUT[order], columns, 1), _hard(1, _OUT[order] // 2 * 2, 3)[0]
    bias = np.resize(bias, _OUT[order])
    sums = _ADDED[order](widen(x, "bfloat16"), widen(w, "bfloat16"))
    assert np.array_equal(_multiply(order, x, w), narrow(sums, "bfloat16"))
    assert np.array_equal(_multiply(order, x, w, bias), narrow(widen(bias, "bfloat16") + sums, "bfloat16"))


def test_the_orders_differ() -> None:
    """Or the test above would tell nothing."""
    x, w = (widen(_hard(64, 576, seed), "bfloat16") for seed in (2, 1))
    found = [narrow(added(x, w), "bfloat16").tobytes() for added in _ADDED.values()]
    assert len({*found, narrow(x @ w.T, "bfloat16").tobytes()}) == 4


@pytest.mark.parametrize("order", sorted(orders()))
def test_what_is_no_number_stays_so(order: Order) -> None:
    x, w = _hard(6, 64, 2), _hard(8, 64, 1)
    x[1, 5], x[2, 9], w[3, 1] = 0x7FC0, 0x7F80, 0xFF80  # NaN, infinity and minus infinity
    with np.errstate(invalid="ignore", over="ignore"):
        expected = _ADDED[order](widen(x, "bfloat16"), widen(w, "bfloat16"))
        found = widen(_multiply(order, x, w), "bfloat16")
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    assert np.isnan(found).any() and np.isinf(found).any()
    assert np.array_equal(np.isinf(found), np.isinf(expected))


@pytest.mark.parametrize("order", sorted(orders()))
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_only_the_product_is_written(order: Order, rows: int) -> None:
    out = _OUT[order]
    held = np.full(rows * out + 64, 0xBEEF, dtype=np.uint16)
    x, w = _hard(rows, 48, 2), _hard(out, 48, 1)
    stored = np.ascontiguousarray(w.T if order is Order.FOURS else w)
    multiply(order, stored.ctypes.data, None, x.ctypes.data, held[32:].ctypes.data, (out, 48, rows))
    assert (held[:32] == 0xBEEF).all() and (held[-32:] == 0xBEEF).all()
    assert np.array_equal(held[32:-32].reshape(rows, out), _multiply(order, x, w))


@pytest.mark.parametrize("sizes", [(0, 64, 1), (8, 0, 1), (8, 24, 1), (8, 64, 0), (8, 64, -1), (1 << 40, 64, 1)])
def test_sizes_that_there_is_no_product_for_are_refused(sizes: tuple[int, int, int]) -> None:
    x = _hard(8, 64, 2)
    with pytest.raises(ValueError, match="no product of"):
        multiply(Order.DOTS, x.ctypes.data, None, x.ctypes.data, x.ctypes.data, sizes)
    with pytest.raises(ValueError, match="in the order FOURS"):
        multiply(Order.FOURS, x.ctypes.data, None, x.ctypes.data, x.ctypes.data, (12, 64, 1))


def test_which_sizes_fit() -> None:
    assert [columns for columns in (0, 8, 16, 100, 576) if fits(9, columns)] == [16, 576]
    assert [out for out in (8, 9, 24) if fits(out, 64, transposed=True)] == [8, 24]


def test_the_order_is_torchs_for_one_thread() -> None:
    assert order_for(1) is Order.DOTS
    assert order_for(8) is (Order.BLOCKS if Order.BLOCKS in orders() else Order.DOTS)


def _tensors(transposed: bool) -> dict[str, Array]:
    up, down = _hard(64, 32, 1), _hard(32, 32, 3)
    return {"gate_up_proj": up.T if transposed else up, "down_proj": down.T if transposed else down}


@pytest.mark.parametrize("transposed", [False, True])
def test_an_expert_takes_these_products_where_they_are_needed(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = FfnSpec(dtype="bfloat16", gate="standard", transposed=transposed)
    asked: list[tuple[Order, int]] = []

    def counted(order: Order, *rest: object) -> None:
        asked.append((order, rest[4][2]))  # type: ignore[index]
        multiply(order, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("remoe_cli.function.expert_ffn.multiply", counted)
    monkeypatch.setattr("remoe_cli.function.expert_ffn.are_needed", lambda: True)
    ours = Expert.of(_tensors(transposed), spec)
    monkeypatch.setattr("remoe_cli.function.expert_ffn.are_needed", lambda: False)
    numkongs = Expert.of(_tensors(transposed), spec)
    assert ours.weights_bytes == (64 * 32 + 32 * 32) * 2
    for rows in (1, 6):
        x = _hard(rows, 32, 2)
        found, other = (widen(expert.run(x), "bfloat16") for expert in (ours, numkongs))
        assert np.allclose(found, other, rtol=0.05, atol=0.05 * float(np.abs(other).max()))
    assert asked == [(order_for(rows), rows) for rows in (1, 1, 6, 6)]
    assert ours.run(_hard(6, 32, 2)[:0]).shape == (0, 32)


def test_an_expert_without_such_a_size_has_numkongs_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remoe_cli.function.expert_ffn.are_needed", lambda: True)
    up, down = _hard(48, 24, 1), _hard(24, 24, 3)
    expert = Expert.of({"gate_up_proj": up, "down_proj": down}, FfnSpec(dtype="bfloat16", gate="standard"))
    assert rounded(widen(expert.run(_hard(2, 24, 2)), "bfloat16"), "bfloat16").shape == (2, 24)


def test_they_are_needed_only_without_instructions_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    class Has:
        @staticmethod
        def remoe_has_bfloat16() -> int:
            return 1

    assert are_needed() == (not products._library().remoe_has_bfloat16())
    monkeypatch.setattr(products, "_library", Has)
    assert not are_needed.__wrapped__()

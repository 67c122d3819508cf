"""Curves: each form is found again in its own data, the choice is by points left out, and a quota's waiting is that of a simulation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from remoe_cli.profile.curves import EXPONENTIAL, PHYSICAL, ROOFLINE, fit, fit_linear, quota
from remoe_cli.profile.latency_record import CpuQuota, Curve, Exponential, MeasuredPoint, Physical, Roofline

TOKENS, VCPUS = (1, 4, 16, 64, 256), (0.07, 0.2, 0.5, 1.0)
PERIOD_S = 0.02
FORMS = (EXPONENTIAL, PHYSICAL, ROOFLINE, quota(PERIOD_S))
TRUTHS: tuple[Curve, ...] = (
    Exponential(th1_s=0.01, th2=4.0, th3_s=0.001, per_token=0.05),
    Physical(overhead_s=1e-4, weights_s=3e-4, per_token_s=2e-5),
    Roofline(overhead_s=1e-4, weights_s=3e-4, per_token_s=2e-5, saturation_vcpus=0.5),
    CpuQuota(fixed_s=4e-4, per_token_s=1.4e-5, period_s=PERIOD_S),
)


def measured(
    curve: Curve, noise: float, seed: int = 0, tokens: Sequence[int] = TOKENS, vcpus: Sequence[float] = VCPUS
) -> tuple[MeasuredPoint, ...]:
    random = np.random.default_rng(seed)
    return tuple(
        MeasuredPoint(tokens=n, vcpus=v, seconds=float(curve.seconds(n, v) * np.exp(noise * random.standard_normal())))
        for n, v in itertools.product(tokens, vcpus)
    )


@pytest.mark.parametrize("truth", TRUTHS, ids=lambda curve: curve.form)
def test_each_form_wins_on_its_own_data_and_is_found_again(truth: Curve) -> None:
    timing = fit(measured(truth, noise=0.03), FORMS)
    assert timing.curve.form == truth.form
    assert timing.held_out_error is not None and timing.held_out_error < 0.06
    assert set(timing.errors) == {"exponential", "physical", "roofline", "quota"}
    assert timing.errors[truth.form] < 0.5 * min(e for form, e in timing.errors.items() if form != truth.form)
    found, true = timing.curve.model_dump(), truth.model_dump()
    for name in true.keys() - {"form"}:
        assert found[name] == pytest.approx(true[name], rel=0.15), name


def test_without_noise_every_parameter_comes_back() -> None:
    for truth, form in zip(TRUTHS, FORMS, strict=True):
        found, true = fit(measured(truth, noise=0.0), [form]).curve.model_dump(), truth.model_dump()
        assert [found[name] for name in sorted(true.keys() - {"form"})] == pytest.approx(
            [true[name] for name in sorted(true.keys() - {"form"})], rel=5e-3
        )


def test_residuals_and_points_are_kept() -> None:
    points = measured(TRUTHS[1], noise=0.1)
    timing = fit(points, FORMS)
    assert timing.points == points
    expected = [float(timing.seconds(p.tokens, p.vcpus)) / p.seconds - 1 for p in points]
    assert list(timing.residuals) == pytest.approx(expected) and max(map(abs, expected)) > 0.01


def test_the_choice_is_by_points_left_out_not_by_the_fit() -> None:
    """Few noisy points of a physical law: the exponential bends to each of them, and predicts the missing one worse."""
    points = measured(TRUTHS[1], noise=0.12, seed=23, tokens=(1, 64), vcpus=(0.2, 0.5, 1.0))
    alone = {form: fit(points, [form]) for form in (EXPONENTIAL, PHYSICAL)}
    squares = {form: float(np.square(timing.residuals).sum()) for form, timing in alone.items()}
    assert squares[EXPONENTIAL] < squares[PHYSICAL]
    assert fit(points, [EXPONENTIAL, PHYSICAL]).curve.form == "physical"


def test_the_held_out_error_is_that_of_leaving_each_point_out() -> None:
    points = measured(TRUTHS[1], noise=0.1, vcpus=(0.07, 0.5))
    missed = []
    for left_out in points:
        others = [p for p in points if p is not left_out]
        missed.append(abs(float(fit(others, [PHYSICAL]).seconds(left_out.tokens, left_out.vcpus)) / left_out.seconds - 1))
    timing = fit(points, [PHYSICAL])
    assert timing.held_out_error == pytest.approx(float(np.median(missed)))


def test_a_few_points_that_are_missed_by_far_count() -> None:
    """A form that is right in the median and wrong by ten times where a small share makes calls slow is not kept."""
    truth = CpuQuota(fixed_s=4e-4, per_token_s=1e-6, period_s=PERIOD_S)
    slow = MeasuredPoint(tokens=8192, vcpus=0.07, seconds=float(truth.seconds(8192, 0.07)))
    assert slow.seconds > 0.08
    points = (*measured(truth, noise=0.02), slow)
    assert fit(points, FORMS).curve.form == "quota"


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_negative_even_where_that_would_fit_better(form: object) -> None:
    falling = [MeasuredPoint(tokens=n, vcpus=v, seconds=1e-3 * v / n) for n in TOKENS for v in VCPUS]
    curve = fit(falling, [form]).curve  # type: ignore[list-item]
    assert min(value for name, value in curve.model_dump().items() if name != "form") >= 0
    assert np.isfinite(curve.seconds(np.array(TOKENS), 0.5)).all()


def test_the_same_points_give_the_same_bytes() -> None:
    points = measured(TRUTHS[0], noise=0.1)
    assert fit(points, FORMS).model_dump_json() == fit(points, FORMS).model_dump_json()


def test_one_share_alone_can_be_fitted() -> None:
    truth = CpuQuota(fixed_s=4e-4, per_token_s=1.4e-5, period_s=PERIOD_S)
    timing = fit(measured(truth, noise=0.02, vcpus=(1.0,)), FORMS)
    assert timing.held_out_error is not None and timing.held_out_error < 0.1
    assert fit(timing.points, [quota(PERIOD_S)]).seconds(512, 0.1) == pytest.approx(float(truth.seconds(512, 0.1)), rel=0.1)


def test_linear() -> None:
    line = fit_linear((16, 64, 192), [0.004 + 2e-4 * n for n in (16, 64, 192)])
    assert (line.fixed_s, line.per_token_s) == pytest.approx((0.004, 2e-4))
    assert fit_linear((16, 64, 192), [3.0, 2.0, 1.0]).per_token_s == 0.0
    assert fit_linear((16, 64), [1e-3, 1e-2]).fixed_s == 0.0


def simulated_s(work_s: float, share: float, phase: float) -> float:
    """Elapsed time of a call that starts at `phase` of a period with its quota whole."""
    now, left, quota_left = phase * PERIOD_S, work_s, share * PERIOD_S
    start, end_of_period = now, PERIOD_S
    while True:
        runs = min(left, quota_left, end_of_period - now)
        now, left, quota_left = now + runs, left - runs, quota_left - runs
        if left <= 1e-15:
            return now - start
        now, end_of_period, quota_left = end_of_period, end_of_period + PERIOD_S, share * PERIOD_S


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("work_s", [1e-4, 9e-4, 2.5e-3, 7e-3, 0.03, 0.1234])
def test_a_quotas_mean_wait_is_that_of_a_simulation(work_s: float, share: float) -> None:
    curve = CpuQuota(fixed_s=work_s, per_token_s=0.0, period_s=PERIOD_S)
    mean = np.mean([simulated_s(work_s, share, (i + 0.5) / 4000) for i in range(4000)])
    assert float(curve.seconds(1, share)) == pytest.approx(float(mean), rel=2e-3)


def test_under_a_quota_the_wait_depends_on_the_whole_call() -> None:
    curve = CpuQuota(fixed_s=1e-3, per_token_s=1e-5, period_s=PERIOD_S)
    one = float(curve.seconds(1, 0.1))
    assert one == pytest.approx(1.01e-3)  # not slowed: the quota is 2 ms
    together = float(curve.elapsed_s(8 * curve.work_s(1, 0.1), 0.1))
    assert together > 0.05 > 8 * one


@pytest.mark.parametrize("curve", TRUTHS, ids=lambda curve: curve.form)
def test_no_tokens_take_no_time_and_arguments_broadcast(curve: Curve) -> None:
    got = curve.seconds(np.array([0, 1, 100]), np.array([[0.1], [1.0]]))
    assert got.shape == (2, 3)
    assert (got[:, 0] == 0).all() and (got[:, 1:] > 0).all()
    assert (got[0] >= got[1]).all()

"""Calibration by answers: overheads come from the calls of serving, and the main process's own slowdown from what is left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from remoe_cli.errors import DeployError
from remoe_cli.plan.cost import evaluate
from remoe_cli.plan.problem import Placement
from remoe_cli.profile.record import read_profile
from remoe_cli.runtime.calibrate import with_answers
from tests.synthetic import invocation, plan_of, problem_of, synthetic_profile, tiny_catalog


def test_answers_give_overheads_and_the_main_processs_slowdown(tmp_path: Path) -> None:
    profile, catalog = synthetic_profile(tmp_path / "p", expert_mb=40), tiny_catalog()
    latency = profile.record.latency.model_copy(update={"invocation": invocation(1)})
    profile = replace(profile, record=profile.record.model_copy(update={"latency": latency}))
    plan = plan_of(profile, catalog, remote_share=0.5)
    calls = [[900, 0.010, 0.004, 0.001]] * 20 + [[90_000, 0.5, 0.4, 0.1]]  # 6 ms outside and 3 ms inside besides computing; one large
    answers = [{"calls": calls, "receipt": {"prompt_tokens": 40, "generated_tokens": 16, "ttft_s": 0.09, "tpot_s": 0.05}}] * 3
    made = with_answers(profile, tmp_path / "made", plan, catalog, answers)
    measured, serving = made.record.latency.invocation, made.record.latency.serving
    assert measured is not None and serving is not None and serving.answers == 3
    assert (measured.unbilled_s.mean, measured.billed_s.mean) == (pytest.approx(0.006), pytest.approx(0.003))
    assert measured.bytes_per_s == invocation(1).bytes_per_s
    problem = problem_of(read_profile(tmp_path / "made"), catalog, n_in=40, n_out=15)
    outcome = evaluate(problem, Placement(plan.main, plan.layers))
    assert (outcome.ttft_s, outcome.tpot_s) == (pytest.approx(0.09, rel=1e-5), pytest.approx(0.05, rel=1e-5))


def test_answers_of_one_token_tell_nothing(tmp_path: Path) -> None:
    profile, catalog = synthetic_profile(tmp_path / "p"), tiny_catalog()
    answer = {"calls": [], "receipt": {"prompt_tokens": 40, "generated_tokens": 1, "ttft_s": 0.1, "tpot_s": None}}
    with pytest.raises(DeployError, match="more than one token"):
        with_answers(profile, tmp_path / "made", plan_of(profile, catalog), catalog, [answer])

"""What quantised experts save, beside plans without them that keep the targets, cost too much, or are too slow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from remoe_cli.deploy.quantised import terms
from remoe_cli.model.spec import RemoteExperts
from remoe_cli.plan.document import Objective
from remoe_cli.profile.hardware import latency_from
from remoe_cli.profile.loss_record import QuantisationLoss
from remoe_cli.profile.record import Profile
from tests.support.synthetic import plan_of, synthetic_profile, tiny_catalog

CATALOG = tiny_catalog(memory_menu_mb=[128, 256, 512, 1024])


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    made = synthetic_profile(tmp_path_factory.mktemp("profile"), layers=2, experts=8, skew=3.0, expert_mb=95, main_vcpus=1)
    spec = made.record.spec.model_copy(update={"remote": RemoteExperts(form="int4", expert_bytes=27 << 20)})
    return replace(made, record=made.record.model_copy(update={"spec": spec, "latency": latency_from("lambda", spec)}))


def test_a_plan_says_which_loss_a_deployment_refuses(profile: Profile) -> None:
    def said(loss: QuantisationLoss | None) -> str:
        record = profile.record.model_copy(update={"loss": loss})
        return " ".join(plan_of(replace(profile, record=record), CATALOG).notes)

    figures = {"prompts": 1, "text_tokens": 9, "answer_tokens": 9, "unquantised_perplexity": 9.0, "perplexity": 9.0, "rise_error": 0.0}
    little, much = (QuantisationLoss(**figures, divergence_bits=bits, agreement=1.0) for bits in (0.001, 0.2))  # type: ignore[arg-type]
    assert "--accept-loss here: next tokens differ by 0.2 bits, and 0.01 is the most." in said(much)
    assert "--accept-loss here: nobody has measured what they lose." in said(None)
    assert "--accept-loss" not in said(little)


@pytest.mark.parametrize("objective", ["cost", "ttft"])
def test_a_budget_that_only_quantised_experts_keep_is_no_error(objective: Objective, profile: Profile) -> None:
    without = profile.as_stored()
    assert without is not None
    plan, cheapest = (plan_of(each, CATALOG, cold_share=0.2) for each in (profile, without))
    assert plan.cost_usd_per_request < cheapest.cost_usd_per_request
    budget = (plan.cost_usd_per_request + cheapest.cost_usd_per_request) / 2
    kept = plan_of(profile, CATALOG, cold_share=0.2, budget_usd=budget, objective=objective)
    found = terms((kept, profile, CATALOG))
    assert found is not None and found.as_stored_usd == pytest.approx(cheapest.cost_usd_per_request)
    assert "with experts as they are" in found.sentences[1]


def test_a_target_that_only_quantised_experts_keep(profile: Profile) -> None:
    without = profile.as_stored()
    assert without is not None
    plan, fastest = (plan_of(each, CATALOG, cold_share=0.2, objective="ttft") for each in (profile, without))
    assert plan.ttft_s < fastest.ttft_s
    kept = plan_of(profile, CATALOG, cold_share=0.2, ttft_s=(plan.ttft_s + fastest.ttft_s) / 2)
    found = terms((kept, profile, CATALOG))
    assert found is not None and found.as_stored_usd is None and "no plan without it" in found.sentences[1]

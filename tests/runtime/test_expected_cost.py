"""What is predicted for single requests is what the plan says of them together: in money too, however the main function is paid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from remoe_cli.artifacts import write_json
from remoe_cli.plan.catalog.catalog import catalog_text, read_catalog
from remoe_cli.plan.document import Lengths
from remoe_cli.plan.problem.sizes import sizes_of
from remoe_cli.plan.problem.traffic import Traffic
from remoe_cli.runtime.expected_cost import expected_cost
from tests.support.synthetic import plan_of, synthetic_profile

KINDS = (Lengths(share=0.75, n_in=20, n_out=10), Lengths(share=0.25, n_in=200, n_out=50))
LONGEST = sizes_of(((0.75, 20, 10), (0.2, 200, 50), (0.05, 260, 5)))


@pytest.mark.parametrize(
    ("menu", "per_hour", "accelerator"),
    [("lambda", None, 0.0), ("lambda", None, 5e-5), ("lambda", 40.0, 5e-5), ("ml", 40.0, 0.0)],
    ids=["Lambda", "accelerator", "accelerator with traffic", "rented"],
)
def test_the_mean_of_what_is_predicted_is_what_the_plan_costs(
    menu: str, per_hour: float | None, accelerator: float, tmp_path: Path
) -> None:
    """The requests of the plan by themselves, warm: accelerator memory is that of the longest one, rented hours are shared."""
    text = catalog_text("aws-us-east-1").replace("usd_per_accelerator_gb_second = 0.0", f"usd_per_accelerator_gb_second = {accelerator}")
    other = "ml." if menu == "lambda" else "lambda-"
    kept, before_main = [], True
    for line in text.splitlines():
        before_main &= line != "[reference]"
        kept += [] if before_main and f'name = "{other}' in line else [line]
    path = tmp_path / "catalog.toml"
    path.write_text("\n".join(kept))
    profile, catalog = synthetic_profile(tmp_path / "profile"), read_catalog(str(path))
    options: dict[str, Any] = {"remote_share": 0.5, "traffic": Traffic(KINDS, per_hour, requests=LONGEST), "cold_share": 0.0}
    plan = plan_of(profile, catalog, **options)
    assert plan.main.name.startswith(menu) and any(layer.remote for layer in plan.layers)
    write_json(tmp_path / "plan.json", plan)
    predict = expected_cost(tmp_path / "plan.json")
    found = [(kind.share, predict(kind.n_in, kind.n_out)) for kind in KINDS]
    assert sum(share * one.cost_usd_per_request for share, one in found) == pytest.approx(plan.cost_usd_per_request, rel=1e-9)
    assert sum(share * one.ttft_s for share, one in found) == pytest.approx(plan.ttft_s, rel=1e-9)
    shortest = predict(20, 0)  # an answer of one token
    assert 0 < shortest.cost_usd_per_request <= found[0][1].cost_usd_per_request
    assert (shortest.cost_usd_per_request < found[0][1].cost_usd_per_request) or menu == "ml"

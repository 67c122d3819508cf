"""Prints the table of "Quantised checkpoints" in docs/explanation/planning.md: a plan as it is stored beside those of a bfloat16 copy.

    python docs/measure/stored_plans.py plans/gpt-oss-20b-aws.json plans/deepseek-v3-aws-synthetic.json

The profiles have to be where the plans say (plans/examples.sh makes them). Of the copy there are the plan that the stored one states, which
the scan found, and the exact solver's. Seconds are processor time: of planning as it is stored, and of what each plan of the copy adds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from remoe_cli.plan.assess.unquantised import unquantised
from remoe_cli.plan.build import make_plan
from remoe_cli.plan.document import LayerPlan, Outcome
from remoe_cli.plan.problem.request import inputs_of, problem_of, request_of
from remoe_cli.plan.wording import bought, dollars
from remoe_cli.profile.hardware import dequantised_times

T = TypeVar("T")
COLUMNS = (
    *("plan", "form", "main function", "remote", "functions, MB in all", "a request", "TTFT", "TPOT", "cold start"),
    *("lower bound", "planned in, s"),
)


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def figures(spec: str, layers: Sequence[LayerPlan], outcome: Outcome, cold_s: float) -> tuple[str, ...]:
    memory_mb = sum(layer.memory_mb * len(layer.parts) * layer.replicas for layer in layers)
    remote = sum(len(layer.remote) for layer in layers)
    times = (f"{outcome.ttft_s:.1f} s", f"{outcome.tpot_s * 1e3:.0f} ms", f"{cold_s:.0f} s")
    return (spec, f"{remote:,}", f"{memory_mb:,}", dollars(outcome.cost_usd_per_request), *times)


def rows(path: Path) -> list[str]:
    """Plan one model in both forms."""
    plan, profile, catalog = inputs_of(path)
    request = replace(request_of(plan), examine=False)
    stored, stored_s = timed(lambda: make_plan(profile, catalog, request))
    copy, copy_s = timed(lambda: unquantised(problem_of(plan, profile, catalog), request.aim))
    spec = profile.record.spec
    record = profile.record.model_copy(
        update={"spec": spec.model_copy(update={"stored": None}), "latency": dequantised_times(profile.record.latency, spec)}
    )
    exact, exact_s = timed(lambda: make_plan(replace(profile, record=record), catalog, request))
    lines = []
    form = f"{spec.stored.format if spec.stored else spec.dtype}, {stored.model.expert_form}"
    for name, one, seconds in ((form, stored, stored_s), (f"{spec.dtype}, exact", exact, exact_s)):
        own = figures(bought(one.main.name, one.instances), one.layers, one.outcome, one.cold_start_s)
        lines.append(row((path.stem, name, *own, dollars(one.lower_bound_usd or 0.0), f"{seconds:.1f}")))
    if copy is not None:
        own = figures(bought(copy.spec, copy.instances), copy.layers, copy, copy.cold_start_s)
        lines.insert(1, row((path.stem, f"{spec.dtype}, scan (stated)", *own, "", f"{copy_s:.1f}")))
    return lines


def main() -> None:
    print(row(COLUMNS))
    print(row(["---"] * len(COLUMNS)))
    for path in sys.argv[1:]:
        print("\n".join(rows(Path(path))), flush=True)


if __name__ == "__main__":
    main()

"""Prints the table of docs/how-to/lower-the-bill.md: the demo model with experts of functions in 8 and 4 bits, what that loses and saves.

`make measure` runs it. The whole command is measured: `remoe profile --experts`, and the plans with and without, for a quarter of the
experts remote, at the prices of the local catalog.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Literal

from remoe_cli.demo_data import PROMPTS
from remoe_cli.deploy.quantised import terms
from remoe_cli.model.demo import demo_model
from remoe_cli.plan.build import make_plan
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.problem.request import PlanRequest
from remoe_cli.plan.wording import dollars
from remoe_cli.profile.prompts import read_prompts
from remoe_cli.profile.run import profile

FORMS: tuple[Literal["int8", "int4"], ...] = ("int8", "int4")
EVERY, SHARE = 20, 0.25


def main() -> None:
    print(f"{date.today()}\n")
    print("| model | experts of functions in | MB an expert | perplexity | divergence, bits | same greedy choice | a request | allowed |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    prompts, catalog = read_prompts(str(PROMPTS)), read_catalog("local")
    some = replace(prompts, texts=prompts.texts[::EVERY])
    for dtype in ("float32", "bfloat16"):
        for form in FORMS:
            with tempfile.TemporaryDirectory() as folder:
                made = profile(
                    str(demo_model(dtype)), some, Path(folder), max_new_tokens=8, max_prompt_tokens=128, batch_size=16, experts=form
                )
                found = terms((make_plan(made, catalog, PlanRequest(remote_share=SHARE)), made, catalog))
            assert found is not None and found.loss is not None and found.as_stored_usd is not None and made.record.spec.remote is not None
            loss, spec = found.loss, made.record.spec
            cells = (
                f"demo, {dtype}",
                form.upper(),
                f"{spec.expert_bytes / 1e6:.2f} -> {spec.fetched_expert_bytes / 1e6:.2f}",
                f"{loss.unquantised_perplexity:.2f} -> {loss.perplexity:.2f} ({loss.perplexity_rise:+.2%} ± {loss.rise_error:.2%})",
                f"{loss.divergence_bits:.4f}",
                f"{loss.agreement:.1%} of {loss.answer_tokens}",
                f"{dollars(found.as_stored_usd)} -> {dollars(found.cost_usd)}",
                loss.excess or "yes",
            )
            print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()

"""What experts on the GPU are worth: plans on rented GPU instances, with experts on the CPU and in functions only, and on the GPU too.

    python docs/measure/gpu_experts.py PROFILE [PROFILE ..]

Profiles are those of plans/examples.sh. The catalog is aws-us-east-1 without the main functions that are paid by use, with requests of
125 prompt + 201 output tokens, 20 an hour.
First the cheapest plan of each kind; then the fastest that costs no more than the cheapest without experts on
the GPU. All times are of descriptions.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from remoe_cli.plan.build import make_plan
from remoe_cli.plan.catalog.catalog import Catalog, read_catalog
from remoe_cli.plan.document import MainKind, Plan
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.request import PlanRequest
from remoe_cli.profile.record import Profile, read_profile

N_IN, N_OUT, PER_HOUR = 125, 200, 20.0
ROOM = 1 + 1e-3  # the gap of the cheapest plan is not to decide


def rented(catalog: Catalog) -> Catalog:
    menu = tuple(spec for spec in catalog.main.menu if spec.kind is MainKind.ALWAYS_ON)
    return catalog.model_copy(update={"main": catalog.main.model_copy(update={"menu": menu})})


def plan(profile: Profile, catalog: Catalog, aim: Aim, gpu_experts: bool) -> tuple[Plan, float]:
    """The plan, and the seconds of CPU that it took."""
    start = time.process_time()
    asked = PlanRequest(aim=aim, n_in=N_IN, n_out=N_OUT, requests_per_hour=PER_HOUR, cold_share=0.0, gpu_experts=gpu_experts, examine=False)
    return make_plan(profile, catalog, asked), time.process_time() - start


def row(name: str, wanted: str, gpu_experts: bool, made: Plan, seconds: float) -> str:
    gpu, remote = (sum(len(getattr(layer, side)) for layer in made.layers) for side in ("gpu", "remote"))
    cpu = made.model.experts_per_layer * len(made.layers) - gpu - remote
    tiers = "three tiers" if gpu_experts else "two tiers"
    main = f"{made.instances} x {made.main.name}" if made.instances > 1 else made.main.name
    figures = f"${made.cost_usd_per_request:.4f} | {made.ttft_s:.2f} s | {made.tpot_s * 1e3:.1f} ms"
    return (
        f"| {name} | {wanted} | {tiers} | {main} | {figures} | {gpu:,} / {cpu:,} / {remote:,} | {made.gap or 0.0:.2%} | {seconds:.1f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="+", type=Path)
    catalog = rented(read_catalog("aws-us-east-1"))
    print("| model | wanted | plan | main function | a request | TTFT | TPOT | experts on GPU / CPU / remote | gap | CPU time to plan |")
    print(f"|{' --- |' * 10}")
    for path in parser.parse_args().profiles:
        profile, aim = read_profile(path), Aim()
        name = Path(profile.record.model.path).name
        for wanted in ("least cost", "least TPOT for that"):
            made = {gpu_experts: plan(profile, catalog, aim, gpu_experts) for gpu_experts in (False, True)}
            for gpu_experts, found in made.items():
                print(row(name, wanted, gpu_experts, *found), flush=True)
            aim = Aim("tpot", budget_usd=made[False][0].cost_usd_per_request * ROOM)


if __name__ == "__main__":
    main()

"""How close the planner's predictions come to what the twin really takes and bills, on the demo model.

    python docs/measure/prediction.py [--profile DIR | --dtype float32] [--prompts N] [--new-tokens N]

Profiles the demo model (or takes a profile), calibrates it on a deployment with a quarter of the experts remote that answers other
prompts, then makes three plans (the cheapest, a quarter remote, half remote), deploys all, and asks yet other prompts, each of one
deployment after the other: the machine's speed drifts, and so all three meet the same.
Prints predicted / measured for every prompt, and exits with 1 when a plan's median is off by more than 25% in TPOT or 15% in cost.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from remoe_cli import artifacts
from remoe_cli.cli.demo import _prompts
from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.local import lifecycle
from remoe_cli.deploy.local.calibrate import calibrate
from remoe_cli.deploy.local.target import LocalTarget
from remoe_cli.deploy.target import DeployOptions
from remoe_cli.model.demo import demo_model
from remoe_cli.plan.build import make_plan
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.document import Plan
from remoe_cli.plan.problem.request import PlanRequest
from remoe_cli.profile.prompts import PromptSet
from remoe_cli.profile.record import Profile, read_profile
from remoe_cli.profile.run import profile
from remoe_cli.runtime.client import answer
from remoe_cli.runtime.expected_cost import expected_cost

PROFILED, CALIBRATED = 64, 16
HERE = LocalTarget(SILENT)
FIRST = "the cheapest plan"
SHARES = {FIRST: None, "a quarter remote": 0.25, "half remote": 0.5}
LIMITS = {"TPOT": 0.25, "cost": 0.15}
BUSY, WAIT_S = 0.5, 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", type=Path, help=f"profile of the demo model; without it one is made of {PROFILED} prompts")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the demo model that is profiled")
    parser.add_argument("--prompts", type=int, default=13, help="prompts to ask each deployment; the first is dropped")
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a deployment goes even when this is ended from outside
    texts = random.Random(0).sample(_prompts().texts, PROFILED + CALIBRATED + options.prompts)  # prompts of all kinds in each part
    with tempfile.TemporaryDirectory() as folder:
        made = read_profile(options.profile) if options.profile else _profile(options.dtype, texts[:PROFILED], Path(folder) / "profile")
        with _deployed(_plan(made, 0.25), Path(folder)) as name:
            made = calibrate(name, Path(folder) / "calibrated", texts[PROFILED : PROFILED + CALIBRATED], options.new_tokens, SILENT)
        _show_profile(made)
        plans = {what: _plan(made, share) for what, share in SHARES.items()}
        with ExitStack() as stack:
            names = {what: stack.enter_context(_deployed(plan, Path(folder))) for what, plan in plans.items()}
            receipts = _ask(names, texts[-options.prompts :], options.new_tokens)
    missed = [line for what, plan in plans.items() for line in _compare(what, plan, receipts[what])]
    print("\nmeasured, in the same minutes, relative to the cheapest plan (medians over prompts):")
    for what in plans:
        pairs = [(_measured(one), _measured(first)) for one, first in zip(receipts[what], receipts[FIRST], strict=True)]
        ratios = {name: statistics.median(one[name] / first[name] for one, first in pairs) for name in LIMITS}
        print(f"  {what}: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    for line in missed:
        print(f"MISSED: {line}")
    return 1 if missed else 0


def _profile(dtype: str, texts: tuple[str, ...], out: Path) -> Profile:
    _settle()
    prompts = PromptSet("demo", "prompt", texts)
    return profile(str(demo_model(dtype)), prompts, out, max_new_tokens=32, max_prompt_tokens=512, batch_size=16)


def _plan(made: Profile, share: float | None) -> Plan:
    return make_plan(made, read_catalog("local"), PlanRequest(remote_share=share))


@contextmanager
def _deployed(plan: Plan, folder: Path) -> Iterator[str]:
    """A deployment of the plan, which is gone afterwards whatever happens."""
    name = f"prediction-{os.getpid()}-{len(list(folder.glob('plan-*.json')))}"
    path = folder / f"plan-{name}.json"
    artifacts.write_json(path, plan)
    HERE.deploy(path, name, DeployOptions())
    try:
        _settle()
        yield name
    finally:
        lifecycle.destroy(name)


def _settle() -> None:
    """Give a busy machine a minute to become quiet, for nothing can be predicted of one that others use."""
    give_up = time.monotonic() + WAIT_S
    while os.getloadavg()[0] > BUSY * (os.cpu_count() or 1) and time.monotonic() < give_up:
        time.sleep(1)


def _ask(names: dict[str, str], prompts: tuple[str, ...], new_tokens: int) -> dict[str, list[dict[str, Any]]]:
    """Receipts of each deployment for all prompts but the first, which warms what no other start-up warms."""
    reached = {what: (HERE.main_address(name), expected_cost(HERE.deployed_plan(name))) for what, name in names.items()}
    receipts: dict[str, list[dict[str, Any]]] = {what: [] for what in names}
    for prompt in prompts:
        for what, (endpoint, predict) in reached.items():
            receipts[what].append(answer(endpoint, prompt, new_tokens, lambda text: None, expected=predict)["receipt"])
    return {what: some[1:] for what, some in receipts.items()}


def _compare(what: str, plan: Plan, receipts: list[dict[str, Any]]) -> list[str]:
    """Print a table; returns what was missed."""
    used = sorted({layer.memory_mb for layer in plan.layers if layer.remote})
    print(f"\n{what}: {sum(len(layer.remote) for layer in plan.layers)} experts in functions of {used} MB, main {plan.main.memory_mb} MB")
    print(f"load of the machine {os.getloadavg()[0]:.1f}; predicted / measured, times in ms, $ per million requests")
    print(f"{'tokens':>9}{'TTFT':>22}{'TPOT':>22}{'cost':>24}{'of it functions':>17}{'calls':>7}{'cold':>6}")
    ratios: dict[str, list[float]] = {"TTFT": [], "TPOT": [], "cost": []}
    for receipt in receipts:
        predicted = receipt["predicted"]
        predicted = {"TTFT": predicted["ttft_s"] * 1e3, "TPOT": predicted["tpot_s"] * 1e3, "cost": predicted["cost_usd_per_request"] * 1e6}
        pairs = {name: (predicted[name], measured) for name, measured in _measured(receipt).items()}
        for name, (predicted, measured) in pairs.items():
            ratios[name].append(predicted / measured)
        cells = "".join(f"{f'{p:.1f} / {m:.1f} {p / m:.2f}':>{24 if n == 'cost' else 22}}" for n, (p, m) in pairs.items())
        tokens = f"{receipt['prompt_tokens']}+{receipt['generated_tokens']}"
        functions = receipt["cost"]["functions_usd"] * 1e6
        print(f"{tokens:>9}{cells}{functions:>17.1f}{receipt['invocations']:>7}{receipt['cold_starts']:>6}")
    missed = []
    for name, values in ratios.items():
        median, worst = statistics.median(values), max(values, key=lambda ratio: abs(ratio - 1))
        print(f"{name}: median {median:.3f}, worst {worst:.3f}")
        if name in LIMITS and not abs(median - 1) <= LIMITS[name]:
            missed.append(f"{what}: {name} predicted / measured {median:.3f}, allowed 1 +- {LIMITS[name]}")
    return missed


def _measured(receipt: dict[str, Any]) -> dict[str, float]:
    """Times in ms, USD per million such requests."""
    tpot_s = receipt["tpot_s"] or float("nan")
    return {"TTFT": receipt["ttft_s"] * 1e3, "TPOT": tpot_s * 1e3, "cost": receipt["cost"]["total_usd"] * 1e6}


def _show_profile(made: Profile) -> None:
    latency = made.record.latency
    print(f"{date.today()}, {latency.machine}, {latency.main_vcpus:g} threads; load {os.getloadavg()[0]:.1f}")
    for name, timing in (("local", latency.local_expert), ("remote", latency.remote_expert)):
        error = "described" if timing.held_out_error is None else f"held-out error {timing.held_out_error:.1%}"
        print(f"{name} expert: {timing.curve.form}, {error}; one token {float(timing.seconds(1, 1)) * 1e3:.3f} ms at 1 vCPU")
    prefill_ms = float(latency.nonexpert_prefill.seconds(64)) * 1e3
    print(f"non-expert: {latency.nonexpert_decode_s * 1e3:.1f} ms a token, 64 prompt tokens {prefill_ms:.1f} ms")
    if latency.invocation and latency.cold_start:
        for name, spread in (("not billed", latency.invocation.unbilled_s), ("billed", latency.invocation.billed_s)):
            figures = ", ".join(f"{q} {getattr(spread, q) * 1e3:.2f}" for q in ("p50", "p90", "p99", "mean"))
            print(f"warm invocation, {name}: {figures} ms ({len(latency.invocation.samples)} calls)")
        print(f"payload: {latency.invocation.bytes_per_s / 1e6:.0f} MB/s")
        split = latency.cold_start.model_dump()
        starts = split.pop("starts")
        print(
            f"cold start ({starts}): " + ", ".join(f"{name.removesuffix('_s')} {value * 1e3:.1f}" for name, value in split.items()) + " ms"
        )


if __name__ == "__main__":
    sys.exit(main())

"""How close predictions come to what the twin takes and bills on another day, on the demo model.

    python docs/measure/prediction.py [--apart-min 60] [--prompts 50] [--shares 0,0.25,0.5,1] [--rtts 0,5,15] [--folder DIR]

First everything that is known beforehand: a profile of other prompts, and for each round-trip time one calibrated on a deployment of a
quarter of the experts. After a wait come the answers: for each round-trip time all placements are deployed, and each prompt is asked of one
after the other, as the machine's speed drifts and all shall meet the same.

Each answer has three predictions, which know more and more of its routing:
    plan      that all requests use experts as those of the profile do
    prompt    what `remoe plan --data` predicts for the words of this prompt
    routing   which experts its tokens do use (the prompts are profiled as well; answers are greedy, so their tokens are the same)
The last one is what the model of time and money is worth. What the first two miss in addition comes from not knowing the answer's routing.

Prints a table, draws docs/images/prediction-measured.png, and exits with 1 when a limit is missed that is held against `routing`.
With --folder what is known beforehand is kept there, and used again by the next run.
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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from remoe_cli import artifacts, openmp

openmp.wait_briefly(os.environ)  # before torch is imported, as the command line does

from remoe_cli.cli.demo import _prompts  # noqa: E402
from remoe_cli.deploy.console import SILENT  # noqa: E402
from remoe_cli.deploy.local import lifecycle  # noqa: E402
from remoe_cli.deploy.local.calibrate import calibrate  # noqa: E402
from remoe_cli.deploy.local.target import LocalTarget  # noqa: E402
from remoe_cli.deploy.target import DeployOptions  # noqa: E402
from remoe_cli.model.demo import demo_model  # noqa: E402
from remoe_cli.plan.asked import PredictedRouting  # noqa: E402
from remoe_cli.plan.build import make_plan  # noqa: E402
from remoe_cli.plan.catalog.catalog import read_catalog  # noqa: E402
from remoe_cli.plan.document import Plan  # noqa: E402
from remoe_cli.plan.problem.predicted import predict_routing  # noqa: E402
from remoe_cli.plan.problem.request import PlanRequest  # noqa: E402
from remoe_cli.profile.prompts import PromptSet  # noqa: E402
from remoe_cli.profile.record import Profile, read_profile  # noqa: E402
from remoe_cli.profile.run import profile  # noqa: E402
from remoe_cli.report import style  # noqa: E402
from remoe_cli.runtime.client import answer  # noqa: E402
from remoe_cli.runtime.expected_cost import cost_model  # noqa: E402

PROFILED, CALIBRATED = 64, 16
HERE = LocalTarget(SILENT)
CATALOG = read_catalog("local")
KNOWN = ("plan", "prompt", "routing")
LIMITS = {"TTFT": (0.15, 0.30), "TPOT": (0.10, 0.20), "cost": (0.10, 0.20)}  # of |predicted / measured - 1|: median, 90th percentile
QUIET, WAIT_S = 0.9, 60.0
PICTURE = Path(__file__).parents[1] / "images" / "prediction-measured.png"


@dataclass(frozen=True)
class Asked:
    """One answer: its placement, what was measured, and what is predicted by what is known. Values are TTFT, TPOT in s, cost in USD."""

    share: float
    rtt_ms: float
    measured: dict[str, float]
    predicted: dict[str, dict[str, float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--apart-min", type=float, default=60, help="minutes between the last of what is known and the first answer")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--shares", type=_numbers, default=(0.0, 0.25, 0.5, 1.0), help="of the experts in functions")
    parser.add_argument("--rtts", type=_numbers, default=(0.0, 5.0, 15.0), help="in ms")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a deployment goes even when this is ended from outside
    texts = tuple(random.Random(0).sample(_prompts().texts, PROFILED + CALIBRATED + options.prompts))  # prompts of all kinds in each part
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        beforehand = {rtt: _calibrated(folder, rtt, options.dtype, texts[: PROFILED + CALIBRATED]) for rtt in options.rtts}
        asked = _profile(folder / "asked", options.dtype, texts[-options.prompts :], options.new_tokens)
        _show(beforehand)
        _wait(folder, options.apart_min)
        answers = [one for rtt in options.rtts for one in _ask(folder, beforehand[rtt], asked, rtt, options, texts[-options.prompts :])]
    missed = _table(answers)
    _draw(answers)
    return missed


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


# What is known beforehand


def _profile(out: Path, dtype: str, texts: tuple[str, ...], new_tokens: int) -> Profile:
    if (out / "profile.json").is_file():
        return read_profile(out)
    _settle()
    prompts = PromptSet("demo", "prompt", texts)
    return profile(str(demo_model(dtype)), prompts, out, max_new_tokens=new_tokens, max_prompt_tokens=512, batch_size=16)


def _calibrated(folder: Path, rtt_ms: float, dtype: str, texts: tuple[str, ...]) -> Profile:
    """Return the profile with the calls of a deployment of a quarter of the experts at this round-trip time."""
    out = folder / f"calibrated-{rtt_ms:g}"
    if (out / "profile.json").is_file():
        return read_profile(out)
    made = _profile(folder / "profile", dtype, texts[:PROFILED], 32)
    with _deployed(_plan(made, 0.25), folder, rtt_ms) as name:
        _settle()
        return calibrate(name, out, texts[PROFILED:], 32, SILENT)


def _show(beforehand: dict[float, Profile]) -> None:
    for rtt_ms, made in beforehand.items():
        latency = made.record.latency
        assert latency.invocation is not None and latency.nonexpert_layers is not None
        prefill_s, at = float(latency.nonexpert_prefill.seconds(64)), latency.measured_on
        print(f"{at}, {latency.machine}, {latency.main_vcpus:g} threads; non-expert {latency.nonexpert_decode_s * 1e3:.1f} ms a token,")
        local, remote = (float(timing.seconds(1, 1)) * 1e3 for timing in (latency.local_expert, latency.remote_expert))
        print(f"  64 prompt tokens {prefill_s * 1e3:.1f} ms; an expert {local:.3f} ms here, {remote:.3f} ms in a function;")
        unbilled_s, billed_s = latency.invocation.unbilled_s, latency.invocation.billed_s
        print(
            f"  a call at {rtt_ms:g} ms round trip {unbilled_s.mean * 1e3:.2f} ms outside and {billed_s.mean * 1e3:.2f} ms inside", end=""
        )
        print(f" the function, {latency.invocation.bytes_per_s / 1e6:.0f} MB/s", flush=True)


def _wait(folder: Path, minutes: float) -> None:
    """Wait until the profiles are old enough."""
    newest = max(path.stat().st_mtime for path in folder.glob("*/profile.json"))
    until = newest + 60 * minutes
    print(f"answers from {datetime.fromtimestamp(max(until, time.time()), UTC):%Y-%m-%d %H:%M} UTC", flush=True)
    while (left := until - time.time()) > 0:
        time.sleep(min(left, 5))


# Answers


def _plan(made: Profile, share: float) -> Plan:
    return make_plan(made, CATALOG, PlanRequest(remote_share=share, examine=False))


def _ask(folder: Path, made: Profile, asked: Profile, rtt_ms: float, options: argparse.Namespace, texts: Sequence[str]) -> list[Asked]:
    # Without calls the round-trip time makes no difference, so that placement is asked once.
    plans = {share: _plan(made, share) for share in options.shares if share or rtt_ms == options.rtts[0]}
    now = replace(asked, record=asked.record.model_copy(update={"latency": made.record.latency}))
    answers = []
    with ExitStack() as stack:
        names = {share: stack.enter_context(_deployed(plan, folder, rtt_ms)) for share, plan in plans.items()}
        for name in names.values():
            answer(HERE.main_address(name), texts[0], options.new_tokens, lambda text: None)  # warms what no start-up warms
        _settle()
        for number, text in enumerate(texts):
            prompt = predict_routing(made, PromptSet("prompt", "prompt", (text,)))
            itself = prompt.model_copy(update={"recorded": (number,), "weights": (1,)})
            receipts = {
                share: answer(HERE.main_address(name), text, options.new_tokens, lambda text: None)["receipt"]
                for share, name in names.items()
            }
            for share, receipt in receipts.items():
                if receipt["tpot_s"] is None or receipt["cold_starts"]:
                    continue
                known: dict[str, tuple[Profile, PredictedRouting | None]] = {
                    "plan": (made, None),
                    "prompt": (made, prompt),
                    "routing": (now, itself),
                }
                predicted = {what: _predicted(plans[share], *by, receipt) for what, by in known.items()}
                answers.append(Asked(share, rtt_ms, _measured(receipt), predicted))
                print(
                    f"{share:g} {rtt_ms:g} {receipt['prompt_tokens']}+{receipt['generated_tokens']} {receipt['invocations']}",
                    answers[-1],
                    flush=True,
                    file=sys.stderr,
                )
    return answers


def _predicted(plan: Plan, made: Profile, routing: PredictedRouting | None, receipt: dict[str, Any]) -> dict[str, float]:
    plan = plan.model_copy(update={"workload": plan.workload.model_copy(update={"routing": routing})})
    outcome = cost_model(plan, made, CATALOG)(receipt["prompt_tokens"], receipt["generated_tokens"] - 1)
    return {"TTFT": outcome.ttft_s, "TPOT": outcome.tpot_s, "cost": outcome.cost_usd_per_request}


def _measured(receipt: dict[str, Any]) -> dict[str, float]:
    return {"TTFT": receipt["ttft_s"], "TPOT": receipt["tpot_s"], "cost": receipt["cost"]["total_usd"]}


@contextmanager
def _deployed(plan: Plan, folder: Path, rtt_ms: float) -> Iterator[str]:
    """A deployment of the plan, which is gone afterwards whatever happens."""
    name = f"prediction-{os.getpid()}-{len(list(folder.glob(f'plan-prediction-{os.getpid()}-*.json')))}"
    path = folder / f"plan-{name}.json"
    artifacts.write_json(path, plan)
    HERE.deploy(path, name, DeployOptions(rtt_ms=rtt_ms))
    try:
        yield name
    finally:
        lifecycle.destroy(name)


def _settle() -> None:
    """Give a busy machine a minute to become quiet, for nothing can be predicted of one that others use."""
    give_up = time.monotonic() + WAIT_S
    while time.monotonic() < give_up:
        before = os.times().elapsed, _idle_s()
        time.sleep(2)
        if (_idle_s() - before[1]) / (os.times().elapsed - before[0]) > QUIET * (os.cpu_count() or 1):
            return


def _idle_s() -> float:
    """Return the seconds that all cores together have been idle."""
    return float(Path("/proc/uptime").read_text().split()[1])


# What comes of it


def _ratios(answers: Sequence[Asked], name: str, known: str) -> list[float]:
    return [one.predicted[known][name] / one.measured[name] for one in answers]


def _errors(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the median and the 90th percentile of |ratio - 1|."""
    errors = np.abs(np.array(ratios) - 1)
    return float(np.median(errors)), float(np.quantile(errors, 0.9))


def _table(answers: Sequence[Asked]) -> int:
    places = sorted({(one.share, one.rtt_ms) for one in answers})
    print(
        f"\n{len(answers)} answers, load {os.getloadavg()[0]:.1f}; median of predicted / measured; median and 90th percentile of the error"
    )
    print(f"{'remote':>7}{'trip':>6}{'knows':>9}" + "".join(f"{name:>24}" for name in LIMITS) + f"{'measured':>30}")
    missed = []
    groups = {(f"{share:.0%}", f"{rtt:g}"): [one for one in answers if (one.share, one.rtt_ms) == (share, rtt)] for share, rtt in places}
    for (share, rtt), some in (groups | {("all", ""): list(answers)}).items():
        medians = {name: statistics.median(one.measured[name] for one in some) for name in LIMITS}
        seen = f"{medians['TTFT'] * 1e3:.0f} ms, {medians['TPOT'] * 1e3:.0f} ms, ${medians['cost'] * 1e6:.0f}/M"
        for known in KNOWN:
            cells = ""
            for name, limits in LIMITS.items():
                ratios = _ratios(some, name, known)
                errors = _errors(ratios)
                cells += f"{f'{statistics.median(ratios):.2f}  {errors[0]:.0%} {errors[1]:.0%}':>24}"
                if known == KNOWN[-1] and any(error > limit for error, limit in zip(errors, limits, strict=True)):
                    missed.append(f"{share} remote{rtt and f' at {rtt} ms'}: {name} off by {errors[0]:.0%} and {errors[1]:.0%}")
            print(f"{share:>7}{rtt:>6}{known:>9}{cells}{seen if known == KNOWN[0] else '':>30}")
    for line in missed:
        print(f"MISSED: {line}")
    return 1 if missed else 0


def _draw(answers: Sequence[Asked]) -> None:
    from matplotlib.figure import Figure

    shares = sorted({one.share for one in answers})
    with style.pictures():
        figure = Figure(figsize=(10, 6.8), layout="constrained")
        axes = figure.subplots(2, 3)
        for row, known in enumerate((KNOWN[1], KNOWN[2])):
            for column, (name, unit, factor) in enumerate((("TTFT", "ms", 1e3), ("TPOT", "ms", 1e3), ("cost", "USD a million", 1e6))):
                panel = axes[row][column]
                for place, (share, marker) in enumerate(zip(shares, style.markers(len(shares)), strict=True)):
                    some = [one for one in answers if one.share == share]
                    measured, predicted = (
                        [of[name] * factor for of in each] for each in ([a.measured for a in some], [a.predicted[known] for a in some])
                    )
                    (points,) = panel.plot(predicted, measured, style.matplotlib_marker(marker), label=f"{share:.0%} remote", markersize=4)
                    points.set(color=style.ramp()((place + 2) / (len(shares) + 2)), alpha=0.6, markeredgewidth=0)
                every = [value * factor for a in answers for value in (a.measured[name], a.predicted[known][name])]
                ends = np.array([min(every) * 0.9, max(every) * 1.1])
                panel.plot(ends, ends, color=style.light("soft"), linewidth=0.8, linestyle="--")
                panel.fill_between(ends, ends * 0.8, ends * 1.2, color=style.light("other"), alpha=0.15, linewidth=0)
                style.log_axes(panel)
                panel.set(xlim=tuple(ends), ylim=tuple(ends), xlabel=f"predicted {name}, {unit}", ylabel="measured")
                panel.set_title(f"{name}, knowing the {known}")
                panel.grid()
        figure.legend(*axes[0][0].get_legend_handles_labels(), ncols=len(shares), loc="outside lower center")
        figure.suptitle("Each point is an answer of the twin; the band is 20% to either side")
        figure.savefig(PICTURE, dpi=130)
    print(f"\n{PICTURE}")


if __name__ == "__main__":
    sys.exit(main())

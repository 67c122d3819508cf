"""What it gains to plan for the prompts at hand instead of the profile's mean routing: plans for held-out prompts, priced with their own.

    python docs/measure/predicted_plans.py PROFILE [--prompts FILE] [--sets N]

One prompt in five is held out; FILE has the texts of the profile's prompts, in order. Plans are made of the others only: of their mean
routing, of what the paper's predictor and the profile's best one predict (as `remoe plan --data` does), and of the best one's
frequencies with experts drawn independently of each other. Each is then priced with what the held-out prompts really used, and so is
the plan that knew it. Without FILE only the last is compared with the mean. Sets are single prompts, and ten that are alike.

A profile with described times is planned on the paper catalog with 8 vCPUs for the main function: by scan at 1 ms a call without targets,
and by scan and the paper's solver at 5 ms with TTFT at most MIX's and TPOT at most 1.5 times. A profile with measured times is planned
on the local catalog with half of the experts forced out.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from paper_results import N_IN, N_OUT, _changed

from remoe_cli.model.vectors import Bags
from remoe_cli.plan.assess.baselines import baselines
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.choose import solve_or_diagnose
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.document import PredictedRouting, Source
from remoe_cli.plan.paper.heuristic import paper_plan
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.predicted import predict_routing
from remoe_cli.plan.problem.problem import Placement, Problem
from remoe_cli.plan.problem.request import PlanRequest, make_problem
from remoe_cli.plan.problem.workload import patterns_of
from remoe_cli.plan.solve.exact import Solution
from remoe_cli.plan.solve.forced import forced_sets
from remoe_cli.plan.solve.scan import scan
from remoe_cli.predict.evaluate import folds
from remoe_cli.predict.history import Floats, Indices, features_from, features_of, histories
from remoe_cli.predict.train import train, trained
from remoe_cli.profile.prompts import PromptSet, read_prompts
from remoe_cli.profile.record import AXES, WITH_TEXTS, Profile, read_profile, write_profile

ALIKE = 10
DRAWN = 2000
VCPUS = 8.0


@dataclass(frozen=True)
class Priced:
    """A plan's cost and TPOT with the set's own routing, relative to the mean plan's, what it stated, and whether it keeps targets."""

    cost: float
    tpot: float
    stated: float
    keeps: bool
    remote: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", type=Path)
    parser.add_argument("--prompts")
    parser.add_argument("--sets", type=int, default=24, help="of single prompts; a third as many of ten alike")
    options = parser.parse_args()
    profile = read_profile(options.profile)
    texts = read_prompts(options.prompts).texts if options.prompts else None
    fold = folds(len(profile.arrays["prompt_tokens"]), 5)[0]
    fold = fold[np.isin(fold, profile.arrays["trace_prompt"])]
    with tempfile.TemporaryDirectory() as folder:
        known = _only(profile, np.setdiff1d(np.arange(len(profile.arrays["prompt_tokens"])), fold), Path(folder))
        if texts:
            train(known)
        sets = {"one prompt": [fold[i : i + 1] for i in range(options.sets)]}
        if texts:
            sets["ten alike"] = [_alike(profile, fold, seed) for seed in fold[: options.sets // 3]]
        mean = _problem(known, None)
        for what, members in sets.items():
            planned = [
                {"mean routing": mean} | (_predicted(known, tuple(texts[i] for i in of)) if texts else {}) | {"own routing": truth}
                for of, truth in ((of, _problem(profile, _of(of))) for of in members)
            ]
            for case in CASES[profile.record.latency.source]:
                _table(f"{profile.record.model.path.rsplit('/')[-1]}, {case.name}: plans for {what}", planned, case)


def _problem(profile: Profile, routing: PredictedRouting | None) -> Problem:
    if profile.record.latency.source == "measured":
        return make_problem(profile, read_catalog("local"), PlanRequest(routing=routing))
    return make_problem(profile, read_catalog("paper"), PlanRequest(n_in=N_IN, n_out=N_OUT, routing=routing))


def _half_forced(problem: Problem, aim: Aim) -> Solution:
    return solve_or_diagnose(problem, forced_sets(problem, 0.5), aim, 60, None)


@dataclass(frozen=True)
class Case:
    """With `t_rem_s`, on hardware of that overhead of a call; with `targets`, those of the paper's figures."""

    name: str
    solver: Callable[[Problem, Aim], Solution | None]
    t_rem_s: float | None = None
    targets: bool = False

    def of(self, problem: Problem) -> Problem:
        return problem if self.t_rem_s is None else _changed(problem, self.t_rem_s, VCPUS)

    def aim(self, problem: Problem) -> Aim:
        mix = baselines(problem, Aim()).priced["mix"]
        return Aim(ttft_s=mix.ttft_s, tpot_s=1.5 * mix.tpot_s) if self.targets else Aim()


CASES = {
    "measured": (Case("half of the experts forced out", _half_forced),),
    "described": (
        Case("scan, 1 ms", scan, 0.001),
        Case("scan, 5 ms, targets", scan, 0.005, True),
        Case("paper's solver, 5 ms, targets", paper_plan, 0.005, True),
    ),
}


def _table(title: str, planned: list[dict[str, Problem]], case: Case) -> None:
    mean = case.of(planned[0]["mean routing"])
    aim = case.aim(mean)
    static = case.solver(mean, aim)
    found: dict[str, list[Priced | None]] = {}
    for problems in planned:
        truth = case.of(problems["own routing"])
        for way, problem in problems.items():
            plan = static if way == "mean routing" else case.solver(case.of(problem), aim)
            found.setdefault(way, []).append(_priced(case.of(problem), truth, plan, aim))
    print(f"\n### {title} ({len(planned)})\n")
    print("| planned with | cost | TPOT | experts remote | cost it states, off by | keeps the targets | no plan |")
    print("|" + " --- |" * 7)
    base = found["mean routing"]
    for way, each in found.items():
        pairs = [(one, other) for one, other in zip(each, base, strict=True) if one and other]
        if not pairs:
            print(f"| {way} | | | | | | {len(each)} |")
            continue
        ratios = np.array([one.cost / other.cost for one, other in pairs])
        error = f" ± {ratios.std(ddof=1) / len(ratios) ** 0.5:.3f}" if way != "mean routing" else ""
        tpot = np.mean([one.tpot / other.tpot for one, other in pairs])
        off = np.mean([abs(one.stated / one.cost - 1) for one, _ in pairs])
        remote, keeps = np.mean([one.remote for one, _ in pairs]), np.mean([one.keeps for one, _ in pairs])
        print(f"| {way} | {ratios.mean():.3f}{error} | {tpot:.3f} | {remote:.0f} | {off:.1%} | {keeps:.0%} | {len(each) - len(pairs)} |")


def _priced(problem: Problem, truth: Problem, plan: Solution | None, aim: Aim) -> Priced | None:
    if plan is None:
        return None
    placement = Placement(plan.main.spec, plan.layers, plan.main.instances)
    stated, real = evaluate(problem, placement), evaluate(truth, placement)
    keeps = (aim.ttft_s is None or real.ttft_s <= aim.ttft_s * 1.001) and (aim.tpot_s is None or real.tpot_s <= aim.tpot_s * 1.001)
    remote = sum(len(layer.remote) for layer in plan.layers)
    return Priced(real.cost_usd_per_request, real.tpot_s, stated.cost_usd_per_request, keeps, remote)


def _predicted(known: Profile, texts: tuple[str, ...]) -> dict[str, Problem]:
    prompts = PromptSet("held out", "prompt", texts)
    best = predict_routing(known, prompts)
    paper = predict_routing(known, prompts, "paper")
    prepared = features_of(known)
    history = histories(known, prepared)["request"]
    settings = known.record.settings
    features = features_from(prepared.table, texts, settings.max_prompt_tokens if settings else None)
    frequencies = trained(known, history).predict(features).mean(axis=0)
    return {
        f"{paper.predictor} (the paper's)": _problem(known, paper),
        f"{best.predictor}": _problem(known, best),
        f"{best.predictor}, independent draws": _independent(_problem(known, None), frequencies),
    }


def _independent(problem: Problem, frequencies: Floats) -> Problem:
    """Tokens that choose their experts by these frequencies alone."""
    top_k, random = problem.spec.top_k, np.random.default_rng(0)
    draws = np.log(frequencies) + random.gumbel(size=(DRAWN, *frequencies.shape))
    trace = np.argsort(-draws, axis=2)[:, :, :top_k]
    patterns = patterns_of(trace, frequencies.shape[1])
    return replace(problem, workload=replace(problem.workload, use=frequencies * top_k, trace=trace, patterns=patterns))


def _of(members: Indices) -> PredictedRouting:
    """The routing of recorded prompts themselves."""
    members = np.sort(members)
    return PredictedRouting(
        prompts=Source(path="", sha256=""),
        count=len(members),
        predictor="none",
        validation_bits=None,
        mixture_bits=0.0,
        recorded=tuple(members.tolist()),
        weights=(1,) * len(members),
    )


def _alike(profile: Profile, fold: Indices, seed: int) -> Indices:
    vectors = profile.arrays["prompt_vectors"]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return fold[np.argsort(-(unit[fold] @ unit[seed]), kind="stable")[:ALIKE]]


def _only(profile: Profile, prompts: Indices, folder: Path) -> Profile:
    """A profile of some of the prompts."""
    arrays = dict(profile.arrays)
    traced = np.isin(arrays["trace_prompt"], prompts)
    for name, axes in AXES.items():
        arrays[name] = arrays[name][prompts if axes[0] == "P" else traced]
    arrays["trace_prompt"] = np.searchsorted(prompts, arrays["trace_prompt"]).astype(np.int32)
    if WITH_TEXTS.keys() <= arrays.keys():
        taken = Bags(arrays["bag_sizes"], arrays["bag_tokens"], arrays["bag_counts"]).take(prompts)
        arrays |= {"bag_sizes": taken.sizes, "bag_tokens": taken.tokens, "bag_counts": taken.counts}
    return write_profile(folder, profile.record, arrays)


if __name__ == "__main__":
    main()

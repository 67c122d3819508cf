"""Repeats the paper's figures 9 (cost), 10 (prefill against decode) and 11 (cold start) with this planner.

    python docs/measure/paper_results.py MODEL ROUTING [--pictures DIR]

MODEL is a folder with DeepSeek-V2-Lite's config.json, ROUTING recorded routing of it (any form that `remoe profile import` takes). The
second model has the sizes of the paper's GPT2-moe, whose weights nobody published; its routing is synthetic and says so. Setting: the
paper catalog and the hardware description 'paper'; TPOT at most 1.5 times that of all experts local, TTFT at most that of it.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from remoe_cli.model.spec import KvLayer, MoeSpec
from remoe_cli.plan.assess.baselines import baselines
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.document import Outcome
from remoe_cli.plan.paper.heuristic import paper_plan
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.plan.problem.request import PlanRequest, make_problem
from remoe_cli.plan.problem.traffic import one_length
from remoe_cli.plan.problem.workload import Workload, patterns_of
from remoe_cli.plan.solve.candidates import candidate_sets
from remoe_cli.plan.solve.columns import build_columns
from remoe_cli.plan.solve.exact import solve
from remoe_cli.plan.solve.node import Task
from remoe_cli.plan.solve.scan import scan
from remoe_cli.profile.hardware import latency_from
from remoe_cli.profile.imports.importer import import_profile
from remoe_cli.profile.latency_record import Latency, Roofline
from remoe_cli.report import style

N_IN, N_OUT = 125, 200  # 500 characters and 200 tokens
RATIOS = ((285, 40), (245, 80), (165, 160), (125, 200), (65, 260), (25, 300))
T_REM_S, CAPS = (0.001, 0.005, 0.010), (8.0, 16.0, 40.0)
MENUS = {"DeepSeek-V2-Lite": ((1000, 5000), (1000, 40000)), "GPT2-moe sizes": ((200, 2000), (200, 5000))}
WAYS = ("cpu", "gpu", "fetch", "mix", "all-local")


@dataclass(frozen=True)
class Case:
    """One bar group: what each way costs and takes; `remote` experts of the exact plan."""

    costs: dict[str, float]
    outcome: Outcome
    remote: int
    experts: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("routing", type=Path)
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    latency = latency_from("paper", _spec_of(options.model))
    with tempfile.TemporaryDirectory() as folder:
        profile = import_profile(options.model, options.routing, Path(folder) / "profile", latency=latency)
        large = make_problem(profile, read_catalog("paper"), PlanRequest(n_in=N_IN, n_out=N_OUT))
    problems = {"DeepSeek-V2-Lite": large, "GPT2-moe sizes": _gpt2_moe()}
    problems = {name: _on_the_papers_menu(name, problem) for name, problem in problems.items()}
    figures: dict[str, dict[str, dict[str, Case]]] = {}
    for name, problem in problems.items():
        figures[f"Fig. 9, {name}: t_rem and vCPUs that a main function can use"] = _table(
            name,
            "cost of a request relative to all experts local at the best main spec (MIX*)",
            {f"{t_rem * 1e3:g} ms, {cap:g} vCPUs": _case(_changed(problem, t_rem, cap)) for t_rem in T_REM_S for cap in CAPS},
        )
        figures[f"Fig. 10, {name}: prompt + answer tokens"] = _table(
            name,
            "the same at 5 ms and 8 vCPUs, by lengths",
            {f"{n_in} + {n_out}": _case(_resized(_changed(problem, 0.005, 8.0), n_in, n_out)) for n_in, n_out in RATIOS},
        )
        _table(
            name,
            "the same when every request starts cold and pays for it",
            {f"{ms:g} ms, 8 vCPUs": _case(_cold(_changed(problem, ms / 1e3, 8.0))) for ms in (1, 5, 10)},
        )
        _cold_start(name, _changed(problem, 0.005, 8.0))
    if options.pictures:
        for title, tables in figures.items():
            _draw(title, tables, options.pictures)


def _spec_of(model: str) -> MoeSpec:
    from remoe_cli.model.checkpoint import find
    from remoe_cli.model.spec import read_spec

    return read_spec(find(model))


def _gpt2_moe() -> Problem:
    """GPT-2 124M with each FFN as 8 experts, top-2, in float32; Zipf-like routing (exponent 1), one random order a layer."""
    layers, experts, k, width = 12, 8, 2, 768
    expert_bytes = 4 * (2 * width * 4 * width + 5 * width)
    spec = MoeSpec(
        family="gpt2-moe",
        dtype="float32",
        hidden_size=width,
        hidden_layers=layers,
        moe_layers=tuple(range(layers)),
        experts_per_layer=experts,
        top_k=k,
        expert_bytes=expert_bytes,
        nonexpert_bytes=4 * 124_439_808 - layers * expert_bytes + 4 * layers * width * experts,
        hidden_state_bytes=4 * width,
        kv_layers=tuple(KvLayer(bytes_per_token=2 * 4 * width) for _ in range(layers)),
    )
    random = np.random.default_rng(0)
    logits = np.stack([random.permutation(-np.log(np.arange(1, experts + 1))) for _ in range(layers)])
    trace = np.argsort(-(logits + random.gumbel(size=(8000, layers, experts))), axis=2)[:, :, :k].astype(np.int64)
    use = np.stack([np.bincount(trace[:, layer].ravel(), minlength=experts) for layer in range(layers)]) / len(trace)
    workload = Workload(one_length(N_IN, N_OUT), 0.0, use, trace, patterns_of(trace, experts))
    return Problem(spec, latency_from("paper", spec), read_catalog("paper"), workload)


def _on_the_papers_menu(name: str, problem: Problem) -> Problem:
    catalog, (function, main) = problem.catalog, MENUS[name]
    menu = tuple(mb for mb in catalog.function.memory_menu_mb if function[0] <= mb <= function[1])
    mains = tuple(spec for spec in catalog.main.menu if main[0] <= spec.memory_mb <= main[1])
    changed = {
        "function": catalog.function.model_copy(update={"memory_menu_mb": menu}),
        "main": catalog.main.model_copy(update={"menu": mains}),
    }
    return replace(problem, catalog=catalog.model_copy(update=changed))


def _changed(problem: Problem, t_rem_s: float, cap: float) -> Problem:
    """The warm overhead, and the vCPUs after which the main function gets no faster."""
    side = problem.catalog.function.model_copy(update={"warm_billed_s": t_rem_s, "warm_unbilled_s": 0.0})
    return replace(problem, latency=_capped(problem.latency, cap), catalog=problem.catalog.model_copy(update={"function": side}))


def _capped(latency: Latency, cap: float) -> Latency:
    curve = latency.local_expert.curve
    assert isinstance(curve, Roofline)
    local = latency.local_expert.model_copy(update={"curve": curve.model_copy(update={"saturation_vcpus": cap})})
    return latency.model_copy(update={"local_expert": local})


def _resized(problem: Problem, n_in: int, n_out: int) -> Problem:
    return replace(problem, workload=replace(problem.workload, traffic=one_length(n_in, n_out)))


def _cold(problem: Problem) -> Problem:
    return replace(problem, workload=replace(problem.workload, cold_share=1.0))


def _case(problem: Problem) -> Case:
    others = baselines(problem, Aim())
    local = others.priced["all-local"]
    mix = others.priced["mix"]
    aim = Aim(ttft_s=mix.ttft_s, tpot_s=1.5 * mix.tpot_s)
    columns = build_columns(problem, candidate_sets(problem))
    exact = solve(Task(problem, columns, aim), 1e-3, 60, scan(problem, aim))
    costs = {name: baseline.cost_usd_per_request / local.cost_usd_per_request for name, baseline in others.priced.items()}
    if exact is None:
        return Case(costs, Outcome(cost_usd_per_request=0, ttft_s=0, tpot_s=0), 0, 0)
    costs["exact"] = exact.value / local.cost_usd_per_request
    if (theirs := paper_plan(problem, aim)) is not None:
        costs["paper"] = theirs.value / local.cost_usd_per_request
    outcome = evaluate(problem, exact.placement)
    remote = sum(len(layer.remote) for layer in exact.layers)
    return Case(costs, outcome, remote, problem.spec.experts_per_layer * len(exact.layers))


def _table(name: str, what: str, cases: dict[str, Case]) -> dict[str, dict[str, Case]]:
    print(f"\n### {name}: {what}\n")
    print("| | exact | paper's heuristic | " + " | ".join(WAYS) + " | experts remote | cut against CPU, GPU, Fetch, MIX |")
    print("|" + "---|" * (len(WAYS) + 5))
    for label, case in cases.items():
        cells = [f"{case.costs[way]:.3f}" if way in case.costs else "n/a" for way in ("exact", "paper", *WAYS)]
        cuts = [f"{1 - case.costs['exact'] / case.costs[way]:.0%}" if {way, "exact"} <= case.costs.keys() else "n/a" for way in WAYS[:4]]
        print(f"| {label} | " + " | ".join(cells) + f" | {case.remote} of {case.experts} | {', '.join(cuts)} |")
    return {name: cases}


def _cold_start(name: str, problem: Problem) -> None:
    """Fig. 11: seconds from nothing to a loaded model, weights read at the catalog's rate; functions start beside the main function."""
    aim = Aim()
    warm = scan(problem, aim, least=1)
    if warm is None:
        return
    side, spec, catalog = problem.catalog.function, problem.spec, problem.catalog.main
    local = sum(spec.experts_per_layer - len(layer.remote) for layer in warm.layers)
    main_s = catalog.cold_start_s + (spec.nonexpert_bytes + local * spec.expert_bytes) / catalog.load_bytes_per_s
    function_s = side.cold_start_s + max(len(layer.remote) for layer in warm.layers) * spec.expert_bytes / side.load_bytes_per_s
    whole_s = catalog.cold_start_s + (spec.nonexpert_bytes + spec.routed_bytes) / catalog.load_bytes_per_s
    print(f"\n### {name}, cold start (Fig. 11)\n")
    print(
        f"All in one function {whole_s:.2f} s; plan with {len(warm.layers) * spec.experts_per_layer - local} experts remote: main function "
    )
    print(f"{main_s:.2f} s beside functions {function_s:.2f} s, so {1 - max(main_s, function_s) / whole_s:.0%} less.")


def _draw(title: str, tables: dict[str, dict[str, Case]], folder: Path) -> None:
    """Draw a marker for each way of each case: seven bars beside each other would be too thin to read."""
    from matplotlib.figure import Figure

    (name, cases), *_ = tables.items()
    with style.pictures():
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        panel = figure.subplots()
        ways = ("exact", "paper", *WAYS)
        at = np.arange(len(cases))
        for index, (way, marker) in enumerate(zip(ways, style.markers(len(ways)), strict=True)):
            costs = [case.costs.get(way, np.nan) for case in cases.values()]
            (points,) = panel.plot(
                at + (index - len(ways) / 2 + 0.5) * 0.09, costs, style.matplotlib_marker(marker), label=way, markersize=6
            )
            points.set(color=style.light("plan" if index < 2 else "other"), fillstyle="full" if index == 0 else "none")
        panel.axhline(1.0, color=style.light("soft"), linewidth=0.8, linestyle="--")
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(NullLocator())
        panel.set_xticks(at, [label.replace(", ", "\n").replace(" + ", "\n+ ") for label in cases])
        panel.set_xticks(at[:-1] + 0.5, minor=True)
        panel.grid(axis="x", which="minor")
        panel.grid(axis="y")
        panel.tick_params(axis="x", which="both", length=0)
        panel.set_ylabel("cost / all local")
        panel.set_title(title)
        figure.legend(ncols=len(ways), loc="outside lower center")
        figure.savefig(folder / f"paper-{title.split(',')[0].lower().replace('. ', '')}-{name.split()[0].lower()}.png", dpi=130)


if __name__ == "__main__":
    main()

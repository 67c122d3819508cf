"""Prints the tables of docs/explanation/planning.md: the planner's solvers against each other, and against what else there is.

    python docs/measure/solvers.py table [--routing FILE --model DIR] [--json]
    python docs/measure/solvers.py sizes [NAME ...] [--json]

`table` plans DeepSeek-V2-Lite in the setting of the paper's catalog under made-up routing (synthetic_routing.py), and under recorded
routing where there is some, with the overhead of an invocation, the vCPUs after which the main function gets no faster (cap), the price of
GPU memory and the TPOT target varied. `sizes` plans models of several sizes, each in a process of its own, beside the plain integer
programme (plain_ilp.py) where that is small enough.

MIX* is all experts local on the cheapest main spec that meets the target. Gaps are costs above exact's, as cost/placement.py prices them.
Seconds are processor time of one thread, so that other work on the machine counts little; exact's are for the whole plan, scan
and baselines included. A time limit is clock time.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from plain_ilp import plain_plan
from solver_cases import (
    GRID,
    LAWS,
    LITE,
    MODELS,
    SLOWER,
    Found,
    Setting,
    Size,
    asked,
    broken_limits,
    cases,
    drawn,
    exact_plan,
    hardware,
    heuristic,
    imported,
    remote_share,
)
from synthetic_routing import Law, sizes_of

from remoe_cli.model.spec import MoeSpec
from remoe_cli.plan.assess.verdict import WORTHWHILE
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.document import BaselineName
from remoe_cli.plan.paper.heuristic import paper_plan
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.plan.solve.candidates import candidate_sets
from remoe_cli.plan.solve.columns import build_columns
from remoe_cli.plan.solve.exact import GAP, Solution
from remoe_cli.plan.solve.scan import scan
from remoe_cli.profile.record import Profile

ILP_LIMIT_S = 60.0


# table


@dataclass(frozen=True)
class Row:
    """`exact.gap` is its certified one; baselines are costs in MIX*'s."""

    routing: str
    setting: Setting
    exact: Found
    scan: Found
    paper: Found
    baselines: dict[str, float]
    verdict: str
    status: str

    @property
    def cost(self) -> float:
        """Of the exact plan, of which there always is one: the target is looser than what MIX keeps."""
        assert self.exact.cost is not None
        return self.exact.cost


HEURISTICS: dict[str, Callable[[Problem, Aim], Solution | None]] = {"scan": scan, "paper": paper_plan}


def measure(routing: str, setting: Setting, profile: Profile, folder: Path) -> Row:
    case = asked(profile, setting, folder)
    exact, plan = exact_plan(case)
    local_usd = plan.baselines[BaselineName.ALL_LOCAL].cost_usd_per_request
    found = {name: heuristic(solver, case, local_usd, plan.cost_usd_per_request) for name, solver in HEURISTICS.items()}
    costs = {name: plan.baselines[name].cost_usd_per_request for name in BaselineName if name != BaselineName.ALL_LOCAL}
    priced = {name: math.nan if usd is None or local_usd is None else usd / local_usd for name, usd in costs.items()}
    return Row(routing, setting, exact, found["scan"], found["paper"], priced, plan.verdict, plan.status)


SETTING = ("routing", "cap", "t_rem ms", "c_g/c_c", "TPOT")
PLANS = ("exact", "remote", "certified", "scan gap", "paper", "its gap", "CPU", "GPU", "Fetch", "verdict", "exact s", "scan s", "paper s")


def cells(row: Row) -> tuple[str, ...]:
    setting, paper = row.setting, row.paper
    return (
        row.routing,
        f"{setting.cap}",
        f"{setting.t_rem_ms:g}",
        f"{setting.price:g}",
        f"{SLOWER:g} MIX" if setting.targeted else "",
        f"{row.cost:.3f}",
        f"{row.exact.remote:.0%}",
        f"{row.exact.gap:.2%}" + (" (time limit)" if row.status == "time-limit" else ""),
        "none" if row.scan.gap is None else f"{row.scan.gap:.2%}",
        "none" if paper.cost is None else f"{paper.cost:.3f}",
        "none" if paper.gap is None else f"{paper.gap:.1%}",
        *(f"{row.baselines[name]:.2f}" for name in (BaselineName.CPU, BaselineName.GPU, BaselineName.FETCH)),
        row.verdict,
        f"{row.exact.seconds:.1f}",
        f"{row.scan.seconds:.1f}",
        f"{paper.seconds:.1f}",
    )


def line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def head(names: tuple[str, ...]) -> str:
    return f"{line(names)}\n{line(('---',) * len(names))}"


def gaps(found: list[Found]) -> dict[str, Any]:
    """Of a heuristic: its gaps, and how often it found no plan, broke what it claims, or cost more than MIX*."""
    known = [part.gap for part in found if part.gap is not None]
    return {
        "configurations": len(found),
        "median": statistics.median(known),
        "least": min(known),
        "most": max(known),
        "none": len(found) - len(known),
        "broken": sum(bool(part.broken) for part in found),
        "dearer_than_mix": sum(part.cost is not None and part.cost > 1 + WORTHWHILE for part in found),
        "median_s": statistics.median(part.seconds for part in found),
        "most_s": max(part.seconds for part in found),
    }


def summary(rows: list[Row]) -> dict[str, Any]:
    seconds = [row.exact.seconds for row in rows]
    return {
        "scan": gaps([row.scan for row in rows]),
        "paper": gaps([row.paper for row in rows]),
        "exact": {
            "median_s": statistics.median(seconds),
            "most_s": max(seconds),
            "broken": sum(bool(row.exact.broken) for row in rows),
            "over_gap": sum((row.exact.gap or 0.0) > GAP * (1 + 1e-6) for row in rows),
        },
        "pays": sum(row.cost < 1 - WORTHWHILE for row in rows),
        "recommended": sum(row.verdict == "recommended" for row in rows),
        "below_gpu": sum(row.cost < row.baselines[BaselineName.GPU] for row in rows),
        "below_fetch": sum(row.cost < row.baselines[BaselineName.FETCH] for row in rows),
    }


def say_summary(rows: list[Row], summed: dict[str, Any]) -> Iterator[str]:
    for solver in HEURISTICS:
        of = summed[solver]
        yield (
            f"{solver}: gap to exact median {of['median']:.2%}, {of['least']:.2%} to {of['most']:.2%}; no plan {of['none']}, "
            f"breaks what it claims {of['broken']}, dearer than MIX* {of['dearer_than_mix']} of {of['configurations']}; "
            f"seconds median {of['median_s']:.1f}, most {of['most_s']:.1f}"
        )
    exact = summed["exact"]
    yield (
        f"exact: seconds median {exact['median_s']:.1f}, most {exact['most_s']:.1f}; not within {GAP:.1%} {exact['over_gap']}, "
        f"breaks what it claims {exact['broken']} of {len(rows)}"
    )
    yield (
        f"Of {len(rows)}, exact is cheaper than MIX* in {summed['pays']}, than GPU in {summed['below_gpu']}, than Fetch in "
        f"{summed['below_fetch']}; recommended in {summed['recommended']}."
    )
    yield "\nWhere offloading pays: exact / MIX*, targets kept\n"
    yield head(("routing", *(f"cap {setting.cap}, {setting.t_rem_ms:g} ms" for setting in GRID)))
    costs = {(row.routing, row.setting): row.cost for row in rows}
    for routing in dict.fromkeys(row.routing for row in rows):
        yield line((routing, *(f"{costs[routing, setting]:.3f}" for setting in GRID)))


def table(chosen: argparse.Namespace) -> int:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = sizes_of(chosen.model) if chosen.routing else MODELS[LITE].spec
        profiles = {str(law): drawn(folder, law, spec, hardware(folder, 8)) for law in LAWS}
        if chosen.routing:
            copy = folder / "recorded.npz"
            copy.write_bytes(chosen.routing.read_bytes())
            profiles["recorded"] = imported(copy, spec, hardware(folder, 8))
        if not chosen.json:
            print(head(SETTING + PLANS), flush=True)
        for routing, setting in cases(bool(chosen.routing)):
            rows.append(measure(routing, setting, profiles[routing], folder))
            if not chosen.json:
                print(line(cells(rows[-1])), flush=True)
    summed = summary(rows)
    if chosen.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "summary": summed}, indent=1))
    else:
        print("\n" + "\n".join(say_summary(rows, summed)))
    broken = sum(summed[solver]["broken"] for solver in ("exact", *HEURISTICS))
    return 1 if broken else 0


# sizes


def planner_size(size: Size, folder: Path) -> dict[str, Any]:
    case = asked(drawn(folder, Law("zipf", 1.5), size.spec, hardware(folder, size.setting.cap)), size.setting, folder)
    exact, plan = exact_plan(case)
    found = heuristic(scan, case, plan.baselines[BaselineName.ALL_LOCAL].cost_usd_per_request, plan.cost_usd_per_request)
    problem = case.problem()
    columns = len(build_columns(problem, candidate_sets(problem)).count)
    return {"columns": columns, "exact": asdict(exact), "scan": asdict(found), "status": plan.status, "usd": plan.cost_usd_per_request}


def plain_size(size: Size, folder: Path) -> dict[str, Any]:
    case = asked(drawn(folder, Law("zipf", 1.5), size.spec, hardware(folder, size.setting.cap)), size.setting, folder)
    problem = case.problem()
    found = plain_plan(problem, case.aim, GAP, ILP_LIMIT_S)
    measured: dict[str, Any] = {name: getattr(found, name) for name in ("value_usd", "gap", "variables", "rows", "build_s", "solve_s")}
    if found.placement is None:
        return measured
    outcome = evaluate(problem, found.placement)
    return measured | {
        "usd": outcome.cost_usd_per_request,
        "remote": remote_share(problem, found.placement),
        "broken": broken_limits(problem, case.aim, found.placement),
    }


WAYS: dict[str, Callable[[Size, Path], dict[str, Any]]] = {"planner": planner_size, "plain": plain_size}


def one(name: str, way: str) -> None:
    """In a process of its own, whose peak memory is that of one way and one size."""
    with tempfile.TemporaryDirectory() as folder:
        measured = WAYS[way](MODELS[name], Path(folder))
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = re.search(r"VmHWM:\s*(\d+) kB", status)
    print(json.dumps(measured | {"peak_mb": int(peak[1]) / 1024 if peak else None}))


def in_own_process(name: str, way: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "one", name, way], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {way}: {done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


SIZES_HEAD = (
    "model",
    "layers x experts, top-k",
    "columns",
    "scan s",
    "scan gap",
    "exact s",
    "certified",
    "exact / MIX*",
    "remote",
    "peak MB",
)
PLAIN_HEAD = ("model", "variables", "rows", "seconds to build, solve", "its own gap", "its plan / exact", "remote", "breaks", "peak MB")


def sizes(chosen: argparse.Namespace) -> int:
    summed: dict[str, dict[str, Any]] = {}
    if not chosen.json:
        print(head(SIZES_HEAD), flush=True)
    for name in chosen.names or MODELS:
        size = MODELS[name]
        summed[name] = {way: in_own_process(name, way) for way in WAYS if way != "plain" or size.plain}
        if not chosen.json:
            print(line(size_cells(name, size.spec, summed[name]["planner"])), flush=True)
    if chosen.json:
        print(json.dumps(summed, indent=1))
        return 0
    print(f"\nThe plain programme, gap {GAP:g}, {ILP_LIMIT_S:g} s:\n\n{head(PLAIN_HEAD)}")
    for name, ways in summed.items():
        if "plain" in ways:
            print(line(plain_cells(name, ways["plain"], ways["planner"]["usd"])))
    return 0


def size_cells(name: str, spec: MoeSpec, of: dict[str, Any]) -> tuple[str, ...]:
    exact, found = of["exact"], of["scan"]
    return (
        name,
        f"{len(spec.moe_layers)} x {spec.experts_per_layer}, top-{spec.top_k}, {spec.expert_bytes / 1e6:.1f} MB",
        f"{of['columns']:,}",
        f"{found['seconds']:.1f}",
        "none" if found["gap"] is None else f"{found['gap']:.2%}",
        f"{exact['seconds']:.1f}",
        f"{exact['gap']:.2%}" + (" (time limit)" if of["status"] == "time-limit" else ""),
        f"{exact['cost']:.3f}",
        f"{exact['remote']:.0%}",
        f"{of['peak_mb']:,.0f}",
    )


def plain_cells(name: str, of: dict[str, Any], exact_usd: float) -> tuple[str, ...]:
    start = (name, f"{of['variables']:,}", f"{of['rows']:,}", f"{of['build_s']:.1f}, {of['solve_s']:.1f}")
    if of["value_usd"] is None:
        return (*start, "no plan", "", "", "", f"{of['peak_mb']:,.0f}")
    ratio, broken = f"{of['usd'] / exact_usd:.3f}", ", ".join(of["broken"]) or "nothing"
    return (*start, f"{of['gap']:.2%}", ratio, f"{of['remote']:.0%}", broken, f"{of['peak_mb']:,.0f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    solvers = commands.add_parser("table", help="solvers and baselines over many settings")
    solvers.add_argument("--routing", type=Path, help="recorded routing (.npz) of the model in --model")
    solvers.add_argument("--model", type=Path, help="its config.json, or the folder that holds it")
    scaled = commands.add_parser("sizes", help="solvers over models of several sizes")
    scaled.add_argument("names", nargs="*", help=f"of {', '.join(MODELS)}")
    single = commands.add_parser("one", help="one size, one way: what `sizes` starts")
    single.add_argument("name")
    single.add_argument("way", choices=WAYS)
    for command in (solvers, scaled):
        command.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    if chosen.command == "one":
        one(chosen.name, chosen.way)
        return 0
    if chosen.command == "table" and bool(chosen.routing) != bool(chosen.model):
        parser.error("--routing and --model go together")
    if unknown := [name for name in getattr(chosen, "names", ()) if name not in MODELS]:
        parser.error(f"unknown: {', '.join(unknown)}")
    if not chosen.json:
        print(f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    return {"table": table, "sizes": sizes}[chosen.command](chosen)


if __name__ == "__main__":
    sys.exit(main())

"""What drafts are worth: TPOT, calls and cost with draft tokens beside without, on prompts whose answers repeat them.

    python docs/measure/speculate.py [--prompts 4] [--tokens 48] [--rtt-ms 0,10] [--speculate auto]
    python docs/measure/speculate.py --sweep off,2,4,7,10,auto [--prompts 4] [--tokens 48] [--rtt-ms 0,10]

The demo model in float32. Every second expert of each layer is in a function of the local twin, one function a layer, and every call
takes so many ms longer. Each prompt is asked without drafts and with them, in turns, and the tokens have to be the same. HTTP is left
out. Prompts are of three kinds, code to change, texts to sum up and texts to write again, and were written for this script. Ratios are
those of sums over the prompts of a kind. Costs are those of the receipts, at the prices of the catalog 'local'.

`--sweep` has the plan's predictions beside it, for all prompts together. The prompts are profiled, half of the experts are planned to be
remote, the plan is deployed, and the profile is calibrated on the deployment. Then every prompt is asked with each length of drafts, in
turns. TPOT and cost without drafts are in ms and USD for a thousand answers, the others as quotients of those without and those with
drafts, predicted and measured. The last lines say what the planner chooses for this placement, and how far that is from the best measured.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from batching import THREAD, serving

KINDS = {
    "code": (
        "Add a docstring to this function and return the whole function:\n\n"
        "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / len(values)\n",
        "Rename the variable x to price in this code and print all of the code again:\n\n"
        "x = 12.5\ncount = 4\nif x > 10:\n    x = x * 0.9\ntotal = x * count\nprint(x, count, total)\n",
        "Here is a Python class. Write it again with a method area.\n\n"
        "class Rectangle:\n    def __init__(self, width, height):\n        self.width = width\n        self.height = height\n\n"
        "    def perimeter(self):\n        return 2 * (self.width + self.height)\n",
        "Write this loop again so that it also counts the odd numbers:\n\n"
        "even = 0\nfor number in range(100):\n    if number % 2 == 0:\n        even = even + 1\nprint(even)\n",
    ),
    "summary": (
        "Summarise this text in two sentences: The town library opened in 1921 in a former school. For sixty years it lent only books and "
        "newspapers. In 1985 it began to lend music, and in 1999 it bought its first computers. Today half of its visitors come to work at "
        "the desks on the upper floor, and the books are mostly ordered from home.",
        "What are the main points of this text? The river rises in the northern hills and flows south for two hundred kilometres. In "
        "spring its water is high, because the snow melts. Farmers built canals that lead the water to their fields. In summer the river "
        "is so low that boats cannot use it, so goods are carried by train.",
        "Give a short summary of this report: The new bridge was opened on Monday. It is three hundred metres long and has four lanes and "
        "a path for bicycles. The old bridge will be taken down next year. The city paid forty million for the new bridge, ten million "
        "more than it had planned, because steel became more expensive.",
        "Summarise the following: Bees live in colonies with one queen. The queen lays eggs, and the workers feed the young bees, clean "
        "the hive and collect nectar and pollen. The workers tell each other by a dance where they have found flowers. In winter the bees "
        "stay in the hive and live on the honey that they stored in summer.",
    ),
    "rewriting": (
        "Correct the spelling of this text and write it again: The wether was realy nice on sunday, so we went to the beech. The childern "
        "played in the sand, and my brother swam in the see. In the evning we ate fish in a smal restaurant by the harbor.",
        "Write this text again in the past tense: Anna walks to the station every morning. She buys a newspaper and a cup of coffee, and "
        "then she waits for the train. The train comes at eight. She reads the newspaper on the train and talks to her neighbour.",
        "Rewrite this message so that it is more polite: Send me the report by Friday. I need the numbers of the last three months, the "
        "list of customers and the plan for next year. Do not forget the numbers of the office in the north. Call me if something is not "
        "clear.",
        "Replace the word car by the word bicycle in this text and write it again: My car is red. I bought the car last year from a "
        "neighbour who had two of them. Every day I take the car to work. In winter I keep the car in the garage, and in summer the car "
        "stands in front of the house.",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rtt-ms", default="0,10")
    parser.add_argument("--speculate", default="auto")
    parser.add_argument("--sweep")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REMOE_STATE_DIR"] = f"{folder}/state"
        if options.sweep:
            print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
            for rtt_ms in map(float, options.rtt_ms.split(",")):
                _sweep(rtt_ms, Path(folder), options)
            return
        print(
            f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; --speculate {options.speculate}"
        )
        print("ms added  prompts    TPOT off  TPOT on  ratio  drafts  draft tokens  accepted  calls off:on  USD off:on")
        for rtt_ms in map(float, options.rtt_ms.split(",")):
            _measure(rtt_ms, Path(folder), options)


def _measure(rtt_ms: float, folder: Path, options: argparse.Namespace) -> None:
    from dataclasses import replace

    from remoe_cli.model.checkpoint import find_named
    from remoe_cli.model.demo import demo_model
    from remoe_cli.model.draft import speculate_of
    from remoe_cli.model.tokens import encode, load_tokenizer

    checkpoint = find_named(str(demo_model("float32")))
    tokenizer = load_tokenizer(checkpoint)
    with serving(f"drafts-{rtt_ms:g}", checkpoint, folder, argparse.Namespace(rtt_ms=rtt_ms)) as off:
        on = replace(off, config=off.config.model_copy(update={"speculate": speculate_of(options.speculate)}))
        _ask(off, encode(tokenizer, "Hello"), 4)
        every = []
        for kind, texts in KINDS.items():
            made = []
            for number, text in enumerate(texts[: options.prompts]):
                ids, ways = encode(tokenizer, text), (off, on) if number % 2 else (on, off)
                answers = {way is on: _ask(way, ids, options.tokens) for way in ways}
                assert answers[True].token_ids == answers[False].token_ids, "an answer has other tokens with drafts than without"
                made.append((answers[False].receipt, answers[True].receipt))
            print(_row(rtt_ms, kind, made), flush=True)
            every += made
        print(_row(rtt_ms, "all", every), flush=True)


def _sweep(rtt_ms: float, folder: Path, options: argparse.Namespace) -> None:
    """Print TPOT and cost of each length of drafts, as predicted and as measured."""
    from dataclasses import replace

    from remoe_cli.artifacts import write_json
    from remoe_cli.deploy.console import SILENT
    from remoe_cli.deploy.local import lifecycle
    from remoe_cli.deploy.local.calibrate import calibrate
    from remoe_cli.deploy.local.target import LocalTarget
    from remoe_cli.deploy.target import DeployOptions
    from remoe_cli.model.checkpoint import find_named
    from remoe_cli.model.demo import demo_model
    from remoe_cli.model.draft import speculate_of
    from remoe_cli.model.tokens import encode, load_tokenizer
    from remoe_cli.plan.build import make_plan
    from remoe_cli.plan.catalog.catalog import read_catalog
    from remoe_cli.plan.cost.placement import evaluate
    from remoe_cli.plan.problem.problem import Placement
    from remoe_cli.plan.problem.request import PlanRequest, problem_of
    from remoe_cli.profile.prompts import PromptSet
    from remoe_cli.profile.run import profile
    from remoe_cli.runtime.invoke import make_caller
    from remoe_cli.runtime.load_main import load_here

    texts = tuple(text for some in KINDS.values() for text in some[: options.prompts])
    model, name, depths = str(demo_model("float32")), f"sweep-{rtt_ms:g}", [speculate_of(each) for each in options.sweep.split(",")]
    begun_s = time.perf_counter()
    made = profile(
        model, PromptSet("drafts", "prompt", texts), folder / name, max_new_tokens=options.tokens, max_prompt_tokens=512, batch_size=16
    )
    print(f"profile: {time.perf_counter() - begun_s:.0f} s")
    plan = make_plan(made, read_catalog("local"), PlanRequest(remote_share=0.5, examine=False))
    write_json(folder / f"{name}.json", plan)
    LocalTarget(SILENT).deploy(folder / f"{name}.json", name, DeployOptions(rtt_ms=rtt_ms))
    try:
        calibrated = calibrate(name, folder / f"{name}-calibrated", texts[::3], 24, SILENT)
        endpoint = lifecycle.status(name)["endpoint"]
        loaded = THREAD.submit(load_here, lifecycle.state_dir(name) / "server.json", lambda *given: make_caller(endpoint, *given)).result()
        mains = {each: replace(loaded, config=loaded.config.model_copy(update={"speculate": each})) for each in depths}
        tokenizer = load_tokenizer(find_named(model))
        _ask(mains["off"], encode(tokenizer, "Hello"), 4)
        receipts: dict[object, list[object]] = {each: [] for each in depths}
        for number, text in enumerate(texts):
            ids, tokens = encode(tokenizer, text), set()
            for at in range(len(depths)):
                depth = depths[(at + number) % len(depths)]
                answer = _ask(mains[depth], ids, options.tokens)
                receipts[depth].append(answer.receipt)
                tokens.add(answer.token_ids)
            assert len(tokens) == 1, "an answer has other tokens with drafts than without"
    finally:
        LocalTarget(SILENT).destroy(name)
    problem, placement = problem_of(plan, calibrated, read_catalog("local")), Placement(plan.main, plan.layers, plan.instances)
    lengths = [(each.prompt_tokens, each.generated_tokens - 1) for each in receipts["off"]]  # type: ignore[attr-defined]
    figures = {}
    for depth in depths:
        here = problem.with_drafts(depth)
        each = [(evaluate(replace(here, workload=here.workload.resized(*size)), placement), size[1]) for size in lengths]
        tpot_s = sum(one.tpot_s * n_out for one, n_out in each) / sum(n_out for _, n_out in each)
        taken = receipts[depth]
        figures[depth] = (
            (tpot_s, sum(one.cost_usd_per_request for one, _ in each) / len(each)),
            (
                sum(one.tpot_s * (one.generated_tokens - 1) for one in taken if one.tpot_s) / sum(n_out for _, n_out in each),  # type: ignore[attr-defined]
                sum(map(_usd, taken)) / len(taken),
            ),
        )
    print("ms added  drafts  passes a token  rows a pass  TPOT predicted  measured  cost predicted  measured")
    for depth in depths:
        drafting, (predicted, measured) = problem.with_drafts(depth).drafting, figures[depth]
        line = f"{rtt_ms:>8g}{depth!s:>8}{drafting.passes:>16.2f}{drafting.mean_rows:>13.2f}"
        if depth == "off":
            line += f"{predicted[0] * 1e3:>13.0f} ms{measured[0] * 1e3:>7.0f} ms{predicted[1] * 1e3:>16.4f}{measured[1] * 1e3:>10.4f}"
        else:
            quotients = [figures["off"][kind][figure] / figures[depth][kind][figure] for figure in (0, 1) for kind in (0, 1)]
            line += f"{quotients[0]:>16.2f}{quotients[1]:>10.2f}{quotients[2]:>16.2f}{quotients[3]:>10.2f}"
        print(line, flush=True)
    for figure, what in enumerate(("TPOT", "cost")):
        chosen = min(depths, key=lambda depth: figures[depth][0][figure])
        best = min(depths, key=lambda depth: figures[depth][1][figure])
        beyond = figures[chosen][1][figure] / figures[best][1][figure] - 1
        print(f"{what}: the planner chooses {chosen}; measured best is {best}; the planner's is {beyond:.1%} above it", flush=True)


def _ask(main, ids: Sequence[int], tokens: int):  # type: ignore[no-untyped-def]
    from remoe_cli.runtime.main_function import Request

    # In the thread that has loaded the model (runtime/app.py).
    return THREAD.submit(main.answer, Request(prompt_token_ids=tuple(ids), max_new_tokens=tokens)).result()


def _row(rtt_ms: float, kind: str, made) -> str:  # type: ignore[no-untyped-def]
    further = sum(off.generated_tokens - 1 for off, _ in made)
    off_s, on_s = (sum(each[way].tpot_s * (each[way].generated_tokens - 1) for each in made if each[way].tpot_s) for way in (0, 1))
    calls, usd = ([sum(value(each[way]) for each in made) for way in (0, 1)] for value in (_calls, _usd))
    drafts, tokens, accepted = (sum(getattr(on, name) for _, on in made) for name in ("drafts", "draft_tokens", "accepted_tokens"))
    return (
        f"{rtt_ms:>8g}  {kind:<9}{off_s / further * 1e3:>9.0f} ms{on_s / further * 1e3:>6.0f} ms{off_s / on_s:>7.2f}{drafts:>8}{tokens:>14}"
        f"{accepted:>10}{calls[0] / calls[1]:>14.2f}{usd[0] / usd[1]:>12.2f}"
    )


def _calls(receipt) -> int:  # type: ignore[no-untyped-def]
    return int(receipt.invocations)


def _usd(receipt) -> float:  # type: ignore[no-untyped-def]
    return float(receipt.cost.total_usd)


if __name__ == "__main__":
    begun_s = time.perf_counter()
    main()
    print(f"{time.perf_counter() - begun_s:.0f} s")
    THREAD.shutdown()

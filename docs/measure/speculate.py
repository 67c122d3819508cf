"""What drafts are worth: TPOT, calls and cost with draft tokens beside without, on prompts whose answers repeat them.

    python docs/measure/speculate.py [--prompts 4] [--tokens 48] [--rtt-ms 0,10] [--speculate auto]

The demo model in float32. Every second expert of each layer is in a function of the local twin, one function a layer, and every call
takes so many ms longer. Each prompt is asked without drafts and with them, in turns, and the tokens have to be the same. HTTP is left
out. Prompts are of three kinds, code to change, texts to sum up and texts to write again, and were written for this script. Ratios are
those of sums over the prompts of a kind. Costs are those of the receipts, at the prices of the catalog 'local'.
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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REMOE_STATE_DIR"] = f"{folder}/state"
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

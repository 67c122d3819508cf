"""What experts in spare memory are worth: calls a token, cost and TPOT with them beside without, in turns.

    python docs/measure/expert_cache.py [--prompts 6] [--tokens 32] [--rtt-ms 0 10] [--room 0.25 0.5]

The demo model in float32. Every second expert of each layer is in a function of the local twin, one function a layer, and every call takes
so many ms longer. `room` is the spare memory, as a share of the remote experts. The cache first sees the demo's other prompts, as it would
while it serves; then each prompt is asked without it and with it, in turns, and the tokens have to be the same. HTTP is left out. Costs are
those of the receipts, at the prices of the catalog 'local'; `saved` is what the receipts say of calls that were not made.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from batching import THREAD, serving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rtt-ms", nargs="+", type=float, default=[0.0, 10.0])
    parser.add_argument("--room", nargs="+", type=float, default=[0.25, 0.5])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REMOE_STATE_DIR"] = f"{folder}/state"
        print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {options.prompts} prompts\n")
        print("| ms added | room | calls a token, without | with | USD without | with | saved, USD | TPOT ratio | tokens |")
        print(f"|{' --- |' * 9}")
        for rtt_ms in options.rtt_ms:
            _measure(rtt_ms, Path(folder), options)


def _measure(rtt_ms: float, folder: Path, options: argparse.Namespace) -> None:
    from remoe_cli.cli.demo import _prompts
    from remoe_cli.model.checkpoint import find_named
    from remoe_cli.model.demo import demo_model
    from remoe_cli.model.tokens import encode, load_tokenizer
    from remoe_cli.runtime.expert_cache import cache_of
    from remoe_cli.runtime.last_resort import LastResort

    checkpoint = find_named(str(demo_model("float32")))
    tokenizer = load_tokenizer(checkpoint)
    prompts = [encode(tokenizer, text) for text in _prompts().texts]
    asked, seen = prompts[: options.prompts], prompts[options.prompts : 2 * options.prompts]
    with serving(f"cache-{rtt_ms:g}", checkpoint, folder, argparse.Namespace(rtt_ms=rtt_ms)) as main:
        dispatcher = main.engine.dispatcher  # type: ignore[attr-defined]
        (shards,) = Path(os.environ["REMOE_STATE_DIR"]).glob("**/bundle")
        remote = sum(len(f.experts) for functions in dispatcher.remote.values() for f in functions)
        _ask(main, asked[0], 4)
        for room in options.room:
            config = main.config.model_copy(update={"spare_experts": round(room * remote)})  # type: ignore[attr-defined]
            cache = cache_of(config, dispatcher.remote, LastResort(str(shards)))
            dispatcher.cache = cache
            for ids in seen:
                _ask(main, ids, options.tokens)
            made = []
            for number, ids in enumerate(asked):
                answers = {}
                for way in (None, cache) if number % 2 else (cache, None):
                    dispatcher.cache = way
                    answers[way is cache] = _ask(main, ids, options.tokens)
                assert answers[True].token_ids == answers[False].token_ids, "an answer has other tokens with experts in spare memory"
                made.append((answers[False].receipt, answers[True].receipt))
            dispatcher.cache = None
            print(_row(rtt_ms, room, made), flush=True)


def _ask(main, ids: Sequence[int], tokens: int):  # type: ignore[no-untyped-def]
    from remoe_cli.runtime.main_function import Request

    # In the thread that has loaded the model (runtime/app.py).
    return THREAD.submit(main.answer, Request(prompt_token_ids=tuple(ids), max_new_tokens=tokens)).result()


def _row(rtt_ms: float, room: float, made) -> str:  # type: ignore[no-untyped-def]
    tokens = [sum(each[way].generated_tokens for each in made) for way in (0, 1)]
    calls = [sum(each[way].invocations for each in made) / tokens[way] for way in (0, 1)]
    usd = [sum(each[way].cost.total_usd for each in made) for way in (0, 1)]
    tpot = [sum(each[way].tpot_s for each in made) for way in (0, 1)]
    saved = sum(on.saved_usd for _, on in made)
    figures = f"{calls[0]:.2f} | {calls[1]:.2f} | {usd[0]:.3g} | {usd[1]:.3g} | {saved:.2g} | {tpot[1] / tpot[0]:.2f}"
    return f"| {rtt_ms:g} | {room:.0%} | {figures} | the same |"


if __name__ == "__main__":
    main()
    THREAD.shutdown()

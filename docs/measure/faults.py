"""What faults cost: requests to a model whose experts are in real workers of the twin, while something goes wrong. Prints a table.

    python -m docs.measure.faults [--requests 50] [--new-tokens 16] [--fault NAME]

Greedy tokens must be those of the whole model, in float32. It is tiny, so a token takes what its calls take. Half of the experts are
remote, in two functions for each layer. Each fault begins with a main function that knows nothing yet of its functions. Times are relative
to those of the same requests without a fault right before, as a machine that others use gets faster and slower: the first row says by how
much.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np

from remoe_cli import cages
from remoe_cli.model.checkpoint import find
from remoe_cli.model.spec import read_spec
from remoe_cli.runtime.calls import Caller
from remoe_cli.runtime.engine import Engine, start_engine
from remoe_cli.runtime.invoke import Invocation, make_caller
from remoe_cli.runtime.last_resort import LastResort
from tests.support import faults
from tests.support.by_hand import by_hand
from tests.support.faults import Fault, Proxy, faulty_twin
from tests.support.split import SplitTwin

WARM = 3  # requests before those that count


@dataclass(frozen=True)
class Billed:
    """Tries that were billed, and their milliseconds."""

    tries: int = 0
    ms: int = 0


@dataclass(frozen=True)
class Row:
    """What became of the requests under one fault.

    missing   what the twin's meter has, and receipts have not
    """

    equal: int
    errors: int
    calls: int
    attempts: int
    retries: int
    hedges: int
    fallbacks: int
    unreported: int
    missing: Billed
    tpot_s: tuple[float, ...]

    @property
    def taken_s(self) -> np.ndarray:
        """TPOT, p50 and p99."""
        return np.quantile(self.tpot_s, (0.5, 0.99)) if self.tpot_s else np.array((np.nan, np.nan))

    @property
    def adds_up(self) -> bool:
        """Whether all that was billed is in receipts, but tries that these count as unreported."""
        return self.missing == Billed() or (0 < self.missing.tries <= self.unreported and self.missing.ms > 0)


@dataclass(frozen=True)
class Bench:
    split: SplitTwin
    proxy: Proxy
    engine: Engine
    prompts: list[list[int]]
    expected: list[tuple[int, ...]]
    new_tokens: int
    marks: Path

    def run(self, fault: Fault, meanwhile: AbstractContextManager[object]) -> Row:
        """Ask all prompts while the fault, and what goes on meanwhile, last."""
        dispatcher = self.engine.dispatcher
        dispatcher.settle()
        dispatcher.take()
        dispatcher.caller = Caller(dispatcher.client, dispatcher.pool, dispatcher.sent, LastResort(str(self.split.shards)))
        self.proxy.sent.clear()
        before, equal, errors, calls, tpot_s = self.billed(), 0, 0, list[Invocation](), list[float]()
        with meanwhile:
            for number, (prompt, tokens) in enumerate(zip(self.prompts, self.expected, strict=True)):
                self.proxy.fault = faults.healthy if number < WARM else fault
                try:
                    made = self.engine.generate(prompt, self.new_tokens)
                except Exception as error:
                    errors += 1
                    print(f"  {error}")
                    calls += dispatcher.take()
                    continue
                calls += made.invocations
                equal += made.token_ids == tokens
                if number >= WARM and made.tpot_s is not None:
                    tpot_s.append(made.tpot_s)
        self.proxy.fault = faults.healthy
        time.sleep(1.5)  # for tries that nobody waited for
        calls += dispatcher.take()
        made_once = [call for call in calls if not call.late]
        billed = self.billed()
        return Row(
            equal=equal,
            errors=errors,
            calls=len(made_once),
            attempts=self.proxy.sent.total(),
            retries=sum(call.retries for call in made_once),
            hedges=sum(call.hedges for call in made_once),
            fallbacks=sum(call.fallbacks for call in made_once),
            unreported=sum(call.unreported for call in calls),
            missing=Billed(
                billed.tries - before.tries - sum(call.billed_tries for call in calls),
                billed.ms - before.ms - sum(call.billed_ms for call in calls),
            ),
            tpot_s=tuple(tpot_s),
        )

    def billed(self) -> Billed:
        """What the twin's meter has."""
        counted = [pool.counters for pool in self.split.twin.twin.pools.values()]
        return Billed(sum(each.invocations for each in counted), sum(each.billed_ms for each in counted))

    def other_layers(self) -> dict[str, str]:
        """Each function, and that of the layer after it with as many experts."""
        layers = list(self.split.functions)
        after = dict(zip(layers, [*layers[1:], layers[0]], strict=True))
        pairs = [(mine.name, self.split.functions[after[n]][i].name) for n in layers for i, mine in enumerate(self.split.functions[n])]
        return dict(pairs)

    @property
    def faults(self) -> dict[str, Callable[[], tuple[Fault, AbstractContextManager[object]]]]:
        """By name, a fault of the calls, and what goes on meanwhile."""
        functions = [function.name for some in self.split.functions.values() for function in some]
        twin = self.split.twin
        return {
            "none": lambda: (faults.healthy, nullcontext()),
            "worker killed every 2 s": lambda: (faults.healthy, faults.killing(twin, 2.0)),
            "20% of calls fail": lambda: (faults.some(0.2, faults.fails), nullcontext()),
            "5% take 10 times as long": lambda: (faults.slow_share(0.05, 10), nullcontext()),
            "30% throttled": lambda: (faults.some(0.3, faults.throttles), nullcontext()),
            "a replica answers garbage": lambda: (faults.healthy, self.broken(functions[0])),
            "5% truncated": lambda: (faults.some(0.05, faults.truncates), nullcontext()),
            "5% with a wrong bit": lambda: (faults.some(0.05, faults.flips_a_bit), nullcontext()),
            "5% of another layer": lambda: (faults.some(0.05, faults.of_another(self.other_layers())), nullcontext()),
            "3 s without a network": lambda: (faults.no_network_for(3.0), nullcontext()),
            "a function deleted": lambda: (faults.healthy, faults.deleted(twin, functions[-1])),
            "a function out of memory": lambda: (faults.healthy, faults.marked(self.marks, f"hungry-{functions[1]}")),
        }

    @contextmanager
    def broken(self, function: str) -> Iterator[None]:
        """The next worker of the function answers garbage until it is ended."""
        with faults.marked(self.marks, f"broken-{function}"):
            faults.kill(faults.workers(self.split.twin, function))
            yield


@contextmanager
def bench(requests: int, new_tokens: int, folder: Path) -> Iterator[Bench]:
    by_hand(folder, ())
    checkpoint = find(str(folder / "model"))
    spec = read_spec(checkpoint)
    draw = random.Random(0)
    whole = start_engine(checkpoint, spec, {}, lambda connections, timeout_s: None)
    prompts = [[draw.randrange(10, whole.vocabulary) for _ in range(draw.randrange(8, 40))] for _ in range(requests + WARM)]
    expected = [whole.generate(prompt, new_tokens).token_ids for prompt in prompts]
    experts = {layer: range(spec.experts_per_layer) for layer in spec.moe_layers}
    parts = {layer: (tuple(ids[1::4]), tuple(ids[3::4])) for layer, ids in experts.items()}
    mechanism = cages.probe(f"remoe-measure-{os.getpid()}")
    try:
        with faulty_twin(checkpoint, parts, folder, mechanism) as (split, proxy, marks):
            engine = start_engine(checkpoint, spec, split.functions, partial(make_caller, proxy.url))
            try:
                yield Bench(split, proxy, engine, prompts, expected, new_tokens, marks)
            finally:
                engine.dispatcher.pool.shutdown()
                engine.dispatcher.client.close()
    finally:
        for group in mechanism.groups:
            cages.remove(group)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--fault", help="only this one, by its name in the table")
    options = parser.parse_args()
    logging.getLogger("remoe_cli").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, bench(options.requests, options.new_tokens, Path(folder)) as made:
        print(f"{date.today()}, {os.cpu_count()} cores; {options.requests} requests of {options.new_tokens} new tokens each")
        print(
            "| fault | equal tokens | errors | attempts per call | retries | hedges | computed here | bill adds up | TPOT p50 | TPOT p99 |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for name, make in made.faults.items():
            if options.fault not in (None, name):
                continue
            base_s = made.run(*made.faults["none"]()).taken_s
            row = made.run(*make())
            shares = [f"{100 * count / row.calls:.1f}%" for count in (row.retries, row.hedges, row.fallbacks)]
            times = [f"{share:.2f}" for share in row.taken_s / base_s]
            counts = [f"{row.equal} of {len(made.prompts)}", f"{row.errors}", f"{row.attempts / row.calls:.3f}"]
            print(f"| {name} | {' | '.join([*counts, *shares, 'yes' if row.adds_up else 'no', *times])} |", flush=True)
        print(f"Without a fault TPOT is {1e3 * base_s[0]:.0f} ms (p50) and {1e3 * base_s[1]:.0f} ms (p99).")


if __name__ == "__main__":
    main()

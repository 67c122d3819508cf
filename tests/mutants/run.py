"""Mutants of valid inputs through every parser: each is taken, or refused in one sentence, in bounded memory and time.

    python -m tests.mutants.run COUNT [SEED]

says how many mutants a second were tried, how many were taken, and every finding with what makes it again.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from remoe_cli.errors import RemoeError
from tests.mutants import mutate
from tests.mutants.parser import Parser
from tests.mutants.parsers import all_parsers, is_one_sentence

GROWTH_BYTES = 2 << 30  # of the address space
WATCHDOG_S = 120  # for one mutant; far above what any takes on a busy machine
MOST_FINDINGS = 20


class TooSlowError(BaseException):
    """One mutant took longer than the watchdog waits."""


@dataclass
class Tally:
    """What became of mutants.

    findings   by what went wrong, the first mutant that shows it
    """

    tried: int = 0
    taken: int = 0
    findings: dict[str, str] | None = None


def mutant(name: str, parser: Parser, seed: int, number: int) -> bytes:
    """The mutant `number` of a parser: the same for the same seed."""
    random = Random(f"{seed}/{name}/{number}")
    data = random.choice(parser.valid)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        change = random.choice(parser.changes)
        if data:
            try:
                data = change(data, random)
            except Exception:  # of a file that an earlier change has left without checksums or without a head
                data = mutate.flip(data, random)
    return data


def verdict(parser: Parser, data: bytes) -> str:
    """What is wrong with how a parser treats some bytes; empty for nothing, and "taken" where it takes them."""
    signal.alarm(WATCHDOG_S)
    try:
        parser.parse(data)
        return "taken"
    except (RemoeError, *parser.errors) as error:
        return "" if is_one_sentence(error) else f"says {str(error)!r}"[:300]
    except (Exception, TooSlowError) as error:
        return f"raises {type(error).__name__}: {' '.join(str(error).split())[:200]} {_where(error)}"
    finally:
        signal.alarm(0)


def _where(error: BaseException) -> str:
    trace, place = error.__traceback__, ""
    while trace is not None:
        if "remoe_cli" in trace.tb_frame.f_code.co_filename:
            place = f"at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def too_slow(*_: Any) -> None:
    raise TooSlowError


@contextmanager
def watched() -> Iterator[None]:
    """Limit this process's address space, and set its watchdog."""
    before, (soft, hard) = signal.signal(signal.SIGALRM, too_slow), resource.getrlimit(resource.RLIMIT_AS)
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + GROWTH_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def try_all(name: str, parser: Parser, seed: int, numbers: Iterator[int] | range) -> Tally:
    """Try some mutants of one parser."""
    tally = Tally(findings={})
    assert tally.findings is not None
    for number in numbers:
        data = mutant(name, parser, seed, number)
        said = verdict(parser, data)
        tally.tried += 1
        tally.taken += said == "taken"
        if said not in ("", "taken"):
            tally.findings.setdefault(f"{name}: {said}", f"seed {seed}, mutant {number}")
        if len(tally.findings) >= MOST_FINDINGS:
            break
    return tally


def shares(parsers: dict[str, Parser], count: int) -> dict[str, int]:
    """How many of `count` mutants each parser gets."""
    whole = sum(parser.share for parser in parsers.values())
    return {name: max(1, round(count * parser.share / whole)) for name, parser in parsers.items()}


def _part(worker: int, workers: int, count: int, seed: int) -> dict[str, Tally]:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        parsers = all_parsers(Path(folder))
        with watched():
            return {name: try_all(name, parsers[name], seed, range(worker, of, workers)) for name, of in shares(parsers, count).items()}


def main() -> int:
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    workers, begun = os.cpu_count() or 1, time.monotonic()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.starmap(_part, [(worker, workers, count, seed) for worker in range(workers)])
    tried, taken = (sum(getattr(tally, name) for part in parts for tally in part.values()) for name in ("tried", "taken"))
    elapsed_s = time.monotonic() - begun
    findings = {what: mutant for part in parts for tally in part.values() for what, mutant in (tally.findings or {}).items()}
    print(f"{tried:,} mutants with seed {seed} in {elapsed_s:.0f} s, {tried / elapsed_s:,.0f} a second; {taken:,} were taken.")
    for what, which in sorted(findings.items()):
        print(f"  {what} ({which})")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())

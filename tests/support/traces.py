"""Files of requests: writing them, and what is read from them."""

from __future__ import annotations

import json
from pathlib import Path

from remoe_cli.plan.problem.trace_traffic import read_traffic
from remoe_cli.plan.problem.traffic import Traffic

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
TABLE = "n_in,n_out,timestamp\n10,4,0\n20,8,60\n20,8,180\n"


def read(text: str, path: Path) -> Traffic:
    path.write_text(text, encoding="utf-8")
    return read_traffic(path)


def kinds(requests: Traffic) -> list[tuple[float, int, int]]:
    return [(round(kind.share, 12), kind.n_in, kind.n_out) for kind in requests.lengths]


def jsonl(*rows: object) -> str:
    return "\n".join(map(json.dumps, rows))

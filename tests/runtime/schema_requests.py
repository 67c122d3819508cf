"""Requests that schemathesis draws from a server's own OpenAPI document: none may be a fault of the server.

    python -m tests.runtime.schema_requests EXAMPLES [SEED]

asks a server of a tiny model, and prints how many requests it answered, by status.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import schemathesis

from remoe_cli.runtime.limits import Limits
from tests.support.api_server import serving, whole_model
from tests.support.chatml import save_chatml

LIMITS = Limits(whole_s=0.2, streamed_s=0.2)  # a drawn request may ask for any number of tokens


def ask(url: str, examples: int, seed: int = 0) -> Counter[tuple[str, int]]:
    """Draw some requests for each operation, right ones and wrong ones; returns how often each operation had each status."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    seen: Counter[tuple[str, int]] = Counter()
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        for found in schema.get_all_operations():
            operation: Any = found.ok()
            for mode in schemathesis.GenerationMode:
                if mode is schemathesis.GenerationMode.NEGATIVE and operation.method == "get":
                    continue
                _try(client, operation, mode, examples, seed, seen)
    return seen


def _try(client: httpx.Client, operation: Any, mode: Any, examples: int, seed: int, seen: Counter[tuple[str, int]]) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        sent = case.as_transport_kwargs(base_url=str(client.base_url))
        if mode is schemathesis.GenerationMode.POSITIVE and "model" in (sent.get("json") or {}):
            sent["json"]["model"] = ""  # the model that is served, whose name no document knows
        body = {name: sent[name] for name in ("json", "data") if sent.get(name) is not None}
        answer = client.request(sent["method"], sent["url"], **body, headers={"content-type": "application/json"})
        assert answer.status_code < 500, f"{operation.label}: {answer.status_code} {answer.text}"
        if answer.headers["content-type"].startswith("application/json"):
            answer.json()
        seen[operation.label, answer.status_code] += 1

    one()


def main() -> None:
    examples, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as folder, serving(whole_model(save_chatml(Path(folder) / "model")), LIMITS) as url:
        for (operation, status), count in sorted(ask(url, examples, seed).items()):
            print(f"{operation}: {count} with status {status}")


if __name__ == "__main__":
    main()

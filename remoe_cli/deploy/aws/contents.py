"""What a deployment consists of: sizes and digests, no files. Templates, quotas and money need these.

`expected` takes them from a plan, before anything is packaged. Digests are UNKNOWN then, and sizes are those of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from remoe_cli.model.names import function_name
from remoe_cli.plan.document import Plan

UNKNOWN = "0" * 64


@dataclass(frozen=True)
class ExpertFunction:
    """One expert function, which is ended after `timeout_s`.

    `head_bytes` and `head_sha256` are of its shard's head (function/weights.py).
    """

    entry: str
    layer: int
    experts: tuple[int, ...]
    memory_mb: int
    replicas: int
    timeout_s: int
    shard_bytes: int
    shard_sha256: str = UNKNOWN
    head_bytes: int = 0
    head_sha256: str = UNKNOWN


@dataclass(frozen=True)
class Contents:
    """All expert functions, their common code, and the bytes of the main function's files."""

    functions: tuple[ExpertFunction, ...]
    code_bytes: int
    code_unpacked_bytes: int
    main_bytes: int
    code_sha256: str = UNKNOWN
    main_sha256: str = UNKNOWN

    @property
    def known(self) -> bool:
        """Return whether everything has been packaged, so that this can be deployed."""
        return UNKNOWN not in (self.code_sha256, self.main_sha256, *(f.shard_sha256 for f in self.functions))


def expected(plan: Plan) -> Contents:
    """Return the contents that a plan will have when it is packaged."""
    functions = tuple(_functions(plan))
    remote = sum(len(f.experts) for f in functions)
    local = plan.model.experts_per_layer * len(plan.layers) - remote
    return Contents(
        functions=functions,
        code_bytes=0,
        code_unpacked_bytes=0,
        main_bytes=plan.model.fetched_nonexpert_bytes
        + local * plan.model.main_expert_bytes
        + (plan.assistant.bytes if plan.assistant else 0),
    )


def _functions(plan: Plan) -> Iterator[ExpertFunction]:
    for layer in plan.layers:
        for number, experts in enumerate(layer.parts):
            yield ExpertFunction(
                entry=function_name(layer.layer, number, len(layer.parts)),
                layer=layer.layer,
                experts=experts,
                memory_mb=layer.memory_mb,
                replicas=layer.replicas,
                timeout_s=layer.timeout_s,
                shard_bytes=len(experts) * plan.model.fetched_expert_bytes,
            )

"""Names of expert functions, of their shards, resources and logs, and of the demo models."""

from __future__ import annotations

DEMO_NAMES = {"bfloat16": "smolmoe", "float32": "smolmoe-float32"}


def function_name(layer: int, number: int, of: int) -> str:
    """Name function `number`, from 0, of the `of` functions with experts of hidden layer `layer`.

    >>> function_name(3, 0, 1), function_name(3, 1, 2)
    ('layer-003', 'layer-003-1')
    """
    return f"layer-{layer:03d}-{number}" if of > 1 else f"layer-{layer:03d}"

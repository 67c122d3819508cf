"""The products of a model on the CPU: torch's numbers to the bit, as soon as they can be had."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from remoe_cli.function.products import are_needed
from remoe_cli.model.blocked import block_weights
from remoe_cli.model.ordered import order_weights


def prepare_products(model: nn.Module, experts: Iterable[nn.Module]) -> None:
    """Make the linear layers and experts modules of a loaded model ready, in place.

    With instructions for bfloat16 their weights go into oneDNN's blocks, without them products of our own follow torch's order.
    A second call changes nothing.
    """
    (order_weights if are_needed() else block_weights)(model, experts)

"""server.json: what a main function serves and calls, and the prices of its receipts."""

from __future__ import annotations

from remoe_cli import artifacts
from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.record import ModelRef
from remoe_cli.runtime.receipt import Prices


class ServedFunction(artifacts.Part):
    """An expert function of hidden layer `layer`, which may have several (runtime/dispatch.py)."""

    layer: artifacts.LayerIndex
    function: str
    experts: artifacts.Experts
    replicas: artifacts.Replicas
    expert_rows: artifacts.NonNegative


class ServerConfig(artifacts.Document):
    """The document server.json, the same for every target.

    model   the model that was profiled; a main function with packaged files reads only those
    gpu     whether the plan puts everything but the experts on a GPU

    Where functions are called is not in it; the program that starts the main function knows that.
    """

    schema_version: str = "remoe.server/2"
    model: ModelRef
    spec: MoeSpec
    functions: tuple[ServedFunction, ...]
    prices: Prices
    gpu: bool = False

"""server.json: what a main function is told about the model that it serves and the functions that it calls."""

from __future__ import annotations

from remoe_cli import artifacts
from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.record import ModelRef
from remoe_cli.runtime.receipt import Prices


class ServedFunction(artifacts.Part):
    """A function of hidden layer `layer` (runtime/dispatch.py, RemoteFunction); a layer may have several."""

    layer: int
    function: str
    experts: tuple[int, ...]
    replicas: int
    expert_rows: float


class ServerConfig(artifacts.Document):
    """The same wherever the main function runs. `model` is what was profiled; a main function that has a share of it reads only that.

    `gpu` is whether the plan has a GPU for all but the experts. Where the functions are called is not in it: what starts the main
    function says so.
    """

    schema_version: str = "remoe.server/2"
    model: ModelRef
    spec: MoeSpec
    functions: tuple[ServedFunction, ...]
    prices: Prices
    gpu: bool = False

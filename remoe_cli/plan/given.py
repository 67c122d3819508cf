"""A placement from a file: a plan, or only its `main` and `layers`, to be priced without solving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from remoe_cli.errors import InfeasibleError, UsageError
from remoe_cli.plan import main_side
from remoe_cli.plan.cost import layer_outcome
from remoe_cli.plan.document import LayerPlan, MainSpec
from remoe_cli.plan.problem import MB, Placement, Problem

_FORM = "Give a plan, or JSON with `main` (a name of the catalog's menu, or a spec) and `layers` as a plan has them."


class _Given(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    main: MainSpec | str
    instances: int = 1
    layers: tuple[LayerPlan, ...]


def read_placement(path: Path, problem: Problem) -> Placement:
    """Raises UsageError for a file that is no placement of this model on this catalog, InfeasibleError for one that does not fit it."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        given = _Given.model_validate(data)
    except (OSError, ValueError) as error:
        said = error.errors()[0] if isinstance(error, ValidationError) else None
        what = f"wrong at '{'.'.join(map(str, said['loc'])) or 'the whole'}': {said['msg']}" if said else str(error)
        raise UsageError(f"The placement {path} is {what}." if said else f"The placement {path} cannot be read: {what}.", _FORM) from None
    name = given.main if isinstance(given.main, str) else given.main.name
    main = next((spec for spec in problem.catalog.main.menu if spec.name == name and given.main in (name, spec)), None)
    if main is None:
        known = ", ".join(spec.name for spec in problem.catalog.main.menu[:6])
        raise UsageError(
            f"The placement's main function '{name}' is not on the menu of the catalog {problem.catalog.name}.", f"Known: {known}, .."
        )
    _check_layers(path, problem, given.layers)
    placement = Placement(main, given.layers, given.instances)
    for broken in broken_limits(problem, placement):
        raise InfeasibleError(f"The placement {path} does not fit: {broken}.", "Change the placement, or take another catalog.")
    return placement


def _check_layers(path: Path, problem: Problem, layers: tuple[LayerPlan, ...]) -> None:
    side, spec = problem.catalog.function, problem.spec
    if tuple(layer.layer for layer in layers) != spec.moe_layers:
        raise UsageError(f"The placement {path} does not have exactly the model's MoE layers {spec.moe_layers}, in order.", _FORM)
    for layer in layers:
        inside = all(0 <= e < spec.experts_per_layer for e in layer.remote) and list(layer.remote) == sorted(set(layer.remote))
        divided = sorted(e for part in layer.functions for e in part) == list(layer.remote) if layer.functions else True
        sized = (layer.memory_mb in side.memory_menu_mb and 1 <= layer.replicas <= side.max_replicas) if layer.remote else True
        if not (inside and divided and sized and len(layer.parts) <= side.max_functions):
            raise UsageError(
                f"Layer {layer.layer} of the placement {path} names experts, memory, functions or replicas that there are not.",
                f"Experts ascend from 0 to {spec.experts_per_layer - 1}; memory is one of the menu's, from {side.memory_menu_mb[0]} MB.",
            )


def broken_limits(problem: Problem, placement: Placement) -> list[str]:
    """Memory, payload and concurrency limits that a placement breaks, as parts of a sentence; targets are not looked at."""
    side, out = problem.catalog.function, []
    local = sum(problem.spec.experts_per_layer - len(layer.remote) for layer in placement.layers)
    capacity = main_side.local_capacity(problem, placement.main)
    if local > capacity:
        out.append(f"{placement.main.name} holds {max(0, capacity)} experts beside the rest of the model, and {local} are local")
    for index, layer in enumerate(placement.layers):
        part = layer_outcome(problem, placement, index)
        if part.function_bytes > layer.memory_mb * MB:
            out.append(f"the experts of layer {layer.layer} need {part.function_bytes / MB:.0f} MB in a function of {layer.memory_mb} MB")
        if part.largest_payload_bytes > side.payload_limit_bytes:
            out.append(
                f"a prompt sends {part.largest_payload_bytes:.0f} bytes to layer {layer.layer}, and {side.payload_limit_bytes} may be sent"
            )
    working = sum(len(layer.parts) * layer.replicas for layer in placement.layers)
    if working > side.concurrency_limit:
        out.append(f"{working} instances of functions are more than the {side.concurrency_limit} that may work at once")
    return out

"""A placement from a file, to be priced without solving: a plan, or only its `main` and `layers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from remoe_cli import bounded
from remoe_cli.artifacts import MOST_LAYERS, first_mistake, shown
from remoe_cli.errors import InfeasibleError, UsageError
from remoe_cli.plan.cost import main_function
from remoe_cli.plan.cost.placement import busy_s, layer_outcome, total
from remoe_cli.plan.cost.requests import broken
from remoe_cli.plan.document import LayerPlan, MainSpec
from remoe_cli.plan.problem.aim import SLACK
from remoe_cli.plan.problem.problem import MB, Placement, Problem

_FORM = "Give a plan, or JSON with `main` (a name of the catalog's menu, or a spec) and `layers` as a plan has them."


class _Given(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    main: MainSpec | str
    instances: int = Field(default=1, le=1_000_000)
    layers: tuple[LayerPlan, ...] = Field(max_length=MOST_LAYERS)


def read_placement(path: Path, problem: Problem) -> Placement:
    """Read a placement for this problem from a file.

    Raises: UsageError for a file that is no placement of this model on this catalog; InfeasibleError for one that does not fit it.
    """
    try:
        data: Any = bounded.parse_json(bounded.read_bytes(path, bounded.DOCUMENT), finite=True)
        given = _Given.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"The placement {path} is wrong {first_mistake(error)}.", _FORM) from None
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"The placement {path} cannot be read: {what}.", _FORM) from None
    name = given.main if isinstance(given.main, str) else given.main.name
    main = next((spec for spec in problem.catalog.main.menu if spec.name == name and given.main in (name, spec)), None)
    if main is None:
        known = ", ".join(spec.name for spec in problem.catalog.main.menu[:6])
        raise UsageError(
            f"The placement's main function {shown(name)} is not on the menu of the catalog {problem.catalog.name}.",
            f"Use one of the menu: {known}, ..",
        )
    if main not in problem.menu:
        raise UsageError(
            f"The placement's main function '{name}' is rented by the hour, so a request has no price without traffic.",
            "Give --requests-per-hour N.",
        )
    if given.instances < 1 or (given.instances > 1 and not main_function.always_on(problem, main)):
        raise UsageError(
            f"The placement has {given.instances} instances of '{name}', but only rented ones, at a known traffic, can be several.",
            "Leave `instances` out, or give --requests-per-hour.",
        )
    _check_layers(path, problem, given.layers)
    placement = Placement(main, given.layers, given.instances)
    for limit in broken_limits(problem, placement):
        raise InfeasibleError(f"The placement {path} does not fit: {limit}.", "Change the placement, or use another catalog.")
    return placement


def _check_layers(path: Path, problem: Problem, layers: tuple[LayerPlan, ...]) -> None:
    side, spec = problem.catalog.function, problem.spec
    if tuple(layer.layer for layer in layers) != spec.moe_layers:
        raise UsageError(f"The placement {path} does not have exactly the model's MoE layers {spec.moe_layers}, in order.", _FORM)
    form = (
        f"Experts ascend, from 0 to {spec.experts_per_layer - 1}. Memory is one of the menu, from {side.memory_menu_mb[0]} MB. Without "
        f"remote experts, memory and replicas are 0. 2 to {side.max_functions} functions have 1 replica and hold each expert once."
    )
    for layer in layers:
        inside = all(
            all(0 <= e < spec.experts_per_layer for e in ids) and list(ids) == sorted(set(ids)) for ids in (layer.remote, layer.gpu)
        )
        most = 1 if layer.functions else side.max_replicas
        sized = layer.memory_mb in side.memory_menu_mb and 1 <= layer.replicas <= most
        if not layer.remote:
            sized = (layer.memory_mb, layer.replicas, layer.functions) == (0, 0, ())
        held = sorted(e for part in layer.functions for e in part) == list(layer.remote) and all(layer.functions)
        divided = not layer.functions or (held and 2 <= len(layer.functions) <= side.max_functions)
        if not (inside and sized and divided):
            raise UsageError(
                f"Layer {layer.layer} of the placement {path} names experts, memory, functions or replicas that cannot be.",
                form,
            )


def broken_limits(problem: Problem, placement: Placement) -> list[str]:
    """Say which limits a placement breaks, as parts of a sentence.

    Limits are those of memory, payload, concurrency and time, for every request; targets are not checked.
    """
    problem = problem.at_main(placement.main)
    side, out, parts = problem.catalog.function, [], []
    gpu = sum(len(layer.gpu) for layer in placement.layers)
    local = sum(problem.spec.experts_per_layer - len(layer.remote) for layer in placement.layers) - gpu
    capacity, gpu_capacity = (held(problem, placement.main) for held in (main_function.local_capacity, main_function.gpu_capacity))
    beside = f"{placement.main.name} holds {max(0, capacity)} experts beside the rest of the model"
    if local > capacity:
        out.append(f"{beside}, but {local} are local{' and not on the GPU' if gpu else ''}")
    if local + gpu > (fetched := main_function.fetch_capacity(problem, placement.main)):
        out.append(f"the /tmp of {placement.main.name} holds {max(0.0, fetched):.0f} experts beside the rest, but {local + gpu} are local")
    if gpu > gpu_capacity:
        out.append(f"the GPU of {placement.main.name} holds {gpu_capacity} experts beside the rest of the model, but {gpu} are on it")
    for index, layer in enumerate(placement.layers):
        part = layer_outcome(problem, placement, index)
        parts.append(part)
        if part.function_bytes > layer.memory_mb * MB:
            out.append(f"the experts of layer {layer.layer} need {part.function_bytes / MB:.0f} MB in a function of {layer.memory_mb} MB")
    working = sum(len(layer.parts) * layer.replicas for layer in placement.layers)
    if working > side.concurrency_limit:
        out.append(f"{working} instances of functions are more than the {side.concurrency_limit} that may work at once")
    outcome, longest_s = total(problem, placement, parts), main_function.longest_mean_s(problem, placement.bought)
    if (request_s := busy_s(problem, placement, outcome, parts)) > longest_s * (1 + SLACK):
        out.append(f"a request takes {request_s:.4g} s, but {placement.instances} x {placement.main.name} has {longest_s:.4g} s for it")
    return [*out, *(one.text for one in broken(problem, placement))]

"""What solvers.py measures: models, settings of the paper's catalog, made-up and recorded routing, and one solver on one of them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from synthetic_routing import Law, draw

from remoe_cli.model.spec import KvLayer, MoeSpec
from remoe_cli.plan.build import make_plan
from remoe_cli.plan.catalog.catalog import Catalog, read_catalog
from remoe_cli.plan.cost import main_function
from remoe_cli.plan.cost.placement import evaluate, layer_outcome
from remoe_cli.plan.document import BaselineName, MainSpec, Outcome, Plan
from remoe_cli.plan.problem.aim import Aim, meets
from remoe_cli.plan.problem.problem import GB_MB, MB, Placement, Problem, local_layers
from remoe_cli.plan.problem.request import PlanRequest, make_problem
from remoe_cli.plan.solve.exact import Solution
from remoe_cli.profile.hardware import latency_from
from remoe_cli.profile.imports.importer import import_routing
from remoe_cli.profile.record import DatasetRef, ModelRef, Profile, ProfileRecord, write_profile

N_IN, N_OUT = 125, 200  # the paper's requests: 500 characters, 200 tokens
SLOWER = 1.5  # the TPOT target, in MIX's
LIMIT_S = 180.0
MAIN_SPECS = 200  # of a menu for a model that the catalog's does not hold


def _spec(
    family: str,
    hidden: int,
    layers: int,
    dense: int,
    experts: int,
    top_k: int,
    expert_bytes: int,
    nonexpert_bytes: int,
    kv_bytes: int,
    dtype: str = "bfloat16",
) -> MoeSpec:
    return MoeSpec(
        family=family,
        dtype=dtype,
        hidden_size=hidden,
        hidden_layers=layers,
        moe_layers=tuple(range(dense, layers)),
        experts_per_layer=experts,
        top_k=top_k,
        expert_bytes=expert_bytes,
        nonexpert_bytes=nonexpert_bytes,
        hidden_state_bytes=hidden * (2 if dtype == "bfloat16" else 4),
        kv_layers=(KvLayer(bytes_per_token=kv_bytes),) * layers,
    )


@dataclass(frozen=True)
class Setting:
    """What is varied of the paper's catalog and hardware; `targeted`: TPOT at most SLOWER times MIX's. Menus go up to so many MB."""

    cap: int = 8
    t_rem_ms: float = 5.0
    price: float = 3.0
    targeted: bool = True
    functions_mb: int = 10_000
    mains_mb: int = 40_000


@dataclass(frozen=True)
class Size:
    """A model, its setting, and whether the plain programme is tried on it."""

    spec: MoeSpec
    setting: Setting
    plain: bool


def _gpt2(layers: int) -> MoeSpec:
    """GPT-2 124M as it is stored, with 8 of each layer's FFN (768 x 3072, with biases) and a router."""
    return _spec("gpt2", 768, layers, 0, 8, 2, 18_889_728, 271_377_408, 6144, "float32")


LITE = "DeepSeek-V2-Lite"
SMALL = Setting(1, functions_mb=2000, mains_mb=5000)  # the paper's menus for GPT2-moe
# As read_spec (model/spec.py) reads them from each model's config.json.
MODELS = {
    "GPT2-moe, 3 of its layers": Size(_gpt2(3), SMALL, True),
    "GPT2-moe": Size(_gpt2(12), SMALL, True),
    "Mixtral-8x7B": Size(_spec("mixtral", 4096, 32, 0, 8, 2, 352_321_536, 3_211_272_192, 4096), Setting(8), True),
    LITE: Size(_spec("deepseek_v2", 2048, 27, 1, 64, 6, 17_301_504, 2_623_265_792, 1152), Setting(8), False),
    "Qwen3-30B-A3B": Size(_spec("qwen3_moe", 2048, 48, 0, 128, 8, 9_437_184, 3_082_186_752, 2048), Setting(8), False),
    "DeepSeek-V3": Size(_spec("deepseek_v3", 7168, 61, 3, 256, 8, 88_080_384, 34_235_267_072, 1152), Setting(64), False),
}


# With 64 vCPUs, more than any main function of the menu has, remote experts hardly pay even at 1 ms.
GRID = [*(Setting(cap, t_rem_ms) for cap in (8, 16) for t_rem_ms in (1.0, 5.0, 10.0)), Setting(64, 1.0)]
PRICES = [Setting(price=price) for price in (1.0, 5.0, 10.0)]
UNTARGETED = Setting(targeted=False)
LAWS = [Law("zipf", 1.0), Law("zipf", 1.5), Law("zipf", 2.0), Law("dirichlet", 0.1)]


def cases(recorded: bool) -> list[tuple[str, Setting]]:
    laws = [*map(str, LAWS), *(["recorded"] if recorded else [])]
    varied = [str(Law("zipf", 1.5)), *(["recorded"] if recorded else [])]
    return [
        *((law, setting) for law in laws for setting in GRID),
        *((law, setting) for law in varied for setting in PRICES),
        *((law, UNTARGETED) for law in laws),
    ]


@cache
def hardware(folder: Path, cap: int) -> str:
    """The description 'paper' with another saturation, as a file, for the CPU baseline reads its hardware by name."""
    text = (resources.files("remoe_cli.profile") / "hardware" / "paper.toml").read_text(encoding="utf-8")
    main, rest = text.split("[gpu]", 1)
    main = re.sub(r"(?m)^saturation_vcpus = .*$", f"saturation_vcpus = {float(cap)}", main)
    main = re.sub(r"(?m)^vcpus = .*$", f"vcpus = {max(40.0, cap)}", main)
    file = folder / f"cap-{cap}.toml"
    file.write_text(f"{main}[gpu]{rest}", encoding="utf-8")
    return str(file)


def catalog(spec: MoeSpec, setting: Setting, described: str) -> Catalog:
    base = read_catalog("paper")
    memory_mb = tuple(mb for mb in base.function.memory_menu_mb if mb <= setting.functions_mb)
    function = base.function.model_copy(update={"warm_billed_s": setting.t_rem_ms / 1000, "memory_menu_mb": memory_mb})
    accelerator = setting.price * base.main_usd_per_gb_second
    menu = tuple(main for main in base.main.menu if main.memory_mb <= setting.mains_mb)
    main = base.main.model_copy(update={"usd_per_accelerator_gb_second": accelerator, "menu": _menu(spec, menu)})
    reference = base.reference.model_copy(update={"hardware": described})
    return base.model_copy(update={"function": function, "main": main, "reference": reference})


def _menu(spec: MoeSpec, menu: tuple[MainSpec, ...]) -> tuple[MainSpec, ...]:
    """The catalog's main functions, or as many as MAIN_SPECS even steps up to the whole model, where that needs more; 1 GB = 1 vCPU."""
    needed_mb = 1.02 * (spec.routed_bytes + spec.nonexpert_bytes) / MB
    if menu[-1].memory_mb >= needed_mb:
        return menu
    step = -(-int(needed_mb) // MAIN_SPECS // 100) * 100
    memory = range(step, int(needed_mb) + step + 1, step)
    return tuple(MainSpec(name=f"main-{mb}", memory_mb=mb, vcpus=mb / GB_MB) for mb in memory)


def imported(file: Path, spec: MoeSpec, described: str) -> Profile:
    """A profile of the file's routing, beside it."""
    routing = import_routing(file, spec)
    record = ProfileRecord(
        model=ModelRef(path=spec.family, revision=""),
        dataset=DatasetRef(source=file.name, field="", prompts=routing.rows, sha256=routing.routing.sha256 or ""),
        settings=None,
        routing=routing.routing,
        spec=spec,
        latency=latency_from(described, spec),
        arrays_sha256="",
    )
    return write_profile(file.with_suffix(""), record, routing.arrays | {"prompt_vectors": np.empty((routing.rows, 0), dtype=np.float32)})


def drawn(folder: Path, law: Law, spec: MoeSpec, described: str) -> Profile:
    file = folder / f"synthetic {law}.npz"
    np.savez(file, **draw(spec, law))
    return imported(file, spec, described)


@dataclass(frozen=True)
class Asked:
    """One profile, catalog and aim."""

    profile: Profile
    catalog: Catalog
    aim: Aim

    def problem(self) -> Problem:
        """A new one each time, for a problem keeps what one solver has worked out of its routing, and the next would be faster."""
        return make_problem(self.profile, self.catalog, self.request())

    def request(self) -> PlanRequest:
        return PlanRequest(aim=self.aim, n_in=N_IN, n_out=N_OUT, time_limit_s=LIMIT_S, examine=False)


def asked(profile: Profile, setting: Setting, folder: Path) -> Asked:
    spec, described = profile.record.spec, hardware(folder, setting.cap)
    record = profile.record.model_copy(update={"latency": latency_from(described, spec)})
    aimless = Asked(replace(profile, record=record), catalog(spec, setting, described), Aim())
    if not setting.targeted:
        return aimless
    return replace(aimless, aim=Aim(tpot_s=SLOWER * mix(aimless.problem()).tpot_s))


def mix(problem: Problem) -> Outcome:
    """All experts local on the smallest main function that holds them."""
    experts = problem.spec.experts_per_layer * len(problem.spec.moe_layers)
    smallest = next(spec for spec in problem.catalog.main.menu if main_function.local_capacity(problem, spec) >= experts)
    return evaluate(problem, Placement(smallest, local_layers(problem)))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


@dataclass(frozen=True)
class Found:
    """A solver's plan: cost in the all-local plan's (MIX*), cost above exact's, share of experts remote, limits that it breaks."""

    seconds: float
    cost: float | None
    gap: float | None
    remote: float | None
    broken: tuple[str, ...] = ()


def heuristic(solver: Callable[[Problem, Aim], Solution | None], case: Asked, local_usd: float, exact_usd: float) -> Found:
    problem = case.problem()
    seconds, solution = timed(lambda: solver(problem, case.aim))
    if solution is None:
        return Found(seconds, None, None, None)
    placement = solution.placement
    usd = evaluate(problem, placement).cost_usd_per_request
    broken = broken_limits(problem, case.aim, placement)
    if abs(usd - solution.value) > 1e-9 * usd:
        broken = (*broken, "its own cost")
    return Found(seconds, usd / local_usd, usd / exact_usd - 1, remote_share(problem, placement), broken)


def remote_share(problem: Problem, placement: Placement | Plan) -> float:
    return sum(len(layer.remote) for layer in placement.layers) / (problem.spec.experts_per_layer * len(placement.layers))


def broken_limits(problem: Problem, aim: Aim, placement: Placement) -> tuple[str, ...]:
    """Which limits a placement breaks, whatever its solver says."""
    side = problem.catalog.function
    parts = [layer_outcome(problem, placement, index) for index in range(len(placement.layers))]
    local = sum(problem.spec.experts_per_layer - len(layer.remote) for layer in placement.layers)
    held = {
        "target": meets(aim, evaluate(problem, placement)),
        "main memory": local <= main_function.local_capacity(problem, placement.main),
        "function memory": all(p.function_bytes <= layer.memory_mb * MB for p, layer in zip(parts, placement.layers, strict=True)),
        "payload": all(p.largest_payload_bytes <= side.payload_limit_bytes for p in parts),
        "replicas": all(layer.replicas <= side.max_replicas for layer in placement.layers),
    }
    return tuple(name for name, keeps in held.items() if not keeps)


def exact_plan(case: Asked, local: BaselineName = BaselineName.ALL_LOCAL) -> tuple[Found, Plan]:
    seconds, plan = timed(lambda: make_plan(case.profile, case.catalog, case.request()))
    problem = case.problem()
    broken = broken_limits(problem, case.aim, Placement(plan.main, plan.layers))
    cost = plan.cost_usd_per_request / plan.baselines[local].cost_usd_per_request
    return Found(seconds, cost, plan.gap, remote_share(problem, plan), broken), plan

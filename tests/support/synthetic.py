"""Synthetic profiles for tests: real Profile objects, on disk or only in memory, of any shape and skew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from remoe_cli.model.spec import KvLayer, MoeSpec
from remoe_cli.plan.build import make_plan
from remoe_cli.plan.catalog.catalog import Catalog, read_catalog
from remoe_cli.plan.document import Costs, LayerPlan, MainSpec, Plan, PlannedModel, Source, Targets, WorkloadRef
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.plan.problem.request import PlanRequest, make_problem
from remoe_cli.profile.latency_record import InvocationTiming, Latency, Linear, Physical, Quantiles, Timing
from remoe_cli.profile.record import DatasetRef, ModelRef, Profile, ProfileRecord, RecordingSettings, write_profile

MB = 2**20


def synthetic_profile(
    path: Path,
    *,
    layers: int = 2,
    experts: int = 4,
    top_k: int = 2,
    skew: float = 1.0,
    prompts: int = 20,
    prompt_tokens: int = 40,
    decode_tokens: int = 15,
    expert_mb: float = 20.0,
    nonexpert_mb: float = 200.0,
    hidden_size: int = 1024,
    main_vcpus: float = 2,
    local_expert: tuple[float, float] = (2e-4, 1e-4),
    remote_expert: tuple[float, float] = (3e-4, 2e-4),
    nonexpert_decode_s: float = 0.005,
    seed: int = 0,
) -> Profile:
    """Write and return a profile whose experts are used with Zipf weights of exponent `skew`, in a random order per layer.

    Tokens choose `top_k` distinct experts by Gumbel top-k; each prompt shifts the weights a little.
    """
    random = np.random.default_rng(seed)
    popularity = np.stack([random.permutation(-skew * np.log(np.arange(1, experts + 1))) for _ in range(layers)])
    prefill, decode = (np.zeros((prompts, layers, experts), dtype=np.int32) for _ in range(2))
    trace = []
    for prompt in range(prompts):
        logits = popularity + 0.5 * random.standard_normal((layers, experts))
        gumbel = random.gumbel(size=(prompt_tokens + decode_tokens, layers, experts))
        chosen = np.argsort(-(logits + gumbel), axis=2)[:, :, :top_k]
        for counts, part in ((prefill, chosen[:prompt_tokens]), (decode, chosen[prompt_tokens:])):
            for layer in range(layers):
                counts[prompt, layer] = np.bincount(part[:, layer].ravel(), minlength=experts)
        trace.append(chosen[prompt_tokens:])
    arrays: dict[str, Any] = {
        "prefill_counts": prefill,
        "decode_counts": decode,
        "prompt_tokens": np.full(prompts, prompt_tokens, dtype=np.int32),
        "decode_tokens": np.full(prompts, decode_tokens, dtype=np.int32),
        "prompt_vectors": random.standard_normal((prompts, hidden_size)).astype(np.float32),
        "trace_ids": np.concatenate(trace).astype(np.int16),
        "trace_prompt": np.repeat(np.arange(prompts, dtype=np.int32), decode_tokens),
    }
    spec = MoeSpec(
        family="mixtral",
        dtype="bfloat16",
        hidden_size=hidden_size,
        hidden_layers=layers + 1,
        moe_layers=tuple(range(1, layers + 1)),
        experts_per_layer=experts,
        top_k=top_k,
        expert_bytes=round(expert_mb * MB),
        nonexpert_bytes=round(nonexpert_mb * MB),
        hidden_state_bytes=2 * hidden_size,
        kv_layers=tuple(KvLayer(bytes_per_token=1024) for _ in range(layers + 1)),
    )
    latency = Latency(
        source="measured",
        machine="synthetic",
        measured_on="2026-01-01",
        main_vcpus=main_vcpus,
        nonexpert_prefill=Linear(fixed_s=0.004, per_token_s=2e-4),
        nonexpert_decode_s=nonexpert_decode_s,
        nonexpert_layers=None,
        local_expert=inverse(*local_expert, at_vcpus=main_vcpus),
        remote_expert=inverse(*remote_expert, at_vcpus=1),
        copy_s=Linear(fixed_s=0.0, per_token_s=0.0),
        load_s=1.0,
    )
    record = ProfileRecord(
        model=ModelRef(path="synthetic", revision="local:0"),
        dataset=DatasetRef(source="synthetic", field="prompt", prompts=prompts, sha256="0" * 64),
        settings=RecordingSettings(
            max_new_tokens=decode_tokens + 1, max_prompt_tokens=512, batch_size=1, chat_template=False, dtype="bfloat16"
        ),
        spec=spec,
        latency=latency,
        arrays_sha256="",
    )
    return write_profile(path, record, arrays)


def plan_by_hand(layers: tuple[LayerPlan, ...], **update: Any) -> Plan:
    """A plan of these layers that no planner made; its figures mean nothing."""
    source = Source(path="nowhere", sha256="0" * 64)
    plan = Plan(
        profile=source,
        catalog=source,
        prices_of="2026-01-01",
        model=PlannedModel(name="synthetic", revision="local:0", experts_per_layer=8, expert_bytes=1000, nonexpert_bytes=1000),
        workload=WorkloadRef(n_in=10, n_out=10),
        targets=Targets(),
        objective="cost",
        method="forced",
        cost_usd_per_request=1.0,
        ttft_s=1.0,
        tpot_s=1.0,
        lower_bound_usd=0.0,
        gap=1.0,
        status="forced",
        verdict="insufficient-evidence",
        basis="too-few-tokens",
        reason="a test",
        notes=(),
        main=MainSpec(name="m", memory_mb=1000),
        layers=layers,
        costs=Costs(main_usd=1.0, layers_usd=(0.0,) * len(layers)),
        baselines={},
    )
    return plan.model_copy(update=update)


def inverse(fixed_s: float, per_token_s: float, at_vcpus: float) -> Timing:
    """fixed_s + per_token_s * tokens at `at_vcpus`, inversely proportional to the vCPUs."""
    curve = Physical(overhead_s=0.0, weights_s=fixed_s * at_vcpus, per_token_s=per_token_s * at_vcpus)
    return Timing(curve=curve, held_out_error=None, errors={}, points=(), residuals=())


def quantiles(tenths: list[float]) -> Quantiles:
    """Ten equally likely values and the quantiles that go with them."""
    return Quantiles(p50=tenths[4], p90=tenths[8], p99=tenths[9], tenths=tuple(tenths))


def invocation(seed: int) -> InvocationTiming:
    """A live target with a spread of about a millisecond, inside and outside the function."""
    random = np.random.default_rng(seed)
    unbilled, billed = (np.sort(random.uniform(2e-4, 3e-3, size=10)).tolist() for _ in range(2))
    return InvocationTiming(
        target="t", measured_on="2026-01-01", unbilled_s=quantiles(unbilled), billed_s=quantiles(billed), bytes_per_s=5e7, samples=()
    )


def tiny_catalog(main: dict[str, Any] | None = None, storage: dict[str, Any] | None = None, **function: Any) -> Catalog:
    """The `local` catalog with a small main menu (override in `main`) and a few function specs; `function` overrides those."""
    local = read_catalog("local").model_dump()
    menu = [{"name": f"m{mb}", "memory_mb": mb, "vcpus": mb / 1769} for mb in (900, 1200, 1800, 3000)]
    local["main"] |= {"menu": menu} | (main or {})
    local["function"] |= {"memory_menu_mb": [128, 256, 512], "max_replicas": 2} | function
    local["storage"] |= storage or {}
    named = {field for entry in local["provenance"] for field in entry["of"]}
    given = {"function": function, "main": main or {}, "storage": storage or {}}
    if further := tuple(sorted({f"{side}.{name}" for side, fields in given.items() for name in fields} - named)):
        local["provenance"] += ({"of": further, "date": "2026-05-01", "region": "all", "source": "test"},)
    return Catalog.model_validate(local)


def plan_of(profile: Profile, catalog: Catalog, *, examine: bool = False, **options: Any) -> Plan:
    """A plan from flat options: those of the aim and those of `PlanRequest`; not examined for robustness unless asked."""
    aim = {name: options.pop(name) for name in ("objective", "ttft_s", "tpot_s", "budget_usd", "ttft_percentile") if name in options}
    return make_plan(profile, catalog, PlanRequest(aim=Aim(**aim), examine=examine, **options))


def problem_of(profile: Profile, catalog: Catalog, **options: Any) -> Problem:
    return make_problem(profile, catalog, PlanRequest(**options))

"""Small plans for AWS, one for each kind of endpoint, with all digests known; and what is in a template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from remoe_cli.deploy.aws.contents import Contents, ExpertFunction
from remoe_cli.deploy.aws.settings import AwsSettings
from remoe_cli.deploy.aws.template import Template, Templates
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.plan.document import Costs, LayerPlan, MainSpec, Plan, Waking, WorkloadRef
from tests.support.synthetic import plan_by_hand

IMAGE = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/remoe@sha256:" + "e" * 64
MAINS = {
    Endpoint.aws_lambda: MainSpec(name="lambda-3072", memory_mb=3072),
    Endpoint.sagemaker: MainSpec(name="ml.g5.xlarge", memory_mb=16384, gpu_memory_mb=24576, usd_per_hour=1.408),
    Endpoint.lambda_gpu: MainSpec(
        name="lambda-gpu.g6.xlarge", memory_mb=12288, vcpus=3.0, gpu_memory_mb=24576, usd_per_hour=0.92552, scales_to_zero=True
    ),
    Endpoint.none: MainSpec(name="main-200", memory_mb=200),
}
WAKING = Waking(wake_share=0.01, up_share=0.99)
LAYERS = (
    LayerPlan(layer=0, remote=(), memory_mb=0, replicas=0),
    LayerPlan(layer=1, remote=(0, 2, 5), memory_mb=512, replicas=2),
    LayerPlan(layer=2, remote=(1, 2, 3, 4), memory_mb=3538, replicas=1, functions=((1, 2), (3, 4))),
)


def plan(endpoint: Endpoint, layers: tuple[LayerPlan, ...] = LAYERS, **update: Any) -> Plan:
    """20 requests an hour; a request costs 0.01 in the main function and 0.001 x (1 + layer's place) in a layer that has functions."""
    costs = Costs(main_usd=0.01, layers_usd=tuple(0.001 * (1 + i) if layer.remote else 0.0 for i, layer in enumerate(layers)))
    update = {
        "main": MAINS[endpoint],
        "costs": costs,
        "cost_usd_per_request": costs.main_usd + sum(costs.layers_usd),
        "workload": WorkloadRef(
            n_in=10, n_out=10, requests_per_hour=20, cold_share=0.25, waking=WAKING if endpoint is Endpoint.lambda_gpu else None
        ),
    } | update
    return plan_by_hand(layers, **update)


def contents(plan: Plan) -> Contents:
    """As if packaged: every digest is known."""
    functions = tuple(
        ExpertFunction(
            entry=f"layer-{layer.layer:03d}" + (f"-{number}" if len(layer.parts) > 1 else ""),
            layer=layer.layer,
            experts=experts,
            memory_mb=layer.memory_mb,
            replicas=layer.replicas,
            timeout_s=layer.timeout_s,
            shard_bytes=len(experts) * plan.model.expert_bytes + 400,
            shard_sha256=f"{layer.layer:032x}{number:032x}",
            head_bytes=400,
            head_sha256="d" * 64,
        )
        for layer in plan.layers
        for number, experts in enumerate(layer.parts)
    )
    return Contents(functions, 20 << 20, 60 << 20, main_bytes=2 << 30, code_sha256="c" * 64, main_sha256="a" * 64)


def settings(endpoint: Endpoint, **update: Any) -> AwsSettings:
    given: dict[str, Any] = {"image_uri": None if endpoint is Endpoint.none else IMAGE}
    return AwsSettings(**{"name": "tiny", "architecture": "arm64", "python": "3.13", "endpoint": endpoint} | given | update)


def many_functions(layers: int = 58, owners: int = 8) -> tuple[Plan, Contents, AwsSettings]:
    """As many functions as DeepSeek-V3's plan has, on SageMaker."""
    groups = tuple((i,) for i in range(owners))
    made = tuple(LayerPlan(layer=3 + i, remote=tuple(range(owners)), memory_mb=512, replicas=1, functions=groups) for i in range(layers))
    many = plan(Endpoint.sagemaker, made)
    return many, contents(many), settings(Endpoint.sagemaker)


@st.composite
def deployments(draw: st.DrawFn) -> tuple[Plan, Contents, AwsSettings]:
    """Any deployment that has at least one function: from one template to more functions than one holds, each layer divided or not."""
    endpoint = draw(st.sampled_from(Endpoint))
    numbers = draw(st.lists(st.integers(0, 70), unique=True, min_size=1, max_size=14).map(sorted))
    layers = []
    for number in numbers:
        owners = draw(st.integers(0, 8))
        groups = tuple((2 * i, 2 * i + 1) for i in range(owners))
        memory_mb = draw(st.integers(128, 10240)) if owners else 0
        replicas = draw(st.integers(1, 3)) if owners == 1 else min(owners, 1)
        remote = tuple(e for group in groups for e in group)
        layers.append(
            LayerPlan(layer=number, remote=remote, memory_mb=memory_mb, replicas=replicas, functions=groups if owners > 1 else ())
        )
    if not any(layer.remote for layer in layers):
        layers[0] = LayerPlan(layer=numbers[0], remote=(3,), memory_mb=128, replicas=1)
    made = plan(endpoint, tuple(layers))
    name = draw(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,22}[a-z0-9])?", fullmatch=True))
    return made, contents(made), settings(endpoint, name=name, monthly_alert_usd=draw(st.none() | st.just(20.0)))


def each(made: Templates) -> tuple[Template, ...]:
    return (made.root, *made.nested.values())


def of_type(made: Templates, kind: str) -> dict[str, Any]:
    """Logical id -> resource, in all templates."""
    return {id: r for template in each(made) for id, r in template["Resources"].items() if r["Type"] == f"AWS::{kind}"}


def statements(made: Templates) -> Iterator[dict[str, Any]]:
    """Every statement of what may be done; not of who may take a role."""
    for role in of_type(made, "IAM::Role").values():
        for policy in role["Properties"].get("Policies", ()):
            yield from policy["PolicyDocument"]["Statement"]
    for policy in of_type(made, "IAM::ManagedPolicy").values():
        yield from policy["Properties"]["PolicyDocument"]["Statement"]


def dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    """Every dictionary in a template, at any depth."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from dictionaries(item)

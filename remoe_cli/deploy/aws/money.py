"""Price a deployment line by line: a month at rest, a request, a month of the plan's traffic. Pure.

The main function and the expert functions cost what the plan says, with their /tmp, their logs and what cold starts read from S3
(plan/cost/prices.py): a request costs what the plan says, and nothing more. What is kept, used or not, is in no plan, as no placement
changes it much: the bucket, the image, and logs that were written. Free tiers are left out, as in the catalogs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import fsum

from remoe_cli.deploy.aws import main_function, names
from remoe_cli.deploy.aws.aws_reference import aws_reference
from remoe_cli.deploy.aws.contents import Contents
from remoe_cli.deploy.aws.settings import AwsSettings
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import Plan
from remoe_cli.units import size

HOURS_PER_MONTH = 730
_GB = 2**30
_REGION = re.compile(r"[a-z]{2}(-[a-z]+)+-\d")


@dataclass(frozen=True)
class Line:
    """One thing that is paid for. `resource` is its logical id in the templates; None: it is in none.

    idle_usd_per_month   paid whether it is used or not
    usd_per_request      in the plan's cost
    usd_per_month        at the plan's traffic; None where that is unknown
    planned              whether the plan's cost contains it
    """

    what: str
    resource: str | None
    idle_usd_per_month: float
    usd_per_request: float
    usd_per_month: float | None
    planned: bool
    note: str = ""


@dataclass(frozen=True)
class Money:
    """All lines and their sums.

    usd_per_request          the plan's
    beside_usd_per_request   what comes on top of it: nothing that is known
    """

    lines: tuple[Line, ...]
    usd_per_request: float
    beside_usd_per_request: float
    idle_usd_per_month: float
    usd_per_month: float | None
    notes: tuple[str, ...]


def bill(plan: Plan, catalog: Catalog, contents: Contents, settings: AwsSettings) -> Money:
    """Price a deployment. `catalog` is the plan's; it prices storage and says where the prices are from."""
    lines = (_main(plan, settings), *_functions(plan, contents), *_kept(plan, catalog, contents, settings))
    months = [line.usd_per_month for line in lines if line.usd_per_month is not None]
    return Money(
        lines=lines,
        usd_per_request=fsum(line.usd_per_request for line in lines if line.planned),
        beside_usd_per_request=fsum(line.usd_per_request for line in lines if not line.planned),
        idle_usd_per_month=fsum(line.idle_usd_per_month for line in lines),
        usd_per_month=fsum(months) if len(months) == len(lines) else None,
        notes=tuple(_notes(plan, catalog, settings)),
    )


def _main(plan: Plan, settings: AwsSettings) -> Line:
    usd, name = plan.costs.main_usd, plan.main.name
    match settings.endpoint:
        case Endpoint.none:
            note = "Your own machine, at the plan's price: not on AWS's bill."
            return Line(f"main function, {name}", None, 0.0, usd, _by_traffic(plan, usd), True, note)
        case Endpoint.aws_lambda:
            return Line(f"main function, {name}", main_function.FUNCTION, 0.0, usd, _by_traffic(plan, usd), True)
        case Endpoint.lambda_gpu:
            what = f"main function, {name}"
            return Line(what, main_function.FUNCTION, 0.0, usd, _by_traffic(plan, usd), True, _while_up(plan))
        case Endpoint.sagemaker:
            hourly = plan.instances * (plan.main.usd_per_hour or 0.0)
            month, per_hour = hourly * HOURS_PER_MONTH, plan.workload.requests_per_hour
            note = f"${hourly:.4g} an hour, used or not"
            note += "" if per_hour is None else f": each of {per_hour:g} requests an hour pays its share"
            what = f"main endpoint, {plan.instances} x {name}"
            return Line(what, main_function.ENDPOINT, month, usd, None if per_hour is None else month, True, f"{note}.")


def _while_up(plan: Plan) -> str:
    """Say what an instance that scales to zero costs while it is up, and how long that is."""
    note = f"${plan.instances * (plan.main.usd_per_hour or 0.0):.4g} an hour while it is up, nothing at rest"
    if (waking := plan.workload.waking) is not None and (per_hour := plan.workload.requests_per_hour) is not None:
        note += f": up {waking.up_share:.1%} of the time at {per_hour:g} requests an hour, {waking.wake_share:.1%} of which wake it"
    return f"{note}."


def _functions(plan: Plan, contents: Contents) -> Iterator[Line]:
    """Price each function: its share of its layer's cost goes by its number of experts."""
    usd = {layer.layer: (usd, len(layer.remote)) for layer, usd in zip(plan.layers, plan.costs.layers_usd, strict=True)}
    for function in contents.functions:
        layer_usd, experts = usd[function.layer]
        own_usd = layer_usd * len(function.experts) / experts
        what = f"{function.entry}, {function.memory_mb:,} MB, {len(function.experts)} experts"
        yield Line(what, names.logical_id(function.entry), 0.0, own_usd, _by_traffic(plan, own_usd), True)


def _kept(plan: Plan, catalog: Catalog, contents: Contents, settings: AwsSettings) -> Iterator[Line]:
    """Price what costs money by existing."""
    main_bytes = 0 if settings.endpoint is Endpoint.none else contents.main_bytes
    stored = sum(f.shard_bytes for f in contents.functions) + main_bytes + contents.code_bytes
    yield _line(f"S3, {size(stored)}", stored / _GB * catalog.storage.usd_per_gb_month, "Weights and code.")
    if settings.endpoint is not Endpoint.none:
        estimates = aws_reference().estimates
        image_bytes = estimates.lambda_image_bytes if settings.endpoint is Endpoint.aws_lambda else estimates.sagemaker_image_bytes
        usd = image_bytes / _GB * aws_reference().prices.usd_per_image_gb_month
        yield _line(f"image in ECR, about {size(image_bytes)}", usd, "Yours: it outlives the deployment.")
    if settings.monthly_alert_usd is not None:
        yield _line("monthly alert", 0.0, "An account's first two budgets are free.")
    usd_per_month = _by_traffic(plan, _kept_logs_usd(plan, catalog, contents, settings))
    note = "At most: as if every token called every function. Writing them is in the plan's cost."
    yield Line(f"logs kept for {settings.log_days} days", None, 0.0, 0.0, usd_per_month, False, note)


def _line(what: str, usd_per_month: float, note: str) -> Line:
    return Line(what, None, usd_per_month, 0.0, usd_per_month, False, note)


def _kept_logs_usd(plan: Plan, catalog: Catalog, contents: Contents, settings: AwsSettings) -> float:
    """Price keeping what is logged of a request's invocations."""
    calls = sum(f.replicas for f in contents.functions) + len(contents.functions) * plan.workload.n_out
    calls += settings.endpoint.on_lambda
    kept_months = settings.log_days * 24 / HOURS_PER_MONTH
    return calls * catalog.function.log_bytes_per_call / _GB * kept_months * aws_reference().prices.usd_per_log_gb_month


def _by_traffic(plan: Plan, usd_per_request: float) -> float | None:
    per_hour = plan.workload.requests_per_hour
    return None if per_hour is None else usd_per_request * per_hour * HOURS_PER_MONTH


def _notes(plan: Plan, catalog: Catalog, settings: AwsSettings) -> Iterator[str]:
    region = next(entry.region for entry in catalog.provenance if "storage.usd_per_gb_month" in entry.of)
    if _REGION.fullmatch(region):
        yield f"Prices are those of the catalog {catalog.name}, the oldest of {plan.prices_of}, and list prices of logs and images."
    else:
        yield f"The prices of the catalog {catalog.name} are not AWS's: plan with an AWS catalog to see what AWS charges."
    if settings.architecture != catalog.architecture:
        yield f"The plan is priced for {catalog.architecture}, the functions are {settings.architecture}."
    if settings.endpoint is Endpoint.lambda_gpu:
        yield f"The main function costs {_while_up(plan)}"
    if plan.workload.requests_per_hour is None:
        yield "The plan has no traffic, so the cost of a month of use is unknown."

"""A catalog with the prices of AWS's public price list, which needs no account.

The list is one JSON file for each service and region: products by SKU, and under `terms` what an SKU costs, in tiers. A catalog's price is
looked up in the region that its provenance names, so what is not AWS's (the local twin's storage) is left alone. The copy's figures and
their provenance change, nothing else does; comments are not copied.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from functools import reduce
from pathlib import Path
from typing import Any

from remoe_cli.artifacts import atomic_path
from remoe_cli.errors import RemoeError, UsageError
from remoe_cli.plan.catalog.catalog import Catalog

PRICE_LIST = "https://pricing.us-east-1.amazonaws.com/offers/v1.0/aws"
_REGION = re.compile(r"[a-z]{2}(-[a-z]+)+-\d")
_USAGE_PREFIX = re.compile(r"^[A-Z]{2,4}\d?-")  # of a region: USE1-, EU-; some types have none in us-east-1
_DURATION = {"x86_64": "AWS-Lambda-Duration", "arm64": "AWS-Lambda-Duration-ARM"}
_STORAGE = {
    "usd_per_gb_month": ("TimedStorage-ByteHrs", 1),
    "usd_per_1000_reads": ("Requests-Tier2", 1000),
    "usd_per_1000_writes": ("Requests-Tier1", 1000),
}
_MENUS = ("main.menu", "reference.gpus")
_LEAD = "AWS price list, "
_REST = "; all else as before: "


@dataclass(frozen=True)
class Price:
    """One price of a catalog: where it is, and under which group or usage type (without the region's prefix) AWS lists it.

    item   the architecture or instance within the field, "" where the field is one price
    path   keys and indexes that lead to it in the catalog's tables
    per    how many of AWS's units the catalog's price is for
    new    None where AWS's list has no such price, or several
    """

    field: str
    item: str
    path: tuple[str | int, ...]
    service: str
    region: str
    listed_as: str
    per: int
    old: float
    new: float | None = None

    @property
    def name(self) -> str:
        return f"{self.field} {self.item}".rstrip()


@dataclass(frozen=True)
class Updated:
    """`published` has the date of the list of each (service, region) that was read."""

    prices: tuple[Price, ...]
    published: Mapping[tuple[str, str], str]

    @property
    def not_found(self) -> tuple[str, ...]:
        return tuple(price.name for price in self.prices if price.new is None)


def update(catalog: Catalog, out: Path, *, base_url: str = "", say: Callable[[str], None] = lambda message: None) -> Updated:
    """Write a copy of the catalog with AWS's prices of today to `out`.

    A price that AWS's list lacks is kept. Raises RemoeError, and writes nothing, when the list cannot be fetched or read; UsageError when
    no price of the catalog is AWS's.
    """
    tables = catalog.model_dump(mode="json", exclude_none=True, exclude={"file", "provenance"})
    prices = tuple(_wanted(catalog, tables))
    if not prices:
        raise UsageError(
            f"The catalog {catalog.file.path} has no price of an AWS region.", "Provenance of its prices must name one, such as us-east-1."
        )
    found: dict[tuple[str, str, str], set[Decimal]] = {}
    published: dict[tuple[str, str], str] = {}
    for service, region in sorted({(price.service, price.region) for price in prices}):
        say(f"Reading the price list of {service} in {region}")
        listed, published[service, region] = _fetch(f"{base_url or PRICE_LIST}/{service}/current/{region}/index.json")
        found |= {(service, region, name): usd for name, usd in listed.items()}
    prices = tuple(_looked_up(price, found) for price in prices)
    for price in prices:
        if price.new is not None:
            _at(tables, price.path[:-1])[price.path[-1]] = price.new
    updated = Updated(prices, published)
    with atomic_path(out) as temporary:
        temporary.write_text(_toml_file(catalog, tables, _provenance(catalog, updated)), encoding="utf-8")
    return updated


def _wanted(catalog: Catalog, tables: dict[str, Any]) -> Iterable[Price]:
    regions = {field: entry.region for entry in catalog.provenance for field in entry.of}

    def price(path: tuple[str | int, ...], item: str, service: str, listed_as: str, per: int = 1) -> Iterable[Price]:
        field = f"{path[0]}.{path[1]}"
        if _REGION.fullmatch(regions.get(field, "")):
            yield Price(field, item, path, service, regions[field], listed_as, per, old=_at(tables, path))

    for side in ("function", "main"):
        for architecture in tables[side]["usd_per_gb_second"]:
            yield from price((side, "usd_per_gb_second", architecture), architecture, "AWSLambda", _DURATION[architecture])
        yield from price((side, "usd_per_request"), "", "AWSLambda", "AWS-Lambda-Requests")
    yield from price(("function", "usd_per_storage_gb_second"), "", "AWSLambda", "AWS-Lambda-Storage-Duration")
    for side, menu in (field.split(".") for field in _MENUS):
        for i, spec in enumerate(tables[side][menu]):
            if "usd_per_hour" in spec:
                name = spec["name"]
                yield from price((side, menu, i, "usd_per_hour"), name, "AmazonSageMaker", f"Host:ml.{name.removeprefix('ml.')}")
    for field, (listed_as, per) in _STORAGE.items():
        yield from price(("storage", field), "", "AmazonS3", listed_as, per)


def _at(tables: Any, path: tuple[str | int, ...]) -> Any:
    return reduce(lambda part, key: part[key], path, tables)


def _fetch(url: str) -> tuple[dict[str, set[Decimal]], str]:
    """Prices by group and by usage type, and the publication date."""
    import httpx

    hint = "Check the network and try again; until then the catalog's own prices hold."
    with tempfile.TemporaryFile() as file:  # SageMaker's list has more than 100 MB
        try:
            with httpx.stream("GET", url, timeout=60, follow_redirects=True) as answer:
                answer.raise_for_status()
                for piece in answer.iter_bytes():
                    file.write(piece)
        except httpx.HTTPError as error:
            raise RemoeError(f"AWS's price list {url} cannot be fetched: {error or type(error).__name__}.", hint) from None
        file.seek(0)
        try:
            offer = json.load(file)
            return _listed(offer), offer["publicationDate"][:10]
        except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
            raise RemoeError(f"{url} is not a price list as AWS publishes it: {type(error).__name__} {error}.", hint) from None


def _listed(offer: dict[str, Any]) -> dict[str, set[Decimal]]:
    listed: dict[str, set[Decimal]] = {}
    for sku, product in offer["products"].items():
        attributes = product["attributes"]
        if attributes.get("location") == "Any":
            continue  # the free tier, under the same group
        names = {attributes.get("group", ""), _USAGE_PREFIX.sub("", attributes.get("usagetype", ""))}
        for term in offer["terms"]["OnDemand"].get(sku, {}).values():
            first = min(term["priceDimensions"].values(), key=lambda tier: Decimal(tier["beginRange"]))
            usd = Decimal(first["pricePerUnit"].get("USD", 0))
            for name in names if usd > 0 else ():
                listed.setdefault(name, set()).add(usd)
    return listed


def _looked_up(price: Price, found: Mapping[tuple[str, str, str], set[Decimal]]) -> Price:
    listed = found.get((price.service, price.region, price.listed_as), set())
    return replace(price, new=float(next(iter(listed)) * price.per)) if len(listed) == 1 else price


def _provenance(catalog: Catalog, updated: Updated) -> list[dict[str, Any]]:
    """The catalog's, but for the fields with a new price. A field of which some price was not found keeps its date."""
    entries: dict[tuple[date, str, str], list[str]] = {}
    for entry in catalog.provenance:
        for field in entry.of:
            prices = [price for price in updated.prices if price.field == field]
            kept = [price.item for price in prices if price.new is None]
            day, source = entry.date, entry.source
            if len(kept) < len(prices):
                first = prices[0]
                before = source.partition(_REST)[2] if source.startswith(_LEAD) else source
                source = f"{_LEAD}publication date {updated.published[first.service, first.region]}"
                source += f" (not there, so kept: {', '.join(kept)})" if kept else ""
                source += _REST + before if before and (kept or field in _MENUS) else ""
                day = day if kept else date.today()
            entries.setdefault((day, entry.region, source), []).append(field)
    return [{"of": of, "date": day, "region": region, "source": source} for (day, region, source), of in entries.items()]


def _toml_file(catalog: Catalog, tables: dict[str, Any], provenance: list[dict[str, Any]]) -> str:
    head = {key: value for key, value in tables.items() if not isinstance(value, dict)}
    sides = {key: value for key, value in tables.items() if isinstance(value, dict)}
    comment = f"# The catalog {catalog.file.path} with prices of AWS's price list, written by 'remoe catalog update' on {date.today()}."
    parts = [("", head), *((f"[{side}]", fields) for side, fields in sides.items()), *(("[[provenance]]", entry) for entry in provenance)]
    texts = ["\n".join([title, *(f"{key} = {_toml(value)}" for key, value in fields.items())]).lstrip() for title, fields in parts]
    return comment + "\n" + "\n\n".join(texts) + "\n"


def plain(usd: float) -> str:
    """0.0000002 and not 2e-07."""
    return format(Decimal(repr(usd)), "f")


def _toml(value: Any) -> str:
    if isinstance(value, float):
        text = plain(value)
        return text if "." in text else f"{text}.0"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        if value and isinstance(value[0], dict):
            return "[\n" + "".join(f"    {_toml(item)},\n" for item in value) + "]"
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return str(value)

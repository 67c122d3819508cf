"""Write a copy of a catalog with the prices of AWS's public price list, which needs no account.

AWS publishes one JSON file for each service and region: products by SKU, and under `terms` what an SKU costs, in tiers. A price of the
catalog is looked up in the region that its provenance names, so prices that are not AWS's (the local twin's storage) stay. In the copy
only these prices and their provenance differ: order, comments and all other figures are those of the catalog's file.
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

import tomlkit
from tomlkit.items import AoT

from remoe_cli import bounded, owned, recognise
from remoe_cli.artifacts import sha256_bytes
from remoe_cli.errors import RemoeError, UsageError
from remoe_cli.plan.catalog.catalog import Catalog, catalog_text
from remoe_cli.provenance import Provenance

PRICE_LIST = "https://pricing.us-east-1.amazonaws.com/offers/v1.0/aws"
_REGION = re.compile(r"[a-z]{2}(-[a-z]+)+-\d")
_USAGE_PREFIX = re.compile(r"^[A-Z]{2,4}\d?-")  # of a region: USE1-, EU-; some types have none in us-east-1
_DURATION = {"x86_64": "AWS-Lambda-Duration", "arm64": "AWS-Lambda-Duration-ARM"}
_STORAGE = {
    "usd_per_gb_month": ("TimedStorage-ByteHrs", 1),
    "usd_per_1000_reads": ("Requests-Tier2", 1000),
    "usd_per_1000_writes": ("Requests-Tier1", 1000),
}
_MOST_BYTES = 1 << 30  # of one list; SageMaker's has more than 100 MB
_MENUS = ("main.menu", "reference.gpus")
_LEAD = "AWS price list, "
_REST = "; all else as before: "
_TITLE = "# Prices of AWS's price list, written by 'remoe catalog update'"


@dataclass(frozen=True)
class Price:
    """One price of a catalog, and where AWS's price list has it.

    item        the architecture or instance within the field, "" where the field is one price
    path        keys and indexes that lead to the price in the catalog's tables
    listed_as   the group, or the usage type without the region's prefix, under which AWS lists it
    per         how many of AWS's units the catalog's price is for
    new         None where AWS's list has no such price, or several
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
class UpdatedPrices:
    """The prices of an updated catalog.

    published   by (service, region) the publication date of each list that was read
    """

    prices: tuple[Price, ...]
    published: Mapping[tuple[str, str], str]

    @property
    def not_found(self) -> tuple[str, ...]:
        return tuple(price.name for price in self.prices if price.new is None)


def update(catalog: Catalog, out: Path, *, base_url: str = "", say: Callable[[str], None] = lambda message: None) -> UpdatedPrices:
    """Write a copy of the catalog with AWS's prices of today to `out`.

    A price that AWS's list does not have stays.

    Raises: RemoeError when a list cannot be fetched or read, UsageError when no price of the catalog is AWS's, and where
    `refuse_catalog` does; nothing is written then.
    """
    refuse_catalog(catalog, out)
    text = catalog_text(catalog.file.path)
    tables = catalog.model_dump(mode="json", exclude_none=True, exclude={"file", "provenance"})
    prices = tuple(_aws_prices(catalog, tables))
    if not prices:
        raise UsageError(
            f"The catalog {catalog.file.path} has no price of an AWS region.",
            "Name a region such as us-east-1 in the provenance of its prices.",
        )
    found: dict[tuple[str, str, str], set[Decimal]] = {}
    published: dict[tuple[str, str], str] = {}
    for service, region in sorted({(price.service, price.region) for price in prices}):
        say(f"Reading the price list of {service} in {region}")
        listed, published[service, region] = _fetch(f"{base_url or PRICE_LIST}/{service}/current/{region}/index.json")
        found |= {(service, region, name): usd for name, usd in listed.items()}
    prices = tuple(_looked_up(price, found) for price in prices)
    updated = UpdatedPrices(prices, published)
    with owned.writing(out, _made(catalog)) as temporary:
        temporary.write_text(_updated_text(text, catalog, updated), encoding="utf-8")
    return updated


def refuse_catalog(catalog: Catalog, out: Path) -> None:
    """Refuse a path where `update` would replace anything but a catalog.

    It may replace a catalog that it wrote, and the catalog that it updates.

    Raises: UsageError for such a path.
    """
    owned.refuse_file(out, _made(catalog))


def _made(catalog: Catalog) -> recognise.Made:
    def recognises(path: Path) -> bool:
        content = bounded.read_bytes(path, bounded.FIGURES)
        return content.startswith(_TITLE.encode()) or sha256_bytes(content) == catalog.file.sha256

    return recognise.Made("catalog", recognises)


def _aws_prices(catalog: Catalog, tables: dict[str, Any]) -> Iterable[Price]:
    regions = {field: entry.region for entry in catalog.provenance for field in entry.of}

    def price(path: tuple[str | int, ...], item: str, service: str, listed_as: str, per: int = 1) -> Iterable[Price]:
        field = f"{path[0]}.{path[1]}"
        if _REGION.fullmatch(regions.get(field, "")):
            yield Price(field, item, path, service, regions[field], listed_as, per, old=_at(tables, path))

    for side in ("function", "main"):
        for architecture in tables[side]["usd_per_gb_second"]:
            yield from price((side, "usd_per_gb_second", architecture), architecture, "AWSLambda", _DURATION[architecture])
        yield from price((side, "usd_per_request"), "", "AWSLambda", "AWS-Lambda-Requests")
        yield from price((side, "usd_per_storage_gb_second"), "", "AWSLambda", "AWS-Lambda-Storage-Duration")
    for side, menu in (field.split(".") for field in _MENUS):
        for i, spec in enumerate(tables[side][menu]):
            if "usd_per_hour" in spec:
                name = spec["name"]  # one that scales to zero has EC2's price and a fee: it is not in this list, and is kept
                yield from price((side, menu, i, "usd_per_hour"), name, "AmazonSageMaker", f"Host:ml.{name.removeprefix('ml.')}")
    for field, (listed_as, per) in _STORAGE.items():
        yield from price(("storage", field), "", "AmazonS3", listed_as, per)


def _at(tables: Any, path: tuple[str | int, ...]) -> Any:
    return reduce(lambda table, key: table[key], path, tables)


def _fetch(url: str) -> tuple[dict[str, set[Decimal]], str]:
    """Get one list's prices, by group and by usage type, and its publication date."""
    import httpx

    hint = "Check the network and try again. Until then, use the prices that the catalog has."
    with tempfile.TemporaryFile() as file:  # SageMaker's list has more than 100 MB
        try:
            with httpx.stream("GET", url, timeout=60, follow_redirects=True) as response:
                response.raise_for_status()
                for chunk in response.iter_bytes():
                    file.write(chunk)
                    if file.tell() > _MOST_BYTES:
                        raise RemoeError(f"AWS's price list at {url} has more than {_MOST_BYTES >> 20:,} MiB, which is the most.", hint)
        # httpx raises errors of Python's own classes for proxies and certificates of the environment that it cannot use.
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, ImportError, OSError) as error:
            why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise RemoeError(f"AWS's price list at {url} cannot be fetched: {why}.", hint) from None
        file.seek(0)
        try:
            offer = json.load(file)
            return _listed(offer), offer["publicationDate"][:10]
        except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError) as error:
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


def _updated_text(text: str, catalog: Catalog, updated: UpdatedPrices) -> str:
    document = tomlkit.parse(text)
    _set_prices(document, updated)
    _set_provenance(document, catalog, updated)
    return f"{_TITLE} on {date.today()}.\n" + re.sub(rf"\A{_TITLE}.*\n", "", tomlkit.dumps(document))


def _set_prices(document: tomlkit.TOMLDocument, updated: UpdatedPrices) -> None:
    for price in updated.prices:
        if price.new is not None:
            text = plain(price.new)
            _at(document, price.path[:-1])[price.path[-1]] = tomlkit.value(text if "." in text else f"{text}.0")


def _set_provenance(document: tomlkit.TOMLDocument, catalog: Catalog, updated: UpdatedPrices) -> None:
    """Give each field with a new price its new source.

    It stays in its entry, unless other fields keep the entry's source: then it gets a new entry.
    """
    entries: Any = document["provenance"]
    more: dict[tuple[date, str, str], list[str]] = {}
    for entry, table in zip(catalog.provenance, entries, strict=True):
        by_source: dict[tuple[date, str], list[str]] = {}
        for field in entry.of:
            by_source.setdefault(_source(field, entry, updated), []).append(field)
        stays = (entry.date, entry.source) if (entry.date, entry.source) in by_source else next(iter(by_source))
        if stays != (entry.date, entry.source):
            table["date"], table["source"] = stays
        for (day, source), fields in by_source.items():
            for field in fields if (day, source) != stays else ():
                table["of"].remove(field)
                more.setdefault((day, entry.region, source), []).append(field)
    for (day, region, source), fields in more.items():
        if isinstance(entries, AoT) and not entries[-1].as_string().endswith("\n\n"):
            entries[-1].add(tomlkit.nl())
        entries.append({"of": fields, "date": day, "region": region, "source": source})


def _source(field: str, entry: Provenance, updated: UpdatedPrices) -> tuple[date, str]:
    """Get the date and source of a field after the update.

    A field of which some price was not found keeps its date.
    """
    prices = [price for price in updated.prices if price.field == field]
    kept = [price.item for price in prices if price.new is None]
    if len(kept) == len(prices):
        return entry.date, entry.source
    before = entry.source.partition(_REST)[2] if entry.source.startswith(_LEAD) else entry.source
    source = f"{_LEAD}publication date {updated.published[prices[0].service, prices[0].region]}"
    source += f" (not there, so kept: {', '.join(kept)})" if kept else ""
    source += _REST + before if before and (kept or field in _MENUS) else ""
    return entry.date if kept else date.today(), source


def plain(usd: float) -> str:
    """Write a price without an exponent.

    >>> plain(2e-07)
    '0.0000002'
    """
    return format(Decimal(repr(usd)), "f")

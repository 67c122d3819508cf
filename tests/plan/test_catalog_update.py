"""Prices of AWS's public list: the right one of many is taken, the copy says where it is from, and a failure writes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from remoe_cli.cli import app
from remoe_cli.errors import RemoeError, UsageError
from remoe_cli.plan.catalog import update as catalog_update
from remoe_cli.plan.catalog.catalog import Catalog, catalog_text, read_catalog
from remoe_cli.plan.catalog.update import update

US = "us-east-1"
INSTANCES = {spec.name: spec.usd_per_hour for spec in read_catalog("aws-us-east-1").reference.gpus}


class Server(ThreadingHTTPServer):
    """A price list on loopback: what `files` holds by path, else 404."""

    files: dict[str, bytes]
    asked: list[str]
    promised: int = 0  # bytes that the header promises beyond those that come

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        body = self.server.files.get(self.path)
        self.send_response(200 if body is not None else 404)
        self.send_header("Content-Length", str(len(body or b"") + self.server.promised))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *ignored: Any) -> None:
        pass


def product(sku: str, usd: str | dict[str, str], **attributes: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A product and its terms as AWS writes them; `usd` by the tier's beginRange, or one price."""
    tiers = usd if isinstance(usd, dict) else {"0": usd}
    code = f"{sku}.JRTCKXETXF"
    dimensions = {
        f"{code}.{i}": {
            "rateCode": f"{code}.{i}",
            "description": f"${price} per unit",
            "beginRange": begin,
            "endRange": "Inf",
            "unit": "Hrs",
            "appliesTo": [],
            "pricePerUnit": {"USD": price},
        }
        for i, (begin, price) in enumerate(tiers.items())
    }
    term = {"offerTermCode": "JRTCKXETXF", "sku": sku, "effectiveDate": "2026-10-01T00:00:00Z", "priceDimensions": dimensions}
    attributes = {"location": "US East (N. Virginia)", "locationType": "AWS Region", "operation": ""} | attributes
    return {"sku": sku, "productFamily": "Any", "attributes": attributes}, {code: term | {"termAttributes": {}}}


def offer(service: str, *products: tuple[dict[str, Any], dict[str, Any]]) -> bytes:
    document = {
        "formatVersion": "v1.0",
        "disclaimer": "This pricing list is for informational purposes only.",
        "offerCode": service,
        "version": "20261120101010",
        "publicationDate": "2026-11-20T10:10:10Z",
        "products": {made["sku"]: made for made, _ in products},
        "terms": {"OnDemand": {made["sku"]: terms for made, terms in products}, "Reserved": {}},
        "attributesList": {},
    }
    return json.dumps(document).encode()


def functions(prefix: str = "", x86: str = "0.0000177777") -> bytes:
    """With the free tier, other kinds of Lambda and further tiers, which must not be taken."""
    duration = {"15000000000": "0.0000133333", "6000000000": "0.0000150000", "0": x86}
    return offer(
        "AWSLambda",
        product("FREE", "0.0000000000", group="AWS-Lambda-Duration", usagetype="Global-Lambda-GB-Second", location="Any"),
        product("FREE2", "0.0000000001", group="AWS-Lambda-Requests", usagetype="Global-Request", location="Any"),
        product("DUR", duration, group="AWS-Lambda-Duration", usagetype=f"{prefix}Lambda-GB-Second", servicecode="AWSLambda"),
        product("ARM", "0.0000144444", group="AWS-Lambda-Duration-ARM", usagetype=f"{prefix}Lambda-GB-Second-ARM"),
        product("NONE", "0.0000000000", group="AWS-Lambda-Duration-ARM", usagetype=f"{prefix}Lambda-GB-Second-ARM"),
        product("PC", "0.0000097222", group="AWS-Lambda-Duration-Provisioned", usagetype=f"{prefix}Lambda-Provisioned-GB-Second"),
        product("EDGE", "0.0000500100", group="AWS-Lambda-Edge-Duration", usagetype=f"{prefix}Lambda-Edge-GB-Second"),
        product("REQ", "0.0000003000", group="AWS-Lambda-Requests", usagetype=f"{prefix}Request"),
        product("TMP", "0.0000000400", group="AWS-Lambda-Storage-Duration", usagetype=f"{prefix}Lambda-Storage-GB-Second"),
        product("EDGEREQ", "0.0000006000", group="AWS-Lambda-Edge-Requests", usagetype=f"{prefix}Lambda-Edge-Request"),
    )


def instances(by_name: dict[str, str], prefix: str = "USE1-") -> bytes:
    kinds = {"Host": "Hosting", "Train": "Training", "AsyncInf": "AsyncInf"}
    made = [
        product(f"{kind}{name}", usd if kind == "Host" else "99.0000000000", usagetype=f"{prefix}{kind}:{name}", component=component)
        for name, usd in by_name.items()
        for kind, component in kinds.items()
    ]
    return offer("AmazonSageMaker", *made)


def storage() -> bytes:
    return offer(
        "AmazonS3",
        product("STD", {"51200": "0.0220000000", "0": "0.0240000000"}, usagetype="TimedStorage-ByteHrs", volumeType="Standard"),
        product("IA", "0.0125000000", usagetype="TimedStorage-SIA-ByteHrs", volumeType="Standard - Infrequent Access"),
        product("TABLES", "0.0265000000", usagetype="USE1-Tables-TimedStorage-ByteHrs"),
        product("PUT", "0.0000060000", usagetype="Requests-Tier1", group="S3-API-Tier1"),
        product("GET", "0.0000005000", usagetype="Requests-Tier2", group="S3-API-Tier2"),
        product("IAGET", "0.0000010000", usagetype="Requests-SIA-Tier2", group="S3-API-SIA-Tier2"),
    )


def path(service: str, region: str = US) -> str:
    return f"/{service}/current/{region}/index.json"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server(("127.0.0.1", 0), Handler)
    served.asked = []
    dearer = {name: f"{2 * (usd or 0):.10f}" for name, usd in INSTANCES.items()}
    served.files = {path("AWSLambda"): functions(), path("AmazonSageMaker"): instances(dearer), path("AmazonS3"): storage()}
    thread = Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def source(catalog: Catalog, field: str) -> tuple[date, str, str]:
    return next((entry.date, entry.region, entry.source) for entry in catalog.provenance if field in entry.of)


def test_every_price_of_the_catalog_is_replaced(server: Server, tmp_path: Path) -> None:
    old = read_catalog("aws-us-east-1")
    updated = update(old, tmp_path / "new.toml", base_url=server.url)
    new = read_catalog(str(tmp_path / "new.toml"))
    for side in (new.function, new.main):
        assert side.usd_per_gb_second == {"x86_64": 0.0000177777, "arm64": 0.0000144444}
        assert side.usd_per_request == 0.0000003
    storage = (new.storage.usd_per_gb_month, new.storage.usd_per_1000_reads, new.storage.usd_per_1000_writes)
    assert storage == (0.024, 0.0005, 0.006) and new.function.usd_per_storage_gb_second == 0.00000004
    for before, after in ((old.main.menu, new.main.menu), (old.reference.gpus, new.reference.gpus)):
        times = [1 if spec.scales_to_zero else 2 for spec in before]  # those of EC2 are in another list
        new_usd = [spec.usd_per_hour and spec.usd_per_hour * by for spec, by in zip(before, times, strict=True)]
        assert [spec.usd_per_hour for spec in after] == new_usd
    assert updated.not_found == tuple(f"main.menu {spec.name}" for spec in old.main.menu if spec.scales_to_zero)
    assert len(server.asked) == 3


def test_all_else_stays(server: Server, tmp_path: Path) -> None:
    old = read_catalog("aws-us-east-1")
    updated = update(old, tmp_path / "new.toml", base_url=server.url)
    document = read_catalog(str(tmp_path / "new.toml")).model_dump(mode="json")
    for price in updated.prices:
        part = document
        for key in price.path[:-1]:
            part = part[key]  # type: ignore[index]
        part[price.path[-1]] = price.old  # type: ignore[index]
    before = old.model_dump(mode="json")
    for field in ("file", "provenance"):
        del document[field], before[field]
    assert document == before


def test_new_figures_say_where_they_are_from_and_others_keep_theirs(server: Server, tmp_path: Path) -> None:
    old = read_catalog("aws-us-east-1")
    update(old, tmp_path / "new.toml", base_url=server.url)
    new = read_catalog(str(tmp_path / "new.toml"))
    for field in ("function.usd_per_gb_second", "main.usd_per_request", "storage.usd_per_1000_reads"):
        assert source(new, field) == (date.today(), US, "AWS price list, publication date 2026-11-20")
    # The menu's sizes are not AWS's list's, so what was said of them is still said.
    assert source(new, "reference.gpus")[0] == date.today()
    listed, kept = "AWS price list, publication date 2026-11-20", [spec.name for spec in old.main.menu if spec.scales_to_zero]
    assert source(new, "reference.gpus")[2] == f"{listed}; all else as before: {source(old, 'reference.gpus')[2]}"
    # Some of the menu's are not in the list: its date stays, and they are named.
    assert source(new, "main.menu")[0] == source(old, "main.menu")[0]
    assert source(new, "main.menu")[2] == (
        f"{listed} (not there, so kept: {', '.join(kept)}); all else as before: {source(old, 'main.menu')[2]}"
    )
    for field in ("function.billing_granularity_ms", "function.warm_unbilled_s", "main.cold_start_s", "reference.hardware"):
        assert source(new, field) == source(old, field)
    assert new.oldest_price > old.oldest_price
    update(new, tmp_path / "again.toml", base_url=server.url)
    assert read_catalog(str(tmp_path / "again.toml")).provenance == new.provenance


def test_what_is_not_listed_is_kept_and_named(server: Server, tmp_path: Path) -> None:
    old = read_catalog("aws-us-east-1")
    server.files[path("AmazonSageMaker")] = instances({"ml.g5.xlarge": "1.5000000000"})
    server.files[path("AmazonS3")] = offer("AmazonS3", product("IA", "0.0125000000", usagetype="TimedStorage-SIA-ByteHrs"))
    updated = update(old, tmp_path / "new.toml", base_url=server.url)
    new = read_catalog(str(tmp_path / "new.toml"))
    prices = {spec.name: spec.usd_per_hour for spec in new.reference.gpus}
    assert prices == INSTANCES | {"ml.g5.xlarge": 1.5}
    assert {"reference.gpus ml.p5.48xlarge", "main.menu ml.g4dn.xlarge", "storage.usd_per_gb_month"} <= set(updated.not_found)
    assert "reference.gpus ml.g5.xlarge" not in updated.not_found
    # The kept ones are as old as they were, and so is the field.
    day, _, message = source(new, "reference.gpus")
    assert day == source(old, "reference.gpus")[0]
    assert "ml.p5.48xlarge" in message.partition("; all else")[0] and "ml.g5.xlarge" not in message.partition("; all else")[0]
    assert source(new, "storage.usd_per_gb_month") == source(old, "storage.usd_per_gb_month")


def test_two_prices_for_one_thing_are_none(server: Server, tmp_path: Path) -> None:
    twice = [product(sku, usd, group="AWS-Lambda-Requests", usagetype="Request") for sku, usd in (("A", "0.0000002"), ("B", "0.0000004"))]
    server.files[path("AWSLambda")] = offer("AWSLambda", *twice)
    updated = update(read_catalog("aws-us-east-1"), tmp_path / "new.toml", base_url=server.url)
    assert "function.usd_per_request" in updated.not_found
    assert read_catalog(str(tmp_path / "new.toml")).function.usd_per_request == 0.0000002


def test_only_what_is_priced_in_a_region_is_looked_up(server: Server, tmp_path: Path) -> None:
    """The twin bills AWS's prices for functions; its disk and requests to its main server cost nothing."""
    update(read_catalog("local"), tmp_path / "new.toml", base_url=server.url)
    new = read_catalog(str(tmp_path / "new.toml"))
    assert sorted(server.asked) == [path("AWSLambda"), path("AmazonSageMaker")]
    assert (new.function.usd_per_request, new.main.usd_per_request, new.storage.usd_per_gb_month) == (0.0000003, 0.0, 0.0)
    assert new.main.usd_per_gb_second["x86_64"] == 0.0000177777
    assert [spec.usd_per_hour for spec in new.reference.gpus] == [2 * (INSTANCES[f"ml.{spec.name}"] or 0) for spec in new.reference.gpus]
    with pytest.raises(UsageError, match="paper has no price of an AWS region"):
        update(read_catalog("paper"), tmp_path / "paper.toml", base_url=server.url)
    assert not (tmp_path / "paper.toml").exists()


def test_the_region_is_the_one_that_provenance_names(server: Server, tmp_path: Path) -> None:
    text = (resources.files("remoe_cli.plan.catalog") / "data" / "aws-us-east-1.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace(f'region = "{US}"', 'region = "eu-west-1"'))
    server.files = {
        path("AWSLambda", "eu-west-1"): functions("EU-", x86="0.0000199999"),
        path("AmazonSageMaker", "eu-west-1"): instances({"ml.g5.xlarge": "1.5700000000"}, "EUW1-"),
        path("AmazonS3", "eu-west-1"): offer("AmazonS3", product("GET", "0.0000004400", usagetype="EU-Requests-Tier2")),
    }
    update(read_catalog(str(tmp_path / "mine.toml")), tmp_path / "mine.toml", base_url=server.url)
    new = read_catalog(str(tmp_path / "mine.toml"))
    assert new.function_usd_per_gb_second == 0.0000199999
    assert new.storage.usd_per_1000_reads == 0.00044
    assert {spec.name: spec.usd_per_hour for spec in new.main.menu}["ml.g5.xlarge"] == 1.57
    assert source(new, "function.usd_per_request")[1] == "eu-west-1"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "cannot be fetched: Client error '404"),
        (b"<html>", "is not a price list"),
        (b"[]", "is not a price list"),
        (b'{"products": {}, "terms": {"OnDemand": {}}}', "is not a price list"),
        (functions().replace(b"0.0000144444", b"dear"), "is not a price list"),
    ],
)
def test_a_failure_is_one_clear_error_and_writes_nothing(body: bytes | None, message: str, server: Server, tmp_path: Path) -> None:
    server.files.pop(path("AWSLambda"))
    if body is not None:
        server.files[path("AWSLambda")] = body
    fails(server.url, message, tmp_path)


def test_an_answer_that_ends_early_is_a_failure(server: Server, tmp_path: Path) -> None:
    server.promised = 5
    fails(server.url, "cannot be fetched", tmp_path)


def test_no_answer_is_a_failure(tmp_path: Path) -> None:
    fails("http://127.0.0.1:1", "cannot be fetched", tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("HTTPS_PROXY", value) for value in ("gopher://127.0.0.1:1", "socks5://127.0.0.1:1", "http://127.0.0.1:1", "[[[", "nowhere:x")),
        ("SSL_CERT_FILE", "/nowhere/ca.pem"),
        ("SSL_CERT_FILE", "/etc/hostname"),
    ],
)
def test_a_network_that_is_set_wrongly_is_a_failure(name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv(name, value)
    fails("https://127.0.0.1:1", "cannot be fetched", tmp_path)


def fails(url: str, message: str, tmp_path: Path) -> None:
    as_it_was = catalog_text("aws-us-east-1")
    (tmp_path / "new.toml").write_text(as_it_was)
    with pytest.raises(RemoeError) as raised:
        update(read_catalog("aws-us-east-1"), tmp_path / "new.toml", base_url=url)
    assert message in raised.value.message and "AWSLambda/current/us-east-1/index.json" in raised.value.message
    assert "network" in raised.value.hint
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("new.toml", as_it_was)]


def test_the_command_prints_what_changed(server: Server, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(catalog_update, "PRICE_LIST", server.url)
    server.files[path("AmazonSageMaker")] = instances({"ml.g5.xlarge": "1.4080000000"})
    arguments = ["remoe", "catalog", "update", "--yes", "-o", str(tmp_path / "new.toml")]
    monkeypatch.setattr("sys.argv", arguments)
    assert app.run() == 0
    shown = capsys.readouterr()
    rows = {tuple(line.split()) for line in shown.out.splitlines()}
    assert ("function.usd_per_request", "0.0000002", "0.0000003", "+50.0%") in rows
    assert ("main.menu", "ml.g5.xlarge", "1.408", "1.408", "same") in rows
    assert ("reference.gpus", "ml.p5.48xlarge", "63.296", "not", "found", "kept") in rows
    assert "kept as they were: main.menu ml.g4dn.xlarge" in shown.err
    monkeypatch.setattr("sys.argv", [*arguments, "--json"])
    assert app.run() == 0
    document = json.loads(capsys.readouterr().out)
    assert document["published"] == dict.fromkeys(("AWSLambda us-east-1", "AmazonSageMaker us-east-1", "AmazonS3 us-east-1"), "2026-11-20")
    assert {"name": "storage.usd_per_1000_writes", "old": 0.005, "new": 0.006} in document["prices"]
    assert "reference.gpus ml.p5.48xlarge" in document["not_found"] and document["path"] == str(tmp_path / "new.toml")
    for wrong in (tmp_path, tmp_path / "new"):
        monkeypatch.setattr("sys.argv", [*arguments[:-1], str(wrong), "--json"])
        assert app.run() == 2
    assert "is not a file name for a catalog" in capsys.readouterr().out


def with_comments(name: str) -> str:
    """A shipped catalog's text with comments where one may write them."""
    text = (resources.files("remoe_cli.plan.catalog") / "data" / f"{name}.toml").read_text()
    text = re.sub(r"^(usd_per_request = [\d.]+)$", r"\1   # the fee", text, flags=re.MULTILINE)
    after = {"gpus = [\n": "    # dear ones\n"}
    before = {"[storage]\n": "# what is kept\n", "[[provenance]]\nof = [": "# from whom\n"}
    for found, comment in (after | before).items():
        text = text.replace(found, comment + found if found in before else found + comment)
    return text.replace('hardware = "g5.xlarge" },\n', 'hardware = "g5.xlarge" },  # A10G\n')


def parts(text: str) -> tuple[str, list[str]]:
    """What stands before the provenance, prices of AWS's list left out, and the provenance's entries."""
    figures, *entries = re.split(r"(?m)^\[\[provenance\]\]\n", text.replace("# from whom\n", ""))
    blank = re.sub(r"(usd_per_(?:hour|request|1000_\w+|gb_month|storage_gb_second)|x86_64|arm64) = [\d.]+", r"\1", figures)
    return blank, [entry.strip() for entry in entries]


@pytest.mark.parametrize("name", ["aws-us-east-1", "local"])
def test_comments_and_order_stay(name: str, server: Server, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(with_comments(name))
    old = read_catalog(str(tmp_path / "mine.toml"))
    updated = update(old, tmp_path / "new.toml", base_url=server.url)
    title, text = (tmp_path / "new.toml").read_text().split("\n", 1)
    assert title.startswith("# Prices of AWS's price list, written by") and str(date.today()) in title
    before, after = parts(with_comments(name)), parts(text)
    assert (
        before[0] == after[0]
        and before[0].count("# the fee") == (3 if name == "aws-us-east-1" else 2)
        and "# A10G" in before[0]
        and "# what is kept" in before[0]
    )
    assert text.count("# from whom") == with_comments(name).count("# from whom")
    priced = {price.field for price in updated.prices}
    untouched = [entry for entry, was in zip(before[1], old.provenance, strict=True) if not priced & set(was.of)]
    assert untouched and [entry for entry in after[1] if entry in untouched] == untouched
    update(read_catalog(str(tmp_path / "new.toml")), tmp_path / "new.toml", base_url=server.url)
    assert (tmp_path / "new.toml").read_text() == f"{title}\n{text}", "a second update finds nothing to change"


def test_a_source_may_hold_any_character(server: Server, tmp_path: Path) -> None:
    text = (resources.files("remoe_cli.plan.catalog") / "data" / "aws-us-east-1.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace('source = "prices', r'source = "\"quoted\"\n\\ and über: prices'))
    old = read_catalog(str(tmp_path / "mine.toml"))
    update(old, tmp_path / "new.toml", base_url=server.url)
    new = source(read_catalog(str(tmp_path / "new.toml")), "main.menu")[2]
    assert '"quoted"\n\\ and über: prices' in new and new.endswith(source(old, "main.menu")[2])

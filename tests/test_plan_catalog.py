"""Catalogs: the shipped one reads, every figure has a source, and what is wrong is named."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from remoe_cli.errors import UsageError
from remoe_cli.plan.catalog import catalog_names, read_catalog

LOCAL = (resources.files("remoe_cli.plan") / "catalogs" / "local.toml").read_text()


def test_local_is_what_it_says() -> None:
    catalog = read_catalog("local")
    assert "local" in catalog_names()
    assert catalog.function.payload_limit_bytes == 6 * 2**20
    assert catalog.function.usd_per_gb_second == catalog.main.usd_per_gb_second == 0.0000166667
    assert catalog.function.usd_per_request * 1e6 == pytest.approx(0.20)
    assert (catalog.main.menu[0].memory_mb, catalog.main.menu[-1].memory_mb) == (640, 10240)
    assert all(spec.vcpus is None for spec in catalog.main.menu)
    assert any("not AWS-verified" in entry.source for entry in catalog.provenance)


def test_by_path_is_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(LOCAL)
    mine, shipped = read_catalog(str(path)), read_catalog("local")
    assert (mine.file.path, shipped.file.path) == (str(path), "local")
    assert mine.file.sha256 == shipped.file.sha256
    assert mine.function == shipped.function


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("usd_per_request = 0.0000002", "usd_per_request = -1.0", "function.usd_per_request"),
        ("usd_per_request = 0.0000002", "usd_per_request = nan", "function.usd_per_request"),
        ("usd_per_request = 0.0000002", 'usd_per_request = "free"', "function.usd_per_request"),
        ("usd_per_request = 0.0000002", "usd_per_request = 0.0000002\nusd_per_reqest = 1.0", "usd_per_reqest"),
        ("usd_per_request = 0.0000002", "", "function.usd_per_request"),
        ("wire_expansion = 1.3", "wire_expansion = 0.3", "function.wire_expansion"),
        ("[128, 192,", "[192, 128,", "must ascend"),
        ('name = "main-1280"', 'name = "main-1024"', "without repeats"),
        ("memory_mb = 1280 }", "memory_mb = 1000 }", "must ascend"),
        ("memory_mb = 1024 }", "memory_mb = 1024, vcpus = 0.0 }", "must be above 0"),
        ("memory_mb = 1024 }", "memory_mb = 1024, vcpus = 2.0 }", "for every spec or for none"),
        ('"function.usd_per_request", ', "", "no provenance for function.usd_per_request"),
        ('"function.usd_per_request", ', '"function.usd_per_request", "function.fee", ', "unknown or repeated function.fee"),
        ('"function.usd_per_request", ', '"function.usd_per_request", "main.menu", ', "unknown or repeated main.menu"),
        ("remoe.catalog/1", "remoe.catalog/2", "schema_version"),
        ("date = 2026-05-01", 'date = "lately"', "date"),
        ("[function]", "[function", "not TOML"),
        ("schema_version = ", 'file = "x"\nschema_version = ', "unknown field 'file'"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, said: str, tmp_path: Path) -> None:
    assert old in LOCAL
    path = tmp_path / "mine.toml"
    path.write_text(LOCAL.replace(old, new))
    with pytest.raises(UsageError) as raised:
        read_catalog(str(path))
    assert said in raised.value.message
    assert str(path) in raised.value.message


def test_unknown_names_and_paths(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no catalog named 'mars'") as raised:
        read_catalog("mars")
    assert "local" in raised.value.hint
    with pytest.raises(UsageError, match="cannot be read"):
        read_catalog(str(tmp_path / "none.toml"))

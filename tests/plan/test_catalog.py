"""Catalogs: those shipped say what they should, every figure has a source, and what is wrong is named."""

from __future__ import annotations

from datetime import date
from importlib import resources
from pathlib import Path

import pytest

from remoe_cli.errors import UsageError
from remoe_cli.plan.catalog.catalog import catalog_names, read_catalog
from remoe_cli.plan.document import MainKind
from remoe_cli.profile.hardware import read_hardware

LOCAL = (resources.files("remoe_cli.plan.catalog") / "data" / "local.toml").read_text()
BY_HOUR = '    { name = "gpu", memory_mb = 16384, vcpus = 4.0, gpu_memory_mb = 16384, usd_per_hour = 0.7, hardware = "g5.xlarge" },\n'
X86 = 0.0000166667
ARM = LOCAL.replace('architecture = "x86_64"', 'architecture = "arm64"')


def test_the_shipped_ones() -> None:
    assert catalog_names() == ("aws-us-east-1", "local", "paper")
    for name in catalog_names():
        catalog = read_catalog(name)
        assert (catalog.name, catalog.file.path, catalog.architecture) == (name, name, "x86_64")
        assert catalog.function_usd_per_gb_second == catalog.main_usd_per_gb_second == X86
        assert catalog.function.payload_limit_bytes == 6 * 2**20
        for spec in (*catalog.main.menu, *catalog.reference.gpus):
            hardware = read_hardware(spec.hardware or catalog.reference.hardware)
            assert (spec.gpu_memory_mb is None) or hardware.gpu is not None
        read_hardware(catalog.reference.hardware)


def test_local_is_what_it_says() -> None:
    catalog = read_catalog("local")
    assert catalog.function.usd_per_gb_second == {"x86_64": X86, "arm64": 0.0000133334}
    assert catalog.function.usd_per_request * 1e6 == pytest.approx(0.20)
    assert (catalog.main.menu[0].memory_mb, catalog.main.menu[-1].memory_mb) == (640, 10240)
    assert all(spec.vcpus is None for spec in catalog.main.menu)
    assert any("not AWS-verified" in entry.source for entry in catalog.provenance)
    assert catalog.oldest_price == date(2026, 5, 1)


def test_aws_is_what_it_says() -> None:
    catalog = read_catalog("aws-us-east-1")
    function = catalog.function
    assert function.usd_per_gb_second == catalog.main.usd_per_gb_second == {"x86_64": X86, "arm64": 0.0000133334}
    assert function.usd_per_request == catalog.main.usd_per_request == 0.0000002
    assert (function.usd_per_storage_gb_second, function.storage_free_mb, function.storage_spare_mb) == (3.09e-8, 512, 64)
    assert function.wire_expansion == 4 / 3
    assert {128, 1769, 2048, 2304, 10240} <= set(function.memory_menu_mb) and len(function.memory_menu_mb) == 16 + 1 + 32
    assert (function.max_useful_vcpus, function.concurrency_limit, function.timeout_s) == (1, 1000, 900)
    by_use = [spec for spec in catalog.main.menu if spec.usd_per_hour is None]
    assert [spec.memory_mb for spec in by_use] == [*range(1024, 4097, 512), *range(5120, 10241, 1024)]
    assert all(spec.vcpus == round(spec.memory_mb / 1769, 4) and spec.hardware == "lambda" for spec in by_use)
    rented = tuple(spec for spec in catalog.main.menu if spec.kind == MainKind.ALWAYS_ON)
    sizes = ("xlarge", "2xlarge", "4xlarge", "8xlarge", "16xlarge")
    assert [spec.name for spec in rented] == [f"ml.{family}.{size}" for family in ("g4dn", "g5", "g6", "g6e") for size in sizes]
    for spec in rented:
        family, size = spec.name.split(".")[1:]
        times = 2 ** sizes.index(size)
        assert (spec.vcpus, spec.memory_mb) == (4 * times, (32 if family == "g6e" else 16) * 1024 * times)
        assert spec.gpu_memory_mb == {"g4dn": 16384, "g5": 24576, "g6": 24576, "g6e": 49152}[family]
        assert spec.hardware == f"{family}.xlarge"
        assert 0.7 <= (spec.usd_per_hour or 0) < 10
    assert catalog.reference.gpus[: len(rented)] == rented
    several = {spec.name: (spec.gpu_memory_mb, spec.usd_per_hour) for spec in catalog.reference.gpus[len(rented) :]}
    assert several == {
        "ml.g5.12xlarge": (4 * 24576, 7.09),
        "ml.g5.48xlarge": (8 * 24576, 20.36),
        "ml.g6e.12xlarge": (4 * 49152, 13.1158),
        "ml.g6e.48xlarge": (8 * 49152, 37.66),
        "ml.p4d.24xlarge": (8 * 40960, 25.2513),
        "ml.p5.48xlarge": (8 * 81920, 63.296),
    }
    assert (catalog.storage.usd_per_gb_month, catalog.storage.usd_per_1000_reads, catalog.storage.usd_per_1000_writes) == (
        0.023,
        0.0004,
        0.005,
    )


@pytest.mark.parametrize(
    "field", ["warm_unbilled_s", "warm_billed_s", "network_bytes_per_s", "cold_start_s", "load_bytes_per_s", "idle_ttl_s"]
)
def test_aws_owns_up_to_its_estimates(field: str) -> None:
    entry = next(entry for entry in read_catalog("aws-us-east-1").provenance if f"function.{field}" in entry.of)
    assert entry.source.startswith("estimate")
    assert field == "idle_ttl_s" or "remoe profile measure" in entry.source


def test_paper_is_what_it_says() -> None:
    catalog = read_catalog("paper")
    function = catalog.function
    assert catalog.main.usd_per_accelerator_gb_second == pytest.approx(3 * catalog.main_usd_per_gb_second)
    assert function.memory_menu_mb == tuple(range(200, 10001, 100))
    assert [spec.memory_mb for spec in catalog.main.menu] == [*range(200, 5001, 100), *range(5500, 40001, 500)]
    assert all(spec.vcpus == round(spec.memory_mb / 1024, 4) and spec.hardware is None for spec in catalog.main.menu)
    assert (function.warm_unbilled_s, function.warm_billed_s, function.network_bytes_per_s) == (0, 0.005, 500e6)
    assert (function.max_replicas, function.max_functions, function.wire_expansion, function.mb_per_vcpu) == (8, 1, 1, 1024)
    assert function.usd_per_request == catalog.main.usd_per_request == catalog.storage.usd_per_gb_month == 0
    assert function.usd_per_storage_gb_second == read_catalog("local").function.usd_per_storage_gb_second == 0
    assert function.runtime_memory_mb == catalog.main.runtime_memory_mb == 0 and function.expert_memory_factor == 1
    assert (catalog.reference.hardware, catalog.reference.gpus) == ("paper", ())


def test_by_path_is_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(LOCAL)
    mine, shipped = read_catalog(str(path)), read_catalog("local")
    assert (mine.file.path, shipped.file.path) == (str(path), "local")
    assert mine.file.sha256 == shipped.file.sha256
    assert mine.function == shipped.function


@pytest.mark.parametrize("side", ["function", "main"])
def test_the_architecture_says_which_prices_hold(side: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(ARM)
    catalog = read_catalog(str(path))
    assert catalog.function_usd_per_gb_second == catalog.main_usd_per_gb_second == 0.0000133334
    before, after = ARM.split(f"[{side}]\n")
    path.write_text(f"{before}[{side}]\n{after.replace(', arm64 = 0.0000133334', '', 1)}")
    with pytest.raises(UsageError, match=rf"no {side}\.usd_per_gb_second for the architecture arm64"):
        read_catalog(str(path))


def test_instances_come_after_what_is_paid_by_use(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    last = '    { name = "main-10240", memory_mb = 10240 },\n'
    path.write_text(LOCAL.replace(last, last + BY_HOUR))
    assert read_catalog(str(path)).main.menu[-1].usd_per_hour == 0.7
    path.write_text(LOCAL.replace(last, BY_HOUR + last))
    with pytest.raises(UsageError, match="paid by use first"):
        read_catalog(str(path))


def test_the_oldest_price_is_the_oldest_figure_in_dollars(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(LOCAL.replace('"reference.gpus"]\ndate = 2026-05-01', '"reference.gpus"]\ndate = 2025-02-03'))
    assert read_catalog(str(path)).oldest_price == date(2025, 2, 3)
    path.write_text(
        LOCAL.replace('"function.network_bytes_per_s"]\ndate = 2026-11-25', '"function.network_bytes_per_s"]\ndate = 2024-02-03')
    )
    assert "2024-02-03" in path.read_text() and read_catalog(str(path)).oldest_price == date(2026, 5, 1)


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("usd_per_request = 0.0000002", "usd_per_request = -1.0", "function.usd_per_request"),
        ("usd_per_request = 0.0000002", "usd_per_request = nan", "function.usd_per_request"),
        ("usd_per_request = 0.0000002", 'usd_per_request = "free"', "function.usd_per_request"),
        ("usd_per_request = 0.0000002", "usd_per_request = 0.0000002\nusd_per_reqest = 1.0", "usd_per_reqest"),
        ("usd_per_request = 0.0000002", "", "function.usd_per_request"),
        ("wire_expansion = 1.3", "wire_expansion = 0.3", "function.wire_expansion"),
        ("expert_memory_factor = 1.25", "expert_memory_factor = 0.9", "function.expert_memory_factor"),
        ("max_functions = 4", "max_functions = 0", "function.max_functions"),
        ("[128, 192,", "[192, 128,", "must ascend"),
        ("x86_64 = 0.0000166667", "sparc = 0.0000166667", "function.usd_per_gb_second"),
        (
            "usd_per_gb_second = { x86_64 = 0.0000166667, arm64 = 0.0000133334 }",
            "usd_per_gb_second = 0.0000166667",
            "function.usd_per_gb_second",
        ),
        ('architecture = "x86_64"', 'architecture = "sparc"', "architecture"),
        ('architecture = "x86_64"\n', "", "architecture"),
        ('name = "main-1280"', 'name = "main-1024"', "without repeats"),
        ("memory_mb = 1280 }", "memory_mb = 1000 }", "ascending in memory_mb"),
        ("memory_mb = 1280 }", "memory_mb = 1152 }", "without repeats"),
        ("memory_mb = 1024 }", "memory_mb = 1024, vcpus = 0.0 }", "must be above 0"),
        ("memory_mb = 1024 }", "memory_mb = 1024, vcpus = 2.0 }", "for every spec that is paid by use or for none"),
        ("memory_mb = 10240 }", "memory_mb = 10240, usd_per_hour = 1.0 }", "must give vcpus for every instance"),
        ("memory_mb = 1024 }", "memory_mb = 1024, gpu_memory_mb = 1024 }", "its price is usd_per_accelerator_gb_second"),
        (", usd_per_hour = 0.736", "", "must give gpu_memory_mb, usd_per_hour and hardware"),
        (', hardware = "g4dn.xlarge"', "", "must give gpu_memory_mb, usd_per_hour and hardware"),
        (", gpu_memory_mb = 16384", "", "must give gpu_memory_mb, usd_per_hour and hardware"),
        ('[reference]\nhardware = "lambda"', "[reference]", "reference.hardware"),
        ("usd_per_1000_reads = 0.0\n", "", "storage.usd_per_1000_reads"),
        ("usd_per_1000_writes = 0.0\n", "usd_per_1000_writes = -0.1\n", "storage.usd_per_1000_writes"),
        ('"function.usd_per_request", ', "", "no provenance for function.usd_per_request"),
        ('"reference.hardware", ', "", "no provenance for reference.hardware"),
        (', "storage.usd_per_1000_writes"]', "]", "no provenance for storage.usd_per_1000_writes"),
        ('"function.usd_per_request", ', '"function.usd_per_request", "function.fee", ', "unknown or repeated function.fee"),
        ('"function.usd_per_request", ', '"function.usd_per_request", "main.menu", ', "unknown or repeated main.menu"),
        ("remoe.catalog/2", "remoe.catalog/1", "schema_version"),
        ("date = 2026-05-01", 'date = "lately"', "date"),
        ("[function]\n", "[function\n", "not TOML"),
        ("schema_version = ", 'file = "x"\nschema_version = ', "unknown field 'file'"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, part: str, tmp_path: Path) -> None:
    assert old in LOCAL
    path = tmp_path / "mine.toml"
    path.write_text(LOCAL.replace(old, new, 1))
    with pytest.raises(UsageError) as raised:
        read_catalog(str(path))
    assert part in raised.value.message
    assert str(path) in raised.value.message


def test_unknown_names_and_paths(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no catalog named 'mars'") as raised:
        read_catalog("mars")
    assert "local" in raised.value.hint
    with pytest.raises(UsageError, match="cannot be read"):
        read_catalog(str(tmp_path / "none.toml"))

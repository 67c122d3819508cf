"""Every kind of file that is read, made to take memory or time: one sentence, exit code 1 or 2, and little of either.

A row of HOSTILE is a file, a command that reads it, and what the command says. Each runs in a process of its own, whose address space may
grow by GROWTH_BYTES; a limit that is missing shows as a MemoryError, which has another sentence.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli.artifacts import write_json
from remoe_cli.plan.catalog.catalog import catalog_text
from remoe_cli.plan.document import LayerPlan
from tests.support import forked
from tests.support.families import FAMILIES
from tests.support.synthetic import plan_by_hand, synthetic_profile

GROWTH_BYTES = 3 << 29  # 1.5 GiB
MIB = 1 << 20
Make = Callable[[Path], object]


def limited(arguments: tuple[str, ...]) -> None:
    """The command, with a limit on what the process may map beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + GROWTH_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    forked.command(arguments, {})


def deep(opening: str, closing: str = "") -> Make:
    return lambda path: path.write_text(opening * 100_000 + closing)


def zeros(mebibytes: int) -> Make:
    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            file.truncate(mebibytes * MIB)

    return make


def parts(begin: str, part: str, count: int, end: str) -> Make:
    return lambda path: path.write_text(begin + part * count + end)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def changed(**changes: Any) -> Make:
    """A JSON file with other values; `a__b` is the field b of the field a, and a number an element of a list."""

    def make(path: Path) -> None:
        document = json.loads(path.read_text())
        for name, value in changes.items():
            *path_to, last = name.split("__")
            inner = document
            for key in path_to:
                inner = inner[int(key) if key.isdigit() else key]
            inner[last] = value
        path.write_text(json.dumps(document))

    return make


def toml(old: str, new: str) -> Make:
    def make(path: Path) -> None:
        text = catalog_text("local")
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return make


def packed(begin: bytes, repeated: bytes, mebibytes: int) -> Make:
    def make(path: Path) -> None:
        with gzip.open(path, "wb", compresslevel=6) as file:
            file.write(begin)
            block = repeated * (MIB // len(repeated))
            for _ in range(mebibytes):
                file.write(block)

    return make


def array_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("counts.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|i1", "fortran_order": False, "shape": (2**24, 2, 8)})  # type: ignore[no-untyped-call]
        for _ in range(2**28 // MIB // 8):
            file.write(bytes(8 * MIB))


def long_head(path: Path) -> None:
    (path.parent.parent / "p.txt").write_text("A prompt.\n")
    path.write_bytes((2**40).to_bytes(8, "little") + b"{" + bytes(1000))


def many_layers(path: Path) -> None:
    document = json.loads(path.read_text())
    document["layers"] = document["layers"][:1] * 100_000
    path.write_text(json.dumps(document))


@dataclass(frozen=True)
class Row:
    """A file that is made hostile, the command that reads it, and what it says; `replace` words of the command are the file."""

    file: str
    make: Make
    command: str
    says: str


PLANS = ("deploy plan.json --name x", "package plan.json -o out", "deploy plan.json --name x --target aws --dry-run")
PLAN, PROFILE, MODEL = PLANS[0], "plan profile -o out.json", "profile import model counts.npz --latency-from paper -o out"
TRACE, PROMPTS = "plan profile -o out.json --requests trace", "profile run model --latency-from paper -o out --data prompts"
KEPT = "state/receipts/local/x"
CATALOG, GIVEN = "plan profile -o out.json --catalog my.toml", "plan profile -o out.json --placement given.json"
REPORT = "report answers.jsonl -o out.html"
HOSTILE: dict[str, Row] = {
    # Documents of remoe
    "plan, deep": Row("plan.json", lambda p: p.write_text('{"remoe.plan/": ' + "[" * 100_000), PLAN, "nested too deeply"),
    "plan, large": Row("plan.json", zeros(4096), PLAN, "it has more than 32 MiB"),
    "plan, parts": Row("plan.json", parts('{"remoe.plan/": [', "[],", 9_000_000, "0]}"), PLAN, "a value of more than 1,048,576"),
    "plan, pipe": Row("plan.json", pipe, PLAN, "it is a pipe, not a file"),
    "plan, device": Row("plan.json", endless, PLAN, "it is a device, not a file"),
    "plan, layers": Row("plan.json", many_layers, PLAN, "is damaged at 'layers': Tuple should have at most 512 items"),
    "plan, replicas": Row("plan.json", changed(layers__0__replicas=10**9), PLAN, "at 'layers.0.replicas': Input should be less than"),
    "plan, vcpus": Row("plan.json", changed(main__vcpus=1e300), PLAN, "it holds the number 1e+300, which is too large"),
    "plan, tokens": Row("plan.json", changed(workload__n_in=1e300), PLAN, "it holds the number 1e+300, which is too large"),
    "plan, digits": Row("plan.json", changed(main__memory_mb=10**400), PLAN, "holds the number 1000000"),
    "plan, NaN": Row("plan.json", changed(ttft_s=float("nan")), PLAN, "it holds NaN, which is not a number in JSON"),
    "plan, infinity": Row("plan.json", changed(ttft_s=float("inf")), PLAN, "it holds Infinity"),
    "profile, deep": Row("profile/profile.json", deep("["), PROFILE, "nested too deeply"),
    "profile, large": Row("profile/profile.json", zeros(4096), PROFILE, "it has more than 32 MiB"),
    "profile, pipe": Row("profile/profile.json", pipe, PROFILE, "it has no profile.json"),
    "profile, layers": Row(
        "profile/profile.json", changed(spec__hidden_layers=2_000_000), PROFILE, "'spec.hidden_layers': Input should be"
    ),
    "profile, experts": Row(
        "profile/profile.json", changed(spec__experts_per_layer=10**9), PROFILE, "'spec.experts_per_layer': Input should"
    ),
    "profile, times": Row("profile/profile.json", changed(latency__load_s=1e300), PROFILE, "it holds the number 1e+300, which"),
    "profile, arrays": Row("profile/arrays.safetensors", zeros(5000), PROFILE, "and 4,096 MiB is the most for it"),
    "placement, deep": Row("given.json", deep("["), GIVEN, "nested too deeply"),
    "placement, large": Row("given.json", zeros(4096), GIVEN, "it has more than 32 MiB"),
    "placement, pipe": Row("given.json", pipe, GIVEN, "it is a pipe, not a file"),
    "receipts, deep": Row("answers.jsonl", deep("["), REPORT, "nested too deeply"),
    "receipts, large": Row("answers.jsonl", zeros(4096), REPORT, "it has more than 128 MiB"),
    "receipts, parts": Row("answers.jsonl", parts("[", "[],", 9_000_000, "0]"), REPORT, "a value of more than 8,388,608"),
    "receipts, pipe": Row("answers.jsonl", pipe, REPORT, "it is a pipe, not a file"),
    "receipts, device": Row("answers.jsonl", endless, REPORT, "it is a device, not a file"),
    "receipts, figures": Row("answers.jsonl", lambda p: p.write_text('{"total_s": 1e300}'), REPORT, "the number 1e300, which is too large"),
    "plan of a report, layers": Row("plan.json", many_layers, "report plan.json -o out.html", "Tuple should have at most 512 items"),
    # Figures
    "catalog, deep": Row("my.toml", lambda p: p.write_text("x = " + "[" * 100_000), CATALOG, "it is nested too deeply"),
    "catalog, large": Row("my.toml", zeros(4096), CATALOG, "it has more than 256 KiB"),
    "catalog, device": Row("my.toml", endless, CATALOG, "it is a device, not a file"),
    "catalog, replicas": Row("my.toml", toml("max_replicas = 4", "max_replicas = 1000000000"), CATALOG, "wrong at 'function.max_replicas'"),
    "catalog, infinity": Row("my.toml", toml("warm_billed_s = 0.001", "warm_billed_s = inf"), CATALOG, "wrong at 'function.warm_billed_s'"),
    "catalog, functions": Row(
        "my.toml", toml("max_functions = 4", "max_functions = 9999999"), CATALOG, "wrong at 'function.max_functions'"
    ),
    "hardware, deep": Row("my.toml", deep("[", "a]"), f"{MODEL} --latency-from ./my.toml", "hardware description ./my.toml"),
    # Models
    "config, deep": Row("model/config.json", lambda p: p.write_text('{"a": ' * 50_000), MODEL, "nested too deeply"),
    "config, large": Row("model/config.json", zeros(4096), MODEL, "it has 4,294,967,296 bytes, and 16 MiB is the most"),
    "config, pipe": Row("model/config.json", pipe, MODEL, "it is a pipe, not a file"),
    "config, folder": Row("model/config.json", folder, MODEL, "it is a folder, not a file"),
    "config, device": Row("model/config.json", endless, MODEL, "outside of the model's folder"),
    "config, layers": Row("model/config.json", changed(num_hidden_layers=2_000_000), MODEL, "num_hidden_layers is 2,000,000, and 512 is"),
    "config, labels": Row("model/config.json", changed(num_labels=10**9), MODEL, "its num_labels is 1,000,000,000"),
    "config, experts": Row("model/config.json", changed(n_routed_experts=10**9), MODEL, "its n_routed_experts is 1,000,000,000"),
    "tokenizer, large": Row("model/tokenizer.json", zeros(4096), MODEL, "and 256 MiB is the most for it"),
    "tokenizer, pipe": Row("model/tokenizer.json", pipe, MODEL, "it is a pipe, not a file"),
    "tokenizer settings, deep": Row("model/tokenizer_config.json", deep("["), MODEL, "nested too deeply"),
    "generation settings, deep": Row("model/generation_config.json", deep("["), MODEL, "nested too deeply"),
    "quantisation, deep": Row("model/hf_quant_config.json", deep("["), MODEL, "nested too deeply"),
    "quantisation, large": Row("model/hf_quant_config.json", zeros(4096), MODEL, "and 16 MiB is the most"),
    "chat template, large": Row("model/chat_template.jinja", zeros(4096), MODEL, "and 4 MiB is the most for it"),
    "index, deep": Row("model/model.safetensors.index.json", deep("["), MODEL, "nested too deeply"),
    "index, large": Row("model/model.safetensors.index.json", zeros(4096), MODEL, "and 128 MiB is the most"),
    "index, paths": Row(
        "model/model.safetensors.index.json",
        lambda p: p.write_text(json.dumps({"weight_map": {"a": "../../../etc/passwd"}})),
        MODEL,
        "it names '../../../etc/passwd', which is no file of the folder",
    ),
    "weights, head": Row("model/model.safetensors", long_head, PROMPTS.replace("prompts", "p.txt"), "is not a complete safetensors file"),
    "weights, pipe": Row("model/model.safetensors", pipe, MODEL, "it is a pipe, not a file"),
    # Routing
    "routing, array bomb": Row("counts.npz", array_bomb, MODEL, "its arrays take"),
    "routing, deep": Row("counts.npz", lambda p: p.write_text('{"choices": ' + "[" * 100_000), MODEL, "nested too deeply"),
    "routing, parts": Row("counts.npz", parts('{"choices": [', "[],", 9_000_000, "0]}"), MODEL, "which is the most"),
    "routing, packed": Row("counts.npz", packed(b'{"choices": [', b" ", 100), MODEL, "unpacks to more than 64 MiB and more than 100 times"),
    # Requests
    "trace, deep": Row("trace", deep("["), TRACE, "row 1 is not a JSON object"),
    "trace, deep object": Row("trace", lambda p: p.write_text('{"a":' * 300 + "1" + "}" * 300), TRACE, "nested too deeply"),
    "trace, parts": Row("trace", parts('{"a": [', "[],", 10_000_000, "0]}"), TRACE, "a value of more than 8,388,608"),
    "trace, one line": Row("trace", zeros(4096), TRACE, "row 1 is longer than"),
    "trace, packed rows": Row("trace", packed(b"n_in,n_out\n", b"1,1" + b" " * 1020 + b"\n", 300), TRACE, "unpacks to more than 64 MiB"),
    "trace, packed line": Row("trace", packed(b'{"a": "', b"x", 300), TRACE, "row 1 is not a JSON object of at most"),
    "trace, huge numbers": Row("trace", lambda p: p.write_text("n_in,n_out\n1e300,1\n"), TRACE, "not a number of 1 or more"),
    "trace, folder": Row("trace", folder, TRACE, "cannot be read: Is a directory"),
    # Receipts
    "kept receipts, large": Row(f"{KEPT}/receipts.jsonl", zeros(4096), "cost x", "it has 4,294,967,296 bytes, and 72 MiB is the most"),
    "kept receipts, pipe": Row(f"{KEPT}/receipts.jsonl", pipe, "cost x", "it is a pipe, not a file"),
    "kept receipts, device": Row(f"{KEPT}/receipts-000001.jsonl", endless, "cost x", "it is a link, and remoe does not follow links"),
    # Prompts
    "prompts, deep": Row("p.jsonl", deep("["), PROMPTS.replace("prompts", "p.jsonl"), "nested too deeply"),
    "prompts, parts": Row("p.jsonl", parts("[", "[],", 9_000_000, "0]"), PROMPTS.replace("prompts", "p.jsonl"), "not"),
    "prompts, one line": Row("p.txt", zeros(4096), PROMPTS.replace("prompts", "p.txt"), "a line of more than 32 MiB"),
    "prompts, packed": Row(
        "p.txt.gz", packed(b"", b"a" * (MIB - 1) + b"\n", 300), PROMPTS.replace("prompts", "p.txt.gz"), "unpacks to more than 64"
    ),
    "prompts, parquet pipe": Row("p.parquet", pipe, PROMPTS.replace("prompts", "p.parquet"), "is a pipe, not a file"),
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the commands read."""
    FAMILIES["deepseek_v2"]().save_pretrained(tmp_path / "model")
    layer = LayerPlan(layer=0, remote=(0,), memory_mb=128, replicas=1)
    write_json(tmp_path / "plan.json", plan_by_hand((layer,)))
    synthetic_profile(tmp_path / "profile")
    (tmp_path / "counts.npz").write_bytes(b"")
    (tmp_path / KEPT).mkdir(parents=True)
    (tmp_path / KEPT / "receipts.jsonl").write_text("")
    for name in ("STATE", "CACHE"):
        monkeypatch.setenv(f"REMOE_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.sweep
@pytest.mark.skipif(sys.platform != "linux", reason="address spaces are limited on Linux only")
@pytest.mark.parametrize("name", HOSTILE)
def test_one_sentence_in_bounded_memory(name: str, home: Path) -> None:
    row = HOSTILE[name]
    row.make(home / row.file)
    run = forked.complete(limited, tuple(row.command.split()))
    error = next((line for line in run.stderr.splitlines() if line.startswith("error: ")), run.stderr)
    assert row.says in error, run.stderr[-2000:]
    assert run.returncode in (1, 2) and "Traceback" not in run.stderr
    assert any(line.startswith("  hint: ") for line in run.stderr.splitlines())
    assert not any((home / name).exists() for name in ("out", "out.json", "out.html"))


@pytest.mark.parametrize("command", PLANS[1:])
def test_all_commands_on_plans_read_them_alike(command: str, home: Path) -> None:
    zeros(4096)(home / "plan.json")
    run = forked.complete(limited, tuple(command.split()))
    assert "it has more than 32 MiB" in run.stderr and run.returncode in (1, 2)

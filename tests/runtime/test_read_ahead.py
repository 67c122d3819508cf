"""Reading weights before the loader asks: which bytes, in which order, and what the kernel then has."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from remoe_cli.artifacts import write_json
from remoe_cli.errors import ModelError
from remoe_cli.model.checkpoint import Checkpoint, find
from remoe_cli.model.experts import expert_layers
from remoe_cli.model.loader import load
from remoe_cli.model.spec import read_spec
from remoe_cli.package.partial_checkpoint import read_header, write_partial_checkpoint
from remoe_cli.profile.record import ModelRef
from remoe_cli.runtime import load_main
from remoe_cli.runtime.read_ahead import PIECE_BYTES, Span, reading_ahead, spans
from remoe_cli.runtime.server_config import ServerConfig
from tests.support.api_server import PRICES
from tests.support.families import EXPERTS, build, save
from tests.support.page_cache import drop, is_cached, is_untouched, wait_until

AWAY = {0: (0, 1, 2, 5), 1: tuple(range(EXPERTS))}


def tensors(checkpoint: Checkpoint) -> dict[str, tuple[Path, int, int]]:
    """Where each tensor of a checkpoint is: its file, and its first and last byte."""
    found = {}
    for file in checkpoint.weight_files:
        header, data = read_header(file)
        found |= {n: (file, *(data + at for at in e["data_offsets"])) for n, e in header.items() if n != "__metadata__"}
    return found


def covered(found: list[Span]) -> dict[Path, set[int]]:
    bytes_of: dict[Path, set[int]] = {}
    for span in found:
        assert 0 < span.last - span.first <= PIECE_BYTES
        before = bytes_of.setdefault(span.file, set())
        assert before.isdisjoint(range(span.first, span.last)), "some bytes are read twice"
        before |= set(range(span.first, span.last))
    return bytes_of


@pytest.mark.parametrize("fused", [False, True], ids=["hub-layout", "fused-layout"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_what_is_loaded_is_read_and_nothing_else(family: str, fused: bool, tmp_path: Path) -> None:
    whole = build(family)
    whole.save_pretrained(tmp_path, save_original_format=not fused, max_shard_size="100KB")
    checkpoint, layers = find(str(tmp_path)), [x.layer for x in expert_layers(whole)]
    away = dict(zip(layers, AWAY.values(), strict=False))
    read = covered(spans(checkpoint, away, EXPERTS))
    for name, (file, first, last) in tensors(checkpoint).items():
        layer = int(found[1]) if (found := re.search(r"\.(\d+)\.", name)) else -1
        elsewhere, expected = away.get(layer, ()), set(range(first, last))
        if (single := re.search(r"experts\.(\d+)\.", name)) and int(single[1]) in elsewhere:
            expected = set()
        elif not single and "shared" not in name and re.search(r"experts\.|(in|out)put_linear\.", name):
            row = (last - first) // EXPERTS
            expected = {at for e in range(EXPERTS) if e not in elsewhere for at in range(first + e * row, first + (e + 1) * row)}
        assert read.get(file, set()) & set(range(first, last)) == expected, name


def test_layers_are_read_in_the_order_of_a_pass(tmp_path: Path) -> None:
    """Whatever their order in the files: what belongs to no layer first, and layer 10 after layer 9."""
    names = [
        "model.layers.10.a.weight",
        "lm_head.weight",
        "model.layers.9.a.weight",
        "model.embed_tokens.weight",
        "model.layers.0.a.weight",
    ]
    (tmp_path / "config.json").write_text("{}")
    save_file({name: torch.zeros(5, 3) for name in names}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint("m", tmp_path)
    places = {(first, last): name for name, (_, first, last) in tensors(checkpoint).items()}
    read: list[str] = []
    for span in spans(checkpoint, {}, EXPERTS):
        read += [name for (first, last), name in sorted(places.items()) if span.first <= first and last <= span.last]
    assert {*read[:2]} == {"lm_head.weight", "model.embed_tokens.weight"}
    assert read[2:] == ["model.layers.0.a.weight", "model.layers.9.a.weight", "model.layers.10.a.weight"]


def test_all_of_a_partial_checkpoint_is_read(tmp_path: Path) -> None:
    """Its files have the experts that are here, and their rows are not counted by their ids."""
    save("mixtral", torch.float32, tmp_path / "whole", fused=True)
    keep = {0: (3, 4, 6, 7), 1: ()}
    write_partial_checkpoint(find(str(tmp_path / "whole")), keep, tmp_path / "part")
    part = Checkpoint("m", tmp_path / "part", "local:0")
    read = covered(spans(part, AWAY, EXPERTS))
    assert {file: len(bytes_of) for file, bytes_of in read.items()} == {
        file: file.stat().st_size - read_header(file)[1] for file in part.weight_files
    }


def test_the_kernel_has_what_was_read_and_not_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(48 << 20))
    wanted = [Span(file, 32 << 20, 40 << 20), Span(file, 8 << 20, 16 << 20)]
    drop(file)
    with reading_ahead(lambda: wanted):
        assert wait_until(lambda: all(is_cached(file, span.first, span.last) for span in wanted))
    assert is_untouched(file, 0, 8 << 20) and is_untouched(file, 16 << 20, 32 << 20), "more is read than was asked for"


def test_a_main_server_reads_while_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are in memory although nothing has loaded them yet."""
    save("mixtral", torch.float32, tmp_path / "model", fused=False)
    weights, found = tmp_path / "model" / "model.safetensors", find(str(tmp_path / "model"))
    model = ModelRef(path=found.name, revision=found.revision)
    write_json(tmp_path / "server.json", ServerConfig(model=model, spec=read_spec(found), functions=(), prices=PRICES))
    seen: list[bool] = []

    def loading(*given: Any, **named: Any) -> None:
        seen.append(wait_until(lambda: is_cached(weights, weights.stat().st_size // 2, weights.stat().st_size)))

    monkeypatch.setattr(load_main, "load", loading)
    monkeypatch.setattr(load_main, "find_profiled", lambda path, revision: (drop(weights), found)[1])
    load_main.load_here(tmp_path / "server.json", lambda connections, timeout_s: None)
    assert seen == [True]


def test_the_end_of_the_body_ends_the_reading(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 20))
    before, many = threading.active_count(), [Span(file, 0, 1 << 20)] * 100_000
    begun = time.monotonic()
    with reading_ahead(lambda: many):
        pass
    assert threading.active_count() == before and time.monotonic() - begun < 30, "it goes on when nobody waits for it"


@pytest.mark.parametrize("damage", ["cut", "gone", "no header", "an index of a file that is not there"])
def test_a_damaged_file_is_left_to_the_loader(damage: str, tmp_path: Path) -> None:
    save("mixtral", torch.float32, tmp_path, fused=False)
    weights = tmp_path / "model.safetensors"
    if damage == "cut":
        os.truncate(weights, 5000)
    elif damage == "no header":
        weights.write_bytes(b"\xff" * 1000)
    else:
        weights.unlink()
        if damage != "gone":
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    checkpoint = Checkpoint("m", tmp_path)
    with pytest.raises(ModelError) as refused, reading_ahead(lambda: spans(checkpoint, {}, EXPERTS)):
        load(checkpoint)
    assert "\n" not in refused.value.message

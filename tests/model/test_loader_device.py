"""Loading to a device: each tensor straight to where it is wanted, and none of them through host memory."""

from __future__ import annotations

import ctypes
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from remoe_cli.errors import ModelError
from remoe_cli.model.checkpoint import find
from remoe_cli.model.experts import expert_layers, run_expert
from remoe_cli.model.loader import Keep, copy_weights, expert_bytes_held, load, load_gpu_experts, read_config, skeleton
from tests.support import forked
from tests.support.families import FAMILIES, save

layouts = pytest.mark.parametrize("fused", [False, True], ids=["hub-layout", "fused-layout"])


def _anonymous_kb() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))


def print_peak(folder: Path, device: str, keep: Keep, chosen: Keep) -> None:
    """The most anonymous kB that loading adds to this process at a time, and the kB of experts that it then holds."""
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed goes back to the system, as with tensors of real size
    checkpoint, done, peaks = find(str(folder)), threading.Event(), [0]
    skeleton(read_config(checkpoint))  # what imports take
    before = _anonymous_kb()

    def watch() -> None:
        while not done.wait(0.001):
            peaks.append(_anonymous_kb())

    watching = threading.Thread(target=watch)
    watching.start()
    model = load(checkpoint, keep, device=device)
    load_gpu_experts(checkpoint, model, chosen, device)
    copy_weights(model)
    peaks.append(_anonymous_kb())  # a busy machine may let the thread miss it
    done.set()
    watching.join()
    print(json.dumps([max(peaks) - before, expert_bytes_held(model) / 1024]))


@layouts
def test_what_is_on_a_device_does_not_pass_through_host_memory(fused: bool, tmp_path: Path) -> None:
    """240 MB of non-experts and 75 MB of experts for a device without memory, and 75 MB for the host."""
    config = FAMILIES["mixtral"]()
    config.hidden_size, config.intermediate_size, config.head_dim, config.num_hidden_layers, config.vocab_size = 512, 512, 16, 12, 118_000
    with torch.device("meta"):
        whole: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    whole = whole.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.fill_(0.5)
    nonexpert_kb = (sum(p.numel() * p.element_size() for p in whole.parameters()) - expert_bytes_held(whole)) / 1024
    whole.save_pretrained(tmp_path, save_original_format=not fused)
    del whole
    keep, chosen = ({layer: tuple(range(first, 8, 2)) for layer in range(12)} for first in (0, 1))

    def growth(device: str) -> tuple[float, float]:
        run = forked.complete(print_peak, tmp_path, device, keep, chosen)
        assert run.returncode == 0, run.stderr
        peak_kb, held_kb = json.loads(run.stdout)
        return peak_kb, held_kb

    peak_kb, held_kb = growth("meta")
    assert peak_kb < 1.1 * held_kb + 4096  # Python's own
    assert growth("cpu")[0] > nonexpert_kb + held_kb  # it is seen where it does
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("family", ["granitemoe", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_all_but_the_experts_are_loaded_to_another_device(family: str, tmp_path: Path) -> None:
    whole = save(family, torch.float32, tmp_path, fused=False)
    checkpoint = find(str(tmp_path))
    keep = {x.layer: (1, 6) for x in expert_layers(whole)}
    model = load(checkpoint, keep, device="meta")
    experts = {id(p): whole.get_submodule(x.name)._parameters[name] for x in expert_layers(model) for name, p in x.parameters().items()}
    for tensor in (*model.parameters(), *model.buffers()):
        assert tensor.device.type == ("cpu" if id(tensor) in experts else "meta")
        assert id(tensor) not in experts or torch.equal(tensor, experts[id(tensor)][[1, 6]])
    assert experts and model.device.type == "meta"
    tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied == (family == "granitemoe")


@pytest.mark.sweep
@layouts
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_for_a_gpu_are_loaded_apart(family: str, fused: bool, tmp_path: Path) -> None:
    whole = save(family, torch.bfloat16, tmp_path, fused=fused)
    layers = expert_layers(whole)
    chosen = {layers[0].layer: (2, 3, 7)}
    model = load(find(str(tmp_path)), {})
    loaded = load_gpu_experts(find(str(tmp_path)), model, chosen, "cpu")
    assert set(loaded) == set(chosen) and loaded[layers[0].layer].ids == (2, 3, 7)
    theirs = loaded[layers[0].layer].module._parameters
    assert theirs.keys() == layers[0].parameters().keys()
    for name, p in layers[0].parameters().items():
        assert torch.equal(theirs[name], p[[2, 3, 7]])
    assert not any(loaded[layers[0].layer].starts_early(torch.tensor(index)) for index in ([[2, 0]], [[2], [0]]))
    hidden, index = torch.randn((3, layers[0].width)).bfloat16(), torch.tensor([[2, 0], [7, 3], [8, 1]])
    with torch.no_grad():
        out = loaded[layers[0].layer].run(hidden, index)
        one = torch.cat([loaded[layers[0].layer].run(hidden[t : t + 1], index[t : t + 1]) for t in range(3)])
        for place, expert in enumerate(index.reshape(-1).tolist()):
            x = hidden[place // 2 : place // 2 + 1]
            expected = run_expert(layers[0], expert, x) if expert in (2, 3, 7) else torch.zeros_like(x)
            assert torch.allclose(out[place], expected[0], rtol=0.05, atol=0.05) and torch.allclose(
                one[place], expected[0], rtol=0.05, atol=0.05
            )
    with pytest.raises(ModelError, match="expert 9"):
        load_gpu_experts(find(str(tmp_path)), model, {layers[0].layer: (9,)}, "cpu")

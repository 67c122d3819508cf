"""Loading a part of a checkpoint: the right rows and no others, and a clear ModelError for every checkpoint that is not whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from remoe_cli.errors import ModelError
from remoe_cli.model.checkpoint import find
from remoe_cli.model.experts import expert_layers
from remoe_cli.model.loader import Keep, expert_bytes_held, load
from remoe_cli.model.tokens import load_tokenizer
from tests.support import forked
from tests.support.families import EXPERTS, FAMILIES, build, save
from tests.support.harness import InProcessExperts, greedy, logits, serve

# Every checkpoint layout: w1/w2/w3 an expert, gate/up/down an expert, fused under other names, fused with biases, no gate.
LAYOUT_FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "nemotron_h", "ernie4_5_moe"]
layouts = pytest.mark.parametrize("fused", [False, True], ids=["hub-layout", "fused-layout"])
Tensors = dict[str, torch.Tensor]


def uneven(layers: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """Some experts of the first layer, not from 0 on; none of the second; all of any other."""
    return dict(zip(layers, [(1, 4, 6), (), *[tuple(range(EXPERTS))] * len(layers)], strict=False))


@layouts
@pytest.mark.parametrize("family", LAYOUT_FAMILIES)
def test_only_the_kept_rows_are_in_memory_and_the_rest_is_untouched(family: str, fused: bool, tmp_path: Path) -> None:
    save(family, torch.bfloat16, tmp_path, fused)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)  # which keeps a few tensors in float32, as remoe has to
    keep = uneven(tuple(x.layer for x in expert_layers(whole)))
    part = load(find(str(tmp_path)), keep)

    assert type(part) is type(whole)
    assert not part.training
    expert_names = set()
    for mine, full in zip(expert_layers(part), expert_layers(whole), strict=True):
        assert (mine.layer, mine.name, mine.experts) == (full.layer, full.name, EXPERTS)
        assert mine.parameters().keys() == full.parameters().keys()
        for name, rows in mine.parameters().items():
            assert torch.equal(rows, full.parameters()[name][list(keep[mine.layer])])
            assert rows.untyped_storage().nbytes() == rows.numel() * rows.element_size()
            expert_names.add(f"{mine.name}.{name}")
    one = sum(p[0].numel() * p.element_size() for p in expert_layers(whole)[0].parameters().values())
    assert expert_bytes_held(part) == one * sum(map(len, keep.values()))
    mine_state, full_state = part.state_dict(), whole.state_dict()
    assert mine_state.keys() == full_state.keys()
    others = mine_state.keys() - expert_names
    assert all(torch.equal(mine_state[n], full_state[n]) and mine_state[n].dtype == full_state[n].dtype for n in others)


@pytest.mark.sweep
@layouts
@pytest.mark.parametrize("family", LAYOUT_FAMILIES)
def test_a_layer_without_local_experts_runs_through_the_hook(family: str, fused: bool, tmp_path: Path) -> None:
    whole = save(family, torch.float32, tmp_path, fused)
    keep = uneven(tuple(x.layer for x in expert_layers(whole)))
    part = load(find(str(tmp_path)), keep)
    attachment = serve(part, keep, InProcessExperts(whole).send)
    assert (logits(part) - logits(whole)).abs().max() < 1e-4
    attachment.check_fired(1)
    assert torch.equal(greedy(part), greedy(whole))


def test_a_layer_that_keep_does_not_name_keeps_none(tmp_path: Path) -> None:
    save("mixtral", torch.float32, tmp_path, fused=False)
    assert [len(x.parameters()["down_proj"]) for x in expert_layers(load(find(str(tmp_path)), {1: (2,)}))] == [0, 1]


@layouts
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_sharded_checkpoint_is_the_same_model(family: str, fused: bool, tmp_path: Path) -> None:
    whole = build(family)
    whole.save_pretrained(tmp_path, save_original_format=not fused, max_shard_size="100KB")
    checkpoint = find(str(tmp_path))
    assert len(checkpoint.weight_files) > 2
    full = load(checkpoint)
    assert all(torch.equal(value, full.state_dict()[name]) for name, value in whole.state_dict().items())
    part = load(checkpoint, {1: (3,)})
    mine, theirs = (next(x for x in expert_layers(m) if x.layer == 1).parameters()["down_proj"] for m in (part, whole))
    assert torch.equal(mine, theirs[[3]])


def test_weights_that_the_index_does_not_name_are_left_alone(tmp_path: Path) -> None:
    """Repositories such as Mixtral's hold the same weights again as consolidated.safetensors, under other names."""
    whole = build("mixtral")
    whole.save_pretrained(tmp_path, max_shard_size="100KB")
    save_file({"layers.0.attention.wq.weight": torch.zeros(4)}, tmp_path / "consolidated.safetensors")
    assert torch.equal(logits(load(find(str(tmp_path)))), logits(whole))


@pytest.mark.parametrize("family", ["granitemoe", "ernie4_5_moe"])
def test_tied_embeddings_are_tied_and_stored_once(family: str, tmp_path: Path) -> None:
    whole = save(family, torch.float32, tmp_path, fused=False)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    part = load(find(str(tmp_path)), {})
    head, embeddings = part.get_output_embeddings().weight, part.get_input_embeddings().weight
    assert head.data_ptr() == embeddings.data_ptr()
    assert torch.equal(head, whole.get_output_embeddings().weight)


def test_the_generation_config_comes_with_the_model(tmp_path: Path) -> None:
    save("mixtral", torch.float32, tmp_path, fused=False)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "pad_token_id": 3}))
    loaded = load(find(str(tmp_path))).generation_config
    assert (loaded.eos_token_id, loaded.pad_token_id) == ([7, 9], 3)


def edit(change: Callable[[Tensors], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def cut(size: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / "model.safetensors", size)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    build("mixtral").save_pretrained(folder, max_shard_size="100KB")
    return folder / "model.safetensors.index.json"


_EXPERT = "model.layers.1.block_sparse_moe.experts"
_GATE_UP, _DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"
_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing tensor": (edit(lambda t: t.pop("model.norm.weight")), r"is missing 1 tensors, such as model\.norm\.weight"),
    "a missing expert's gate": (edit(lambda t: t.pop(f"{_EXPERT}.3.w1.weight")), rf"is missing expert 3 of {_GATE_UP} \(.*w1"),
    "a missing expert's down": (edit(lambda t: t.pop(f"{_EXPERT}.3.w2.weight")), rf"is missing expert 3 of {_DOWN}"),
    "no expert in a layer": (
        edit(lambda t: [t.pop(name) for name in list(t) if name.startswith(_EXPERT)]),
        rf"is missing 2 tensors, such as {_DOWN}",
    ),
    "an expert too many": (edit(lambda t: t.update({f"{_EXPERT}.8.w2.weight": torch.zeros(64, 32)})), r"has 9 experts in .* says 8"),
    "an unexpected tensor": (
        edit(lambda t: t.update({"model.odd.weight": torch.zeros(2)})),
        r"does not know 1 tensors, such as model\.odd",
    ),
    "another shape": (
        edit(lambda t: t.update({"model.norm.weight": torch.zeros(3)})),
        r"in another shape 1 tensors, such as model\.norm\.weight\.",
    ),
    "an expert of another shape": (edit(lambda t: t.update({f"{_EXPERT}.3.w1.weight": torch.zeros(3, 3)})), "do not fit its config.json"),
    "a file cut in its header": (cut(5000), r"model\.safetensors is not a complete safetensors file"),
    "a file cut in its tensors": (cut(100_000), r"model\.safetensors is not a complete safetensors file"),
    "an empty file": (cut(0), r"model\.safetensors is not a complete safetensors file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no .safetensors file"),
    "pickled weights only": (pickled, "holds no .safetensors file. remoe reads no other weights"),
    "a shard missing": (lambda f: os.remove(next(sharded(f).parent.glob("model-00002*"))), "has no model-00002.*, which its index names"),
    "a broken index": (lambda f: sharded(f).write_text("[]"), r"model\.safetensors\.index\.json cannot be used"),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be used: .*not a valid JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "a broken generation config": (lambda f: (f / "generation_config.json").write_text("{"), r"generation_config\.json cannot be used"),
}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_a_checkpoint_that_is_not_whole_is_refused_in_one_sentence(damage: str, tmp_path: Path) -> None:
    save("mixtral", torch.float32, tmp_path, fused=False)
    spoil, message = _DAMAGE[damage]
    load(find(str(tmp_path)))
    spoil(tmp_path)
    with pytest.raises(ModelError, match=message) as refused:
        load(find(str(tmp_path)))
    assert "\n" not in refused.value.message
    assert refused.value.hint


def test_an_expert_that_is_not_wanted_need_not_be_there(tmp_path: Path) -> None:
    save("mixtral", torch.float32, tmp_path, fused=False)
    edit(lambda t: t.pop(f"{_EXPERT}.3.w1.weight"))(tmp_path)
    assert len(expert_layers(load(find(str(tmp_path)), {1: (2, 4)}))[1].parameters()["down_proj"]) == 2


@pytest.mark.parametrize("keep", [None, {0: (0,), 1: (5,)}], ids=["all", "some"])
def test_a_fused_tensor_of_fewer_experts_is_refused(keep: Keep | None, tmp_path: Path) -> None:
    save("mixtral", torch.float32, tmp_path, fused=True)
    edit(lambda t: t.update({_DOWN: t[_DOWN][:6].clone()}))(tmp_path)
    with pytest.raises(ModelError, match=rf"has 6 experts in {_DOWN}, its config\.json says 8"):
        load(find(str(tmp_path)), keep)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nobody/nothing-here", "cannot be downloaded from the hub"),
        ("not a name/x", "cannot be downloaded from the hub"),
        ("-x/y", "cannot be downloaded from the hub"),
        ("mixtral", "There is no folder mixtral, and it is not a hub id"),
        ("/no/such/folder", "There is no folder /no/such/folder"),
        ("a/b/c", "There is no folder a/b/c"),
        ("../no-such", r"There is no folder \.\./no-such"),
    ],
)
def test_a_model_that_is_nowhere_is_a_model_error(model: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as refused:
        find(model)
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'], ids=["none", "not JSON", "no model"])
def test_a_tokenizer_that_cannot_be_used_is_a_model_error(content: str | None, tmp_path: Path) -> None:
    save("mixtral", torch.float32, tmp_path, fused=False)
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match=r"The tokenizer of .* cannot be loaded"):
        load_tokenizer(find(str(tmp_path)))


def _memory_kb(name: str) -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


def print_growth(folder: Path, keep: Keep | None) -> None:
    """Anonymous kB and peak kB that loading `keep` adds to this process, and the kB of experts that it then holds."""
    checkpoint = find(str(folder))
    load(checkpoint, {})  # what imports and the other weights take
    before, peak_before = _memory_kb("RssAnon:"), _memory_kb("VmHWM:")
    model = load(checkpoint, keep)
    for parameter in model.parameters():
        parameter.sum()  # pages that are mapped and not yet read would not be counted
    print(json.dumps([_memory_kb("RssAnon:") - before, _memory_kb("VmHWM:") - peak_before, expert_bytes_held(model) / 1024]))


@layouts
def test_an_eighth_of_the_experts_takes_an_eighth_of_the_memory(fused: bool, tmp_path: Path) -> None:
    """200 MB of experts; anonymous memory and its peak grow by what is kept, not by what is in the file."""
    config = FAMILIES["mixtral"]()
    config.hidden_size, config.intermediate_size, config.head_dim = 1024, 1024, 16
    config.dtype = torch.float32
    with torch.device("meta"):
        whole: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    whole = whole.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.fill_(0.5)
    assert expert_bytes_held(whole) >= 200e6
    whole.save_pretrained(tmp_path, save_original_format=not fused)
    del whole

    def growth(keep: Keep | None) -> tuple[float, float, float]:
        run = forked.complete(print_growth, tmp_path, keep)
        assert run.returncode == 0, run.stderr
        anonymous_kb, peak_kb, held_kb = json.loads(run.stdout)
        return anonymous_kb, peak_kb, held_kb

    part, part_peak, part_held = growth({0: (3,), 1: (3,)})
    full, full_peak, full_held = growth(None)
    assert part_held == full_held / EXPERTS
    # Seen: 24 to 28 MB of 192, peak (which also counts pages of the file) 54 to 58 MB of 386.
    assert part < 0.25 * full
    assert part_peak < 0.25 * full_peak
    shutil.rmtree(tmp_path)

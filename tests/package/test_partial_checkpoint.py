"""The main function's share: whatever the family and layout, it loads to what the same experts of the whole checkpoint load to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from remoe_cli.artifacts import read_json, sha256_file
from remoe_cli.errors import ModelError
from remoe_cli.model.checkpoint import find
from remoe_cli.model.experts import expert_layers
from remoe_cli.model.loader import Keep, load, read_config, skeleton
from remoe_cli.package import partial_checkpoint
from remoe_cli.package.partial_checkpoint import MANIFEST, MainManifest, seal, write_partial_checkpoint
from tests.support.families import EXPERTS, FAMILIES, build, save

layouts = pytest.mark.parametrize("fused", [False, True], ids=["hub-layout", "fused-layout"])


def _uneven(folder: Path) -> Keep:
    """Some experts of the first layer, not from 0 on; none of the second; all of any other."""
    layers = [x.layer for x in expert_layers(skeleton(read_config(find(str(folder)))))]
    return dict(zip(layers, [(1, 4, 6), (), *[tuple(range(EXPERTS))] * len(layers)], strict=False))


def _same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    mine, theirs = (dict(m.state_dict()) | dict(m.named_buffers()) for m in (one, other))
    return mine.keys() == theirs.keys() and all(
        (mine[n].dtype, mine[n].shape) == (theirs[n].dtype, theirs[n].shape) and torch.equal(mine[n], theirs[n]) for n in mine
    )


@pytest.mark.sweep
@layouts
@pytest.mark.parametrize("family", FAMILIES)
def test_a_share_loads_to_what_the_checkpoint_does(family: str, fused: bool, tmp_path: Path) -> None:
    save(family, torch.bfloat16, tmp_path / "whole", fused)
    keep = _uneven(tmp_path / "whole")
    done: list[tuple[int, int]] = []
    write_partial_checkpoint(find(str(tmp_path / "whole")), keep, tmp_path / "share", lambda *pair: done.append(pair))
    assert _same(load(find(str(tmp_path / "share")), keep), load(find(str(tmp_path / "whole")), keep))
    held = sum(t.numel() * t.element_size() for f in (tmp_path / "share").glob("*.safetensors") for t in load_file(f).values())
    assert done[-1] == (held, held)


@layouts
def test_a_share_holds_no_more_than_it_says(fused: bool, tmp_path: Path) -> None:
    save("mixtral", torch.bfloat16, tmp_path / "whole", fused)
    whole, folder = find(str(tmp_path / "whole")), tmp_path / "share"
    write_partial_checkpoint(whole, {0: (1, 4, 6), 1: (2,)}, folder)
    assert _same(load(find(str(folder)), {0: (4,)}), load(whole, {0: (4,)}))
    for keep in ({0: (0,)}, {0: (1,), 1: (4,)}, None):
        with pytest.raises(ModelError, match=r"share does not hold expert [04] of layer [01]\."):
            load(find(str(folder)), keep)


@layouts
def test_weights_in_many_files_stay_below_the_limit(fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("gpt_oss", torch.bfloat16).save_pretrained(tmp_path / "whole", save_original_format=not fused, max_shard_size="100KB")
    monkeypatch.setattr(partial_checkpoint, "_FILE_BYTES", 20_000)
    monkeypatch.setattr(partial_checkpoint, "_COPY_BYTES", 1_000)
    whole = find(str(tmp_path / "whole"))
    keep = {0: (2, 3, 7), 1: (5,)}
    write_partial_checkpoint(whole, keep, tmp_path / "share")
    assert not (tmp_path / "share" / "model.safetensors.index.json").exists()
    files = sorted((tmp_path / "share").glob("*.safetensors"))
    assert len(files) > len(whole.weight_files) > 2
    tensors = [sorted(load_file(f).items(), key=lambda item: item[1].nbytes) for f in files]
    assert all(sum(t.nbytes for _, t in each) <= 20_000 or len(each) == 1 for each in tensors)
    assert _same(load(find(str(tmp_path / "share")), keep), load(whole, keep))


def test_a_config_without_a_number_type_gets_that_of_the_whole_checkpoint(tmp_path: Path) -> None:
    """The first tensor, by which such a checkpoint is loaded, may be an expert that leaves."""
    save("mixtral", torch.bfloat16, tmp_path / "whole", fused=False)
    weights, config = tmp_path / "whole" / "model.safetensors", tmp_path / "whole" / "config.json"
    tensors = load_file(weights)
    save_file({n: t.float() for n, t in tensors.items() if "experts" in n}, weights.with_name("a.safetensors"))
    save_file({n: t for n, t in tensors.items() if "experts" not in n}, weights.with_name("b.safetensors"))
    weights.unlink()
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "dtype"}))
    write_partial_checkpoint(find(str(tmp_path / "whole")), {}, tmp_path / "share")
    part = load(find(str(tmp_path / "share")), {})
    assert part.dtype == torch.float32 and _same(part, load(find(str(tmp_path / "whole")), {}))


def test_a_checkpoint_that_lacks_a_kept_expert_is_refused(tmp_path: Path) -> None:
    save("mixtral", torch.float32, tmp_path / "whole", fused=True)
    weights = tmp_path / "whole" / "model.safetensors"
    down = "model.layers.1.mlp.experts.down_proj"
    save_file({n: t[:6].clone() if n == down else t for n, t in load_file(weights).items()}, weights)
    with pytest.raises(ModelError, match=rf"has 6 experts in {down}"):
        write_partial_checkpoint(find(str(tmp_path / "whole")), {1: (7,)}, tmp_path / "share")


def test_the_manifest_names_every_other_file(tmp_path: Path) -> None:
    save("mixtral", torch.bfloat16, tmp_path / "whole", fused=False)
    (tmp_path / "whole" / "generation_config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "whole" / "tokenizer.model").write_bytes(b"\x00\x01")
    (tmp_path / "whole" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "whole" / "pytorch_model.bin").write_bytes(b"not read")
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        write_partial_checkpoint(find(str(tmp_path / "whole")), {0: (1,)}, folder)
        (folder / "plan.json").write_text("{}")
        seal(folder)
    manifest = read_json(folders[0] / MANIFEST, MainManifest)
    names = ["chat_template.jinja", "config.json", "generation_config.json", "plan.json", "share.json", "tokenizer.model"]
    assert [f.name for f in manifest.files] == [*names, "weights-0000.safetensors"]
    for file in manifest.files:
        path = folders[0] / file.name
        assert (file.bytes, file.sha256) == (path.stat().st_size, sha256_file(path))
    assert sha256_file(folders[0] / MANIFEST) == sha256_file(folders[1] / MANIFEST)
    assert (folders[0] / "tokenizer.model").read_bytes() == b"\x00\x01"

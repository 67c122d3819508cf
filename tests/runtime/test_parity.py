"""Same tokens: half of the experts remote, through loader, hook, wire format and the function's arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from remoe_cli.model.checkpoint import find
from remoe_cli.model.experts import expert_layers
from remoe_cli.model.loader import load
from remoe_cli.model.products import prepare_products
from tests.support.families import FAMILIES, save
from tests.support.harness import InProcessExperts, clear_steps, greedy, logits, serve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Seen worst over all families: 4.8e-6 in float32, one bfloat16 step where a sum straddles a rounding boundary.
LOGIT_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.13}


def _stay(model: torch.nn.Module) -> dict[int, tuple[int, ...]]:
    """Another half in every layer."""
    return {x.layer: tuple(range(x.layer % 2, x.experts, 2)) for x in expert_layers(model)}  # type: ignore[arg-type]


# That both layouts are read to the bit in bfloat16 too is test_loader.py's business.
@pytest.mark.sweep
@pytest.mark.parametrize(("dtype", "fused"), [("float32", False), ("float32", True), ("bfloat16", False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_remote_gives_the_reference_tokens(family: str, dtype: str, fused: bool, tmp_path: Path) -> None:
    save(family, DTYPES[dtype], tmp_path, fused=fused)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    local = _stay(reference)
    split = load(find(str(tmp_path)), local)
    prepare_products(split, [layer.module for layer in expert_layers(split)])
    remote = InProcessExperts(reference)
    attachment = serve(split, local, remote.send)

    ours, theirs = logits(split), logits(reference)
    attachment.check_fired(1)
    assert remote.rows > 0
    assert (ours - theirs).abs().max() <= LOGIT_TOLERANCE[dtype]
    if dtype == "float32":
        assert torch.equal(greedy(split), greedy(reference))
    else:
        clear = clear_steps(theirs)
        assert clear.float().mean() > 0.5
        assert torch.equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_zeroed_remote_outputs_are_noticed(family: str, tmp_path: Path) -> None:
    """Negative control: the comparison above would fail if remote experts did not matter."""
    save(family, torch.float32, tmp_path, fused=False)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    local = _stay(reference)
    split = load(find(str(tmp_path)), local)
    serve(split, local, lambda layer, rows: lambda: {e: torch.zeros_like(x) for e, x in rows.items()})
    assert (logits(split) - logits(reference)).abs().max() > 100 * LOGIT_TOLERANCE["float32"]
    assert not torch.equal(greedy(split), greedy(reference))

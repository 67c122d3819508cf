"""A small deployment that no planner made: a mixtral checkpoint with a tokenizer, a profile of it, and a plan, taken for verified."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from remoe_cli.artifacts import write_json
from remoe_cli.deploy.local import lifecycle, target
from remoe_cli.model.checkpoint import find
from remoe_cli.model.spec import read_spec
from remoe_cli.plan.catalog.catalog import Catalog, read_catalog
from remoe_cli.plan.document import LayerPlan, Plan, Source
from remoe_cli.profile.record import ModelRef, Profile, write_profile
from tests.support.families import VOCAB_SIZE, save
from tests.support.synthetic import plan_by_hand, synthetic_profile

PROMPT = " ".join(f"w{i}" for i in range(1, 21))
PROMPT_IDS = tuple(range(1, 21))


@dataclass(frozen=True)
class ByHand:
    """`plan_path` is `plan` as a file, `model` the whole model."""

    plan_path: Path
    plan: Plan
    profile: Profile
    catalog: Catalog
    model: PreTrainedModel

    def tokens(self, new_tokens: int = 16) -> list[int]:
        """What transformers answers to the prompt."""
        ids = torch.tensor([PROMPT_IDS])
        with torch.inference_mode():
            whole: Any = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        return list(whole[0, len(PROMPT_IDS) :].tolist())


def by_hand(folder: Path, layers: tuple[LayerPlan, ...], files: Mapping[str, str] = MappingProxyType({})) -> ByHand:
    """All of it under `folder`. Tokens are w0, w1 ... The model also has `files`, by name. Other layers than `layers` are local."""
    model = save("mixtral", torch.float32, folder / "model", fused=False)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "model")
    for name, text in files.items():
        (folder / "model" / name).write_text(text)
    found = find(str(folder / "model"))
    synthetic = synthetic_profile(folder / "synthetic", experts=8)
    spec = read_spec(found)
    update = {"model": ModelRef(path=found.name, revision=found.revision), "spec": spec}
    profile = write_profile(folder / "profile", synthetic.record.model_copy(update=update), synthetic.arrays)
    catalog = read_catalog("local")
    given = {layer.layer: layer for layer in layers}
    every = tuple(given.get(n, LayerPlan(layer=n, remote=(), memory_mb=0, replicas=0)) for n in spec.moe_layers)
    plan = plan_by_hand(
        every, profile=Source(path=str(profile.path), sha256=profile.sha256), catalog=catalog.file, main=catalog.main.menu[0]
    )
    write_json(folder / "plan.json", plan)
    return ByHand(folder / "plan.json", plan, profile, catalog, model)


@contextmanager
def on_twin(made: ByHand, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[ByHand]:
    """Let the twin take it as it is, for verified; no deployment outlives this."""
    patch.setenv("REMOE_STATE_DIR", str(folder / "state"))
    patch.setattr(target, "read_inputs", lambda path: (made.plan, made.profile, made.catalog))
    try:
        yield made
    finally:
        for name in lifecycle.names():
            lifecycle.destroy(name)

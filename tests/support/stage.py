"""Profiles and deployments of the demo model, through the command line, and what comparing it with transformers takes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from remoe_cli.demo_data import PROMPTS
from remoe_cli.model.demo import demo_model
from tests.support.forked import document as remoe

EVERY_16TH = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()[::16]]
# What comparing with transformers may take where it cannot ask all prompts sooner. The figures of docs/ took more.
BUDGET_S = float(os.environ.get("REMOE_TEST_S") or 10)


class Stage:
    """Profiles and deployments of the demo model for the tests of a module, each made when it is first asked for.

    A deployment is named after its number type, and stands until another share of remote experts is asked for under its name.
    `as_deployed` keeps the status that each began with; `state` is where deployments are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.as_deployed: dict[tuple[str, float], dict[str, Any]] = {}
        self._standing: dict[str, float] = {}

    def profile(self, dtype: str) -> Path:
        """float32 is measured, as by default. bfloat16 is described and little: without a CPU that has it, each prompt takes seconds."""
        path = self.folder / f"profile-{dtype}"
        if not path.exists():
            prompts, tokens, *latency = ("24", "12") if dtype == "float32" else ("4", "2", "--latency-from", "paper")
            options = ["--data", str(PROMPTS), "--limit", prompts, "--max-new-tokens", tokens, *latency, "-o", str(path)]
            document = remoe("profile", str(demo_model(dtype)), *options)
            assert (document["layers"], document["experts_per_layer"], document["top_k"]) == (30, 8, 2)
            assert (document["prompts"], document["latency"]) == (int(prompts), "described" if latency else "measured")
        return path

    def deployed(self, dtype: str, share: float) -> dict[str, Any]:
        """The status of a deployment with a forced share of remote experts."""
        if self._standing.get(dtype) != share:
            self.destroy(dtype)
            plan = self.folder / f"plan-{dtype}.json"
            remoe("plan", str(self.profile(dtype)), "-o", str(plan), "--remote-share", str(share), "--yes")
            self.as_deployed[dtype, share] = remoe("deploy", str(plan), "--name", dtype)
            self._standing[dtype] = share
        return remoe("status", dtype)

    def destroy(self, dtype: str) -> None:
        if self._standing.pop(dtype, None) is not None:
            remoe("destroy", dtype)


@contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    """A stage whose deployments are kept below `folder`, and of which nothing is left at the end."""
    stage = Stage(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMOE_STATE_DIR", str(stage.state))
        yield stage
        for name in [d.name for d in (stage.state / "deployments").glob("*")]:
            remoe("destroy", name)


def reference(dtype: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(demo_model(dtype), experts_implementation="eager")
    return model.eval()


def reference_answer(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """The greedy answer of plain transformers, and the logits [answer, V] that it was chosen from."""
    ids = torch.tensor([prompt])
    options = {
        "max_new_tokens": tokens,
        "do_sample": False,
        "disable_compile": True,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with torch.inference_mode():
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits).float()


def in_time(items: Sequence[Any], least: int) -> Iterator[Any]:
    """As many of the items as can be started in BUDGET_S, `least` of them in any case."""
    give_up = time.monotonic() + BUDGET_S
    for done, item in enumerate(items):
        if done >= least and time.monotonic() > give_up:
            return
        yield item

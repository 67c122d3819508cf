"""The demo model in bfloat16, against transformers in bfloat16: the same wherever the reference itself is clear."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from remoe_cli import artifacts
from remoe_cli.model.demo import demo_model
from remoe_cli.runtime.invoke import make_client
from remoe_cli.runtime.load_main import load_here
from tests.support.harness import clear_steps
from tests.support.stage import BUDGET_S, EVERY_16TH, Stage, in_time, reference, reference_answer, staged


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("stage")) as made:
        yield made


def test_demo_model_is_the_studied_one() -> None:
    assert artifacts.sha256_file(demo_model("bfloat16") / "model.safetensors").startswith("95d759d336df9aaa")


def _fed(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Logits [answer, V] of a model that is fed the prompt and then, one by one, somebody else's answer."""
    cache, logits = None, []
    with torch.inference_mode():
        for ids in (prompt, *([token] for token in answer[:-1])):
            output = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            logits.append(output.logits[0, -1].float())
    return torch.stack(logits)


@pytest.mark.nightly
@pytest.mark.timeout(600 + BUDGET_S)
def test_bfloat16_agrees_wherever_the_reference_is_clear(stage: Stage, measured: Callable[[str], None]) -> None:
    """Fed the reference's own tokens, one by one; a clear step is one whose two best logits differ by more than two bfloat16 steps."""
    model = reference("bfloat16")
    clear_count = steps = agreed = same_greedy = asked = 0
    losses = {"reference": 0.0, "remote": 0.0}
    endpoint = stage.deployed("bfloat16", 0.5)["endpoint"]
    engine = load_here(stage.state / "deployments" / "bfloat16" / "server.json", partial(make_client, endpoint)).engine
    for text in in_time(EVERY_16TH, least=3):
        prompt = engine.prompt_ids(text)
        answer, theirs = reference_answer(model, prompt, 40)
        ours = _fed(engine.model, prompt, answer)
        target = torch.tensor(answer)
        for name, output in (("reference", theirs), ("remote", ours)):
            losses[name] += float(torch.nn.functional.cross_entropy(output, target, reduction="sum"))
        clear = clear_steps(theirs)
        agree = ours.argmax(-1) == theirs.argmax(-1)
        # Fed the same tokens, a model that agrees at every step would have generated them.
        same_greedy, asked = same_greedy + bool(agree.all()), asked + 1
        clear_count, steps, agreed = clear_count + int(clear.sum()), steps + len(clear), agreed + int((agree & clear).sum())
    change = math.exp((losses["remote"] - losses["reference"]) / steps) - 1
    measured(f"bfloat16: argmax agrees at {agreed} of {clear_count} clear steps (of {steps}), perplexity {change:+.4%}")
    measured(f"bfloat16: {same_greedy} of {asked} prompts x 40 tokens have wholly equal greedy tokens")
    assert agreed == clear_count > steps / 2
    # Over the 700 steps of 20 prompts rounding averages out; over a few hundred, one token counts for several thousandths.
    assert abs(change) < (0.002 if asked == len(EVERY_16TH) else 0.01)

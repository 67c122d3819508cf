"""Same tokens through real twin workers: shards, zip, awslambdaric, Invoke API, boto3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from remoe_cli.cages import Mechanism
from remoe_cli.function.codec import from_wire, unpack
from remoe_cli.model.checkpoint import find
from remoe_cli.model.experts import ExpertLayer, attach, expert_layers, run_experts
from remoe_cli.runtime import calls, dispatch
from remoe_cli.runtime.dispatch import Dispatcher
from remoe_cli.runtime.invoke import Attempt, attempt
from tests.support.families import save
from tests.support.harness import PROMPT, clear_steps, greedy, logits
from tests.support.split import split_model

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h"]
ODD = ((1, 3, 5, 7),)
DIVIDED = ((1, 7), (3,), (5,))


@contextmanager
def _deployed(
    family: str, dtype: torch.dtype, folder: Path, probed: Mechanism, parts: tuple[tuple[int, ...], ...] = ODD
) -> Iterator[tuple[PreTrainedModel, PreTrainedModel, Dispatcher]]:
    """The reference, the same model with the odd experts of every layer in twin workers, a function for each of `parts`, and its
    dispatcher."""
    save(family, dtype, folder / "model", fused=False)
    checkpoint = find(str(folder / "model"))
    reference = AutoModelForCausalLM.from_pretrained(checkpoint.path, experts_implementation="eager")
    local = {x.layer: tuple(range(0, x.experts, 2)) for x in expert_layers(reference)}
    with split_model(checkpoint, local, dict.fromkeys(local, parts), folder / "split", probed) as (split, dispatcher):
        yield reference, split, dispatcher


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_tokens_are_equal(family: str, tmp_path: Path, probed: Mechanism) -> None:
    with _deployed(family, torch.float32, tmp_path, probed) as (reference, split, dispatcher):
        assert (logits(split) - logits(reference)).abs().max() < 1e-4
        sent = dispatcher.take()
        assert {i.function for i in sent} == {function.name for some in dispatcher.remote.values() for function in some}
        assert torch.equal(greedy(split), greedy(reference))


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_within_a_rounding_step(family: str, tmp_path: Path, probed: Mechanism) -> None:
    with _deployed(family, torch.bfloat16, tmp_path, probed) as (reference, split, _):
        ours, theirs = logits(split), logits(reference)
        clear = clear_steps(theirs)
        assert clear.float().mean() > 0.5
        assert torch.equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])


def test_zeroed_answers_are_noticed(tmp_path: Path, probed: Mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the tests above fail when what the workers answer does not count."""
    with _deployed("mixtral", torch.float32, tmp_path, probed) as (reference, split, _):
        monkeypatch.setattr(dispatch, "from_storage", lambda array, dtype: torch.zeros(array.shape, dtype=dtype))
        assert (logits(split) - logits(reference)).abs().max() > 0.01
        assert not torch.equal(greedy(split), greedy(reference))


def test_one_invocation_a_layer_and_token(tmp_path: Path, probed: Mechanism) -> None:
    with _deployed("mixtral", torch.float32, tmp_path, probed) as (_, split, dispatcher):
        with torch.inference_mode():
            split(input_ids=torch.tensor([[5]]))
        assert len(dispatcher.take()) <= len(dispatcher.remote)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_divided_over_three_functions_answers_as_one_function_does(dtype: torch.dtype, tmp_path: Path, probed: Mechanism) -> None:
    answers = []
    for parts in (ODD, DIVIDED):
        with _deployed("mixtral", dtype, tmp_path / str(len(parts)), probed, parts) as (_, split, dispatcher):
            answers.append((logits(split), greedy(split)))
            assert {i.function for i in dispatcher.take()} == {f.name for some in dispatcher.remote.values() for f in some}
    (whole_logits, whole_tokens), (divided_logits, divided_tokens) = answers
    assert torch.equal(whole_logits, divided_logits)
    assert torch.equal(whole_tokens, divided_tokens)


def test_each_function_gets_its_own_experts_in_one_invocation_a_pass(
    tmp_path: Path, probed: Mechanism, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, tuple[int, ...]]] = []
    used: dict[int, set[int]] = {}

    def noted(client: Any, function: str, body: bytes) -> Attempt:
        called.append((function, unpack(from_wire(body)).experts))
        return attempt(client, function, body)

    def note(layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        used[layer.layer] = set(index.flatten().tolist())
        return run_experts(layer, hidden, index, weights, {e: e for e in range(layer.experts)}, lambda _, rows: lambda: rows)

    monkeypatch.setattr(calls, "attempt", noted)
    with _deployed("mixtral", torch.float32, tmp_path, probed, DIVIDED) as (reference, split, dispatcher):
        attach(reference, note)
        for ids in (PROMPT, PROMPT[:1, :1], PROMPT[:1, 1:2]):
            called.clear()
            with torch.inference_mode():
                split(input_ids=ids)
                reference(input_ids=ids)
            expected = [
                (f.name, hit) for n, some in dispatcher.remote.items() for f in some if (hit := tuple(sorted(used[n] & set(f.experts))))
            ]
            assert sorted(called) == sorted(expected)
        assert len(expected) < len(DIVIDED) * len(dispatcher.remote)  # a token leaves functions out

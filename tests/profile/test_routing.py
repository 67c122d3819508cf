"""What is counted when prompts run in batches: every real token once, and nothing else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import PreTrainedModel

from remoe_cli.model.experts import attach, expert_layers
from remoe_cli.profile.routing import BatchRouting, RoutingRecorder, record_batch
from tests.support.families import EXPERTS, TOP_K, build

FAMILIES = ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe"]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [90, 3, 41], [22]]
NEW = 12


def record(model: PreTrainedModel, prompts: list[list[int]], new: int = NEW, trace: int = 1000) -> BatchRouting:
    recorder = RoutingRecorder()
    attachment = attach(model, recorder)
    routing = record_batch(model, recorder, prompts, EXPERTS, new, trace)
    attachment.check_fired(max(attachment.calls.values()))
    return routing


def generated(model: PreTrainedModel, prompt: list[int], new: int = NEW) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0)
    return [int(token) for token in output[0, len(prompt) :]]


def by_forward_hooks(model: PreTrainedModel, ids: list[int]) -> npt.NDArray[np.int64]:
    """Counts [L, E] of one uncached pass, seen by PyTorch's own hooks on stock eager experts."""
    seen: list[torch.Tensor] = []
    layers = expert_layers(model)
    handles = [x.module.register_forward_pre_hook(lambda _module, args: seen.append(args[1])) for x in layers]
    model.set_experts_implementation("eager")
    with torch.inference_mode():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return np.stack([torch.bincount(x.flatten(), minlength=EXPERTS).numpy() for x in seen])


def assert_same(batch: BatchRouting, singles: list[BatchRouting]) -> None:
    assert np.array_equal(batch.prefill_counts, np.concatenate([s.prefill_counts for s in singles]))
    assert np.array_equal(batch.decode_counts, np.concatenate([s.decode_counts for s in singles]))
    assert batch.prompt_tokens.tolist() == [int(s.prompt_tokens[0]) for s in singles]
    assert batch.decode_tokens.tolist() == [int(s.decode_tokens[0]) for s in singles]
    for b, single in enumerate(singles):
        # The order of a token's experts means nothing, and deepseek's router does not sort them.
        assert np.array_equal(np.sort(batch.trace_ids[batch.trace_prompt == b]), np.sort(single.trace_ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_counts_as_its_prompts_alone(family: str) -> None:
    model = build(family)
    batch = record(model, PROMPTS)
    assert_same(batch, [record(model, [p]) for p in PROMPTS])
    assert batch.prompt_tokens.tolist() == [11, 3, 1]
    assert batch.decode_tokens.tolist() == [NEW - 1] * 3
    for b, prompt in enumerate(PROMPTS):
        assert np.array_equal(batch.prefill_counts[b], by_forward_hooks(model, prompt))
        fed = generated(model, prompt)[:-1]
        assert np.array_equal(batch.prefill_counts[b] + batch.decode_counts[b], by_forward_hooks(model, prompt + fed))
    assert (batch.prefill_counts.sum(axis=2) == batch.prompt_tokens[:, None] * TOP_K).all()
    assert (batch.decode_counts.sum(axis=2) == batch.decode_tokens[:, None] * TOP_K).all()
    assert batch.decode_counts.std(axis=0).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trace_adds_up_to_the_decode_counts(family: str) -> None:
    batch = record(build(family), PROMPTS)
    layers = batch.decode_counts.shape[1]
    assert batch.trace_ids.shape == (3 * (NEW - 1), layers, TOP_K)
    for b in range(3):
        mine = batch.trace_ids[batch.trace_prompt == b]
        counts = np.stack([np.bincount(mine[:, x].ravel(), minlength=EXPERTS) for x in range(layers)])
        assert np.array_equal(counts, batch.decode_counts[b])


@pytest.mark.sweep
@pytest.mark.parametrize("eos_as_list", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_that_ended_is_not_counted_on(family: str, eos_as_list: bool) -> None:
    model = build(family)
    answers = [generated(model, p) for p in PROMPTS]
    # A token with which one answer ends early while another goes on.
    eos = next(t for t in answers[0][2:8] if t not in answers[0][:2] and not all(t in a[:9] for a in answers))
    lengths = [a.index(eos) + 1 if eos in a else NEW for a in answers]
    assert min(lengths) < max(lengths)
    model.generation_config.eos_token_id = [eos, 127] if eos_as_list and not any(127 in a for a in answers) else eos
    batch = record(model, PROMPTS)
    assert batch.decode_tokens.tolist() == [n - 1 for n in lengths]
    assert (batch.decode_counts.sum(axis=2) == batch.decode_tokens[:, None] * TOP_K).all()
    assert np.bincount(batch.trace_prompt, minlength=3).tolist() == [n - 1 for n in lengths]
    assert_same(batch, [record(model, [p]) for p in PROMPTS])


def test_one_new_token_takes_no_decode_step() -> None:
    batch = record(build("mixtral"), PROMPTS, new=1)
    assert batch.decode_tokens.tolist() == [0, 0, 0]
    assert batch.decode_counts.shape == batch.prefill_counts.shape
    assert not batch.decode_counts.any()
    assert batch.trace_ids.shape == (0, 2, TOP_K)
    assert batch.trace_prompt.shape == (0,)
    assert (batch.prefill_counts.sum(axis=2) == batch.prompt_tokens[:, None] * TOP_K).all()


def test_the_trace_is_cut_at_its_limit_and_the_counts_are_not() -> None:
    model = build("mixtral")
    whole, cut = record(model, PROMPTS), record(model, PROMPTS, trace=4)
    assert np.array_equal(whole.decode_counts, cut.decode_counts)
    assert np.bincount(cut.trace_prompt).tolist() == [4, 4, 4]
    for b in range(3):
        assert np.array_equal(cut.trace_ids[cut.trace_prompt == b], whole.trace_ids[whole.trace_prompt == b][:4])


def test_skipped_slots_are_not_counted_and_traced_as_minus_one() -> None:
    """Ids of E and above, as zaya's skip class gives them: the second slot of every token is turned into one."""
    model = build("mixtral")
    recorder = RoutingRecorder()

    def skip(layer, hidden, index, weights):  # type: ignore[no-untyped-def]
        recorder(layer, hidden, index, weights)
        recorder.seen[layer.layer][-1] = torch.where(torch.arange(TOP_K) == 1, EXPERTS, index)
        return hidden

    attach(model, skip)
    batch = record_batch(model, recorder, PROMPTS, EXPERTS, 4, 1000)
    assert (batch.prefill_counts.sum(axis=2) == batch.prompt_tokens[:, None]).all()
    assert (batch.decode_counts.sum(axis=2) == batch.decode_tokens[:, None]).all()
    assert (batch.trace_ids[..., 1] == -1).all()
    assert (batch.trace_ids[..., 0] >= 0).all()


def test_recording_does_not_change_the_answer() -> None:
    model = build("gpt_oss")
    expected = [generated(model, p) for p in PROMPTS]
    attach(model, RoutingRecorder())
    assert [generated(model, p) for p in PROMPTS] == expected

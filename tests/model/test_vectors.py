"""Prompts as vectors and bags: the paper's similarity, and the embedding table of any checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from remoe_cli.errors import ModelError, UsageError
from remoe_cli.model.checkpoint import Checkpoint, find
from remoe_cli.model.tokens import load_tokenizer
from remoe_cli.model.vectors import Bags, EmbeddingTable, bags, embedding_table, prompt_features
from tests.profile.test_run import WORDS, save_checkpoint
from tests.support.families import HIDDEN_SIZE, VOCAB_SIZE, save


def bag_of(*prompts: list[int]) -> Bags:
    parts = [np.unique(p, return_counts=True) for p in prompts]
    return Bags(
        np.array([len(t) for t, _ in parts], dtype=np.int32),
        np.concatenate([t for t, _ in parts]).astype(np.int32),
        np.concatenate([c for _, c in parts]).astype(np.int32),
    )


def table_of(weight: torch.Tensor) -> EmbeddingTable:
    return EmbeddingTable(Checkpoint("none", Path(), "local:0"), weight)


def test_the_cosine_of_two_prompt_vectors_is_the_papers_soft_cosine_similarity() -> None:
    embeddings = torch.randn((50, 16), generator=torch.Generator().manual_seed(3)) * torch.linspace(0.1, 9, 50)[:, None]
    one, other = [4, 4, 17, 49, 0], [17, 2, 31]

    # method.md, section 5, as written: C = [A;B][A;B]^T and the marks of the rows' owners.
    rows = torch.nn.functional.normalize(embeddings[one + other].double(), dim=1)
    c = rows @ rows.T
    v1, v2 = (torch.tensor([float(owner == i) for owner in [0] * len(one) + [1] * len(other)]).double() for i in range(2))
    long_way = (v1 @ c @ v2) / ((v1 @ c @ v1).sqrt() * (v2 @ c @ v2).sqrt())

    bag = bag_of(one, other)
    a, b = table_of(embeddings).sums(bag, bag.counts).astype(np.float64)
    assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) == pytest.approx(long_way.item(), abs=1e-6)


def test_every_token_weighs_alike_whatever_its_norm() -> None:
    table = table_of(torch.diag(torch.tensor([1.0, 100.0, 0.01])).to(torch.bfloat16))
    bag = bag_of([0, 1, 1, 2])
    assert np.allclose(table.sums(bag, bag.counts), [[1, 2, 1]])
    assert np.allclose(table.sums(bag, np.array([0.5, 0, 3])), [[0.5, 0, 3]])


def test_taking_prompts_takes_their_bags() -> None:
    bag = bag_of([5, 5, 7], [1], [9, 8, 8, 8])
    taken = bag.take(np.array([2, 0]))
    assert (taken.sizes.tolist(), taken.tokens.tolist(), taken.counts.tolist()) == ([2, 2], [8, 9, 5, 7], [3, 1, 2, 1])
    assert taken.prompt.tolist() == [0, 0, 1, 1]
    assert bag.take(np.array([], dtype=np.int64)).tokens.tolist() == []


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe", "nemotron_h"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_table_is_the_models_own_embeddings(family: str, fused: bool, tmp_path: Path) -> None:
    model = save(family, torch.float32, tmp_path, fused)
    table = embedding_table(find(str(tmp_path)))
    expected = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=1)
    assert table.width == HIDDEN_SIZE
    assert np.allclose(table.rows(np.arange(VOCAB_SIZE)), expected.numpy(), atol=1e-6)


def test_a_checkpoint_without_a_table_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save("mixtral", torch.float32, tmp_path, fused=True)
    tensors = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if "embed_tokens" not in n}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="has 0 tensors that could be its embedding table") as refused:
        embedding_table(find(str(tmp_path)))
    assert "--vectors-from" in refused.value.hint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return find(str(save_checkpoint(tmp_path_factory.mktemp("model"))))


def test_a_bag_holds_distinct_tokens_and_no_order(checkpoint: Checkpoint) -> None:
    tokenizer = load_tokenizer(checkpoint)
    one = bags(tokenizer, [f"{WORDS[3]} {WORDS[1]} {WORDS[3]}", WORDS[2]], None)
    assert (one.sizes.tolist(), one.tokens.tolist(), one.counts.tolist()) == ([2, 1], [9, 11, 10], [1, 2, 1])
    other = bags(tokenizer, [f"{WORDS[1]} {WORDS[3]} {WORDS[3]}"], None)
    assert other.tokens.tolist() == one.tokens.tolist()[:2]
    assert bags(tokenizer, [f"{WORDS[3]} {WORDS[1]} {WORDS[3]}"], 1).tokens.tolist() == [11]
    with pytest.raises(UsageError, match=r"makes no tokens of the prompt '\\u3000'"):
        bags(tokenizer, ["w1", "\u3000"], None)
    with pytest.raises(UsageError, match=r"^The prompt is empty\.$") as raised:
        bags(tokenizer, [""], None)
    assert raised.value.hint == "Give --prompt some text."


def test_features_of_a_prompt_depend_on_that_prompt_alone(checkpoint: Checkpoint) -> None:
    texts = [f"{WORDS[i]} {WORDS[2 * i + 1]} {WORDS[i]}" for i in range(6)]
    whole = prompt_features(checkpoint, texts, None)
    parts = [prompt_features(checkpoint, texts[:2], None), prompt_features(checkpoint, texts[2:], None)]
    assert whole["prompt_vectors"].shape == (6, HIDDEN_SIZE)
    for name, array in whole.items():
        assert np.array_equal(array, np.concatenate([part[name] for part in parts])), name

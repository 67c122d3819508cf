"""Imported routing: each format gives the routing that it holds, a profile that can be planned, and mismatches are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remoe_cli.errors import ArtifactError, RemoeError, UsageError
from remoe_cli.model.checkpoint import find
from remoe_cli.model.spec import read_spec
from remoe_cli.plan.problem.workload import from_profile
from remoe_cli.plan.verify.check import verify
from remoe_cli.profile.hardware import latency_from
from remoe_cli.profile.imports.draw import draw_trace
from remoe_cli.profile.imports.importer import import_profile, import_routing
from remoe_cli.profile.loss_record import refuse_loss
from remoe_cli.profile.prompts import PromptSet, read_prompts
from remoe_cli.profile.record import read_profile
from tests.support import routing_files as made
from tests.support.families import FAMILIES, save
from tests.support.routing_files import LENGTHS, PROMPT, SPEC
from tests.support.synthetic import plan_of, tiny_catalog

IDS = made.make_ids()
COUNTS = made.count(IDS)
EARLY = made.count(made.phases(IDS)[0], PROMPT)
DECODED = tuple(np.subtract(LENGTHS, PROMPT).tolist())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return made.every_format(tmp_path_factory.mktemp("files"), IDS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.json and nothing else."""
    folder = tmp_path_factory.mktemp("model")
    FAMILIES["deepseek_v2"]().save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return folder


def prompts(tmp_path: Path, rows: int = 3, **fields: list[Any]) -> PromptSet:
    """A JSONL of prompts with a blank one among them, which read_prompts leaves out."""
    lines = [{"prompt": f"text {row}", **{name: values[row] for name, values in fields.items()}} for row in range(rows)]
    return read_prompts(str(made.write_lines(tmp_path / "prompts.jsonl", [lines[0], {"prompt": " "}, *lines[1:]])))


@pytest.mark.parametrize("name", ["phases.npz", "ids.npz", "vllm.jsonl", "vllm_split.jsonl", "sglang.jsonl", "batch.jsonl", "sglang.json"])
def test_formats_that_tell_the_phases_apart(name: str, files: dict[str, Path]) -> None:
    found = import_routing(files[name], SPEC)
    assert (found.arrays["prefill_counts"] == EARLY).all()
    assert (found.arrays["decode_counts"] == COUNTS - EARLY).all()
    assert found.arrays["prompt_tokens"].tolist() == list(PROMPT)
    assert found.arrays["decode_tokens"].tolist() == list(DECODED)
    assert found.routing.phases == ("prefill", "decode")
    if name != "phases.npz":
        assert found.routing.trace == "decode"
        assert (np.sort(found.arrays["trace_ids"], axis=2) == np.sort(made.phases(IDS)[1], axis=2)).all()
        assert found.arrays["trace_prompt"].tolist() == [0] * 2 + [1] * 3 + [2]


@pytest.mark.parametrize("name", ["counts.npz", "counts.npy", "c.safetensors", "stat.pt", "per_pass.pt", "table.csv"])
def test_formats_of_counts_alone(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    found = import_routing(files[name], SPEC)
    assert (found.arrays["prefill_counts"] == COUNTS).all() and not found.arrays["decode_counts"].any()
    assert found.arrays["prompt_tokens"].tolist() == list(LENGTHS)
    assert (found.routing.phases, found.routing.trace, found.routing.layers) == (("prefill",), "drawn", None)
    as_decode = import_routing(files[name], SPEC, prompts=prompts(tmp_path, n_decode_tokens=list(LENGTHS)))
    assert (as_decode.arrays["decode_counts"] == COUNTS).all() and not as_decode.arrays["prefill_counts"].any()


def test_a_lone_array_of_ids_is_one_sequence(files: dict[str, Path]) -> None:
    found = import_routing(files["ids.npy"], SPEC)
    assert (found.arrays["prefill_counts"] == COUNTS.sum(axis=0)[None]).all()
    assert found.routing.trace == "prefill" and len(found.arrays["trace_ids"]) == len(IDS)


def test_recorder_dumps_tell_passes_apart_and_map_physical_experts_back(files: dict[str, Path]) -> None:
    found = import_routing(files["per_token.pt"], SPEC)
    assert (found.arrays["prefill_counts"][0] == COUNTS[0]).all() and not found.arrays["prefill_counts"][1:].any()
    assert (found.arrays["decode_counts"][1:] == COUNTS[1:]).all()
    assert {import_routing(files[name], SPEC).routing.row for name in ("stat.pt", "per_pass.pt", "per_token.pt")} == {"forward pass"}


def test_a_recorder_dump_may_hold_more_than_is_needed(tmp_path: Path) -> None:
    """Other programs add entries of their own; passes without a token come from ranks without requests."""
    mask = torch.ones((3, 3, 8))
    more = {"masks": mask.bool(), "ids": mask.to(torch.uint16), "half": mask.to(torch.bfloat16), "model": torch.nn.Parameter(mask)}
    more |= {"device": torch.device("cuda:1"), "size": mask.size(), "type": torch.float8_e4m3fn, "flags": {"a"}, "raw": b"x"}
    stat = import_routing(made.save_torch(tmp_path / "x.pt", made.sglang_stat(COUNTS) | more), SPEC)
    assert (stat.arrays["prefill_counts"] == COUNTS).all()
    dump = made.sglang_per_token(IDS)
    idle = dump["records"][0] | {"forward_mode": 4, "topk_ids_of_layer": torch.empty((3, 0, 8), dtype=torch.int32)}
    found = import_routing(made.save_torch(tmp_path / "x.pt", dump | {"records": [dump["records"][0], idle, *dump["records"][1:]]}), SPEC)
    same = import_routing(made.save_torch(tmp_path / "y.pt", dump), SPEC)
    assert all((found.arrays[name] == same.arrays[name]).all() for name in same.arrays)


def test_some_layers_only(files: dict[str, Path], tmp_path: Path) -> None:
    found = import_routing(files["small.npz"], SPEC)
    assert found.routing.layers == (2,)
    assert not found.arrays["prefill_counts"][:, 0].any() and (found.arrays["prefill_counts"][:, 1] == COUNTS[:, 1]).all()
    assert (found.arrays["trace_ids"][:, 0] == -1).all() and (found.arrays["trace_ids"][:, 1] >= 0).all()
    by_place = tmp_path / "places.npz"
    np.savez(by_place, counts=COUNTS[:, ::-1], layers=np.array([1, 0]))  # 0 is dense, so these are places among the MoE layers
    assert (import_routing(by_place, SPEC).arrays["prefill_counts"] == COUNTS).all()


def test_layers_that_may_be_read_in_two_ways_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", counts=COUNTS[:, :1], layers=np.array([1]))
    with pytest.raises(UsageError, match=r"layers \[1\] may be indices of hidden layers or of MoE layers"):
        import_routing(tmp_path / "x.npz", SPEC)


def test_all_hidden_layers_of_which_one_is_dense(tmp_path: Path) -> None:
    whole = np.concatenate([np.zeros_like(COUNTS[:, :1]), COUNTS], axis=1)
    np.savez(tmp_path / "x.npz", counts=whole)
    assert (import_routing(tmp_path / "x.npz", SPEC).arrays["prefill_counts"] == COUNTS).all()
    np.savez(tmp_path / "x.npz", counts=np.roll(whole, 1, axis=1))
    with pytest.raises(UsageError, match="layer 0 has routing, and the model has no experts there"):
        import_routing(tmp_path / "x.npz", SPEC)


def test_tokens_that_a_prefix_cache_answered_count_for_lengths_alone(tmp_path: Path) -> None:
    ids = IDS.copy()
    ids[:2] = -1
    found = import_routing(made.write_lines(tmp_path / "x.jsonl", made.vllm_split_lines(ids)), SPEC)
    assert found.arrays["prompt_tokens"].tolist() == list(PROMPT)
    assert found.arrays["prefill_counts"][0].sum(axis=1).tolist() == [2, 2]


def test_the_trace_is_capped_and_spread_over_rows(tmp_path: Path) -> None:
    lengths = (60_000, 10, 6_000)
    ids = made.make_ids(lengths)
    np.savez(tmp_path / "x.npz", ids=ids, seq_offsets=made.offsets(lengths))
    found = import_routing(tmp_path / "x.npz", SPEC)
    assert np.bincount(found.arrays["trace_prompt"]).tolist() == [32_768 // 3, 10, 6_000]
    first = found.arrays["trace_ids"][: 32_768 // 3]
    assert (first == ids[np.ceil(np.arange(32_768 // 3) * 60_000 / (32_768 // 3)).astype(int)]).all()


def test_prompts_give_texts_lengths_and_the_phase(files: dict[str, Path], tmp_path: Path) -> None:
    texts = prompts(tmp_path, n_prompt_tokens=[7, 8, 9], n_decode_tokens=list(LENGTHS))
    found = import_routing(files["counts.npz"], SPEC, prompts=texts)
    assert found.routing.phases == ("decode",)
    assert found.arrays["prompt_tokens"].tolist() == [7, 8, 9]
    assert (found.arrays["decode_counts"] == COUNTS).all()
    traced = import_routing(files["ids.npy"], SPEC, prompts=prompts(tmp_path, 1, n_decode_tokens=[sum(LENGTHS)]))
    assert (traced.routing.phases, traced.routing.trace) == (("decode",), "decode")
    with pytest.raises(UsageError, match=r"row 1: it has prefill routing of 9 tokens, and its prompt states 8"):
        import_routing(files["counts.npz"], SPEC, prompts=prompts(tmp_path, n_prompt_tokens=[5, 8, 9]))
    with pytest.raises(UsageError, match="prompt 2: its n_prompt_tokens is no whole number"):
        import_routing(files["counts.npz"], SPEC, prompts=prompts(tmp_path, n_prompt_tokens=[5, 9, "4"]))
    with pytest.raises(UsageError, match=r"it has 3 rows, and .* has 2 prompts"):
        import_routing(files["counts.npz"], SPEC, prompts=prompts(tmp_path, 2))


def test_prompts_in_an_array_state_their_lengths_too(files: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": "human", "value": "a"}], "n_prompt_tokens": n} for n in (5, 8, 9)]
    made.write_lines(tmp_path / "prompts.json", [rows])
    with pytest.raises(UsageError, match="and its prompt states"):
        import_routing(files["counts.npz"], SPEC, prompts=read_prompts(str(tmp_path / "prompts.json")))


def several_models() -> str:
    """Tables of two models and two modes, as published: a model column, k, and all tokens of the group in `tokens`."""
    parts = []
    for model, counts, k in (("a/Right-1B", COUNTS, "2"), ("Wrong-1B", COUNTS[:, :, ::-1], "2"), ("Small-1B", COUNTS[:, :, :4], "1")):
        parts.append(made.table(counts, extra={"model": model, "mode": "topk", "k": k}))
        parts.append(made.table(counts // 2, extra={"model": model, "mode": "top1", "k": "1"}))
    return parts[0] + "".join(part.split("\n", 1)[1] for part in parts[1:])


def test_a_table_of_several_models(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text(several_models())
    found = import_routing(file, SPEC, model="right-1b")
    assert (found.arrays["prefill_counts"] == COUNTS).all() and found.routing.row == "group of task"
    with pytest.raises(UsageError, match="which is that of 'other' is not clear"):
        import_routing(file, SPEC, model="other")
    file.write_text("".join(line for line in several_models().splitlines(True) if "Wrong" not in line))
    assert (import_routing(file, SPEC, model="other").arrays["prefill_counts"] == COUNTS).all()


def test_a_table_without_groups_and_unused_experts(tmp_path: Path) -> None:
    lines = ["layer,expert,count", *(f"{layer},{e},{n}" for layer in (1, 2) for e, n in ((0, 2), (5, 2)))]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    found = import_routing(tmp_path / "x.csv", SPEC).arrays["prefill_counts"]
    assert found.shape == (1, 2, 8) and found[0, 0].tolist() == [2, 0, 0, 0, 0, 2, 0, 0]


def test_drawn_tokens_have_the_shares_of_the_counts() -> None:
    counts = np.array([[[100, 60, 30, 10, 0]], [[20, 10, 10, 20, 40]]]).repeat(3, axis=1)
    ids, owner = draw_trace(counts, np.array([100, 50]), 2)
    assert np.bincount(owner).tolist() == [100, 50]
    assert (ids[:, :, 0] != ids[:, :, 1]).all()
    assert (ids[owner == 0] == 0).any(axis=2).all(), "an expert that every token uses is in every draw"
    many, row = draw_trace(counts * 1000, np.array([100, 50]) * 1000, 2)
    for layer in range(3):
        share = np.bincount(many[row == 0, layer].ravel(), minlength=5) / (row == 0).sum()
        assert share == pytest.approx([1.0, 0.6, 0.3, 0.1, 0.0], abs=0.03)
    assert (draw_trace(counts, np.array([100, 50]), 2)[0] == ids).all()
    assert (many[:, 0] != many[:, 1]).any()


def test_drawn_tokens_join_any_two_experts() -> None:
    """Without a random order, equal shares would always draw the same pairs."""
    ids, _ = draw_trace(np.full((1, 1, 4), 250), np.array([500]), 2)
    _, times = np.unique(np.sort(ids[:, 0], axis=1), axis=0, return_counts=True)
    assert len(times) == 6 and times.min() > 50


def test_a_profile_of_a_folder_with_config_alone(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    profile = import_profile(str(model), files["ids.npz"], tmp_path / "p", latency=made.latency(tmp_path))
    read = read_profile(tmp_path / "p")
    assert read.record == profile.record and read.record.spec.moe_layers == SPEC.moe_layers
    assert read.record.settings is None and read.record.routing.format == "token ids (.npz)"
    assert read.arrays["prompt_vectors"].shape == (3, 0)
    assert (read.record.dataset.source, read.record.dataset.prompts) == (str(files["ids.npz"]), 3)
    plan = plan_of(read, tiny_catalog(), remote_share=0.5)
    assert verify(plan, read, tiny_catalog()) == ()
    assert "The profile" not in plan.reason.replace("The profile traced", "")


def test_a_profile_of_experts_that_are_quantised_on_request(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """Planned in that form; nobody has measured what it loses, so it is refused unless that is accepted."""
    spec = read_spec(find(str(model)), "int8")
    latency = latency_from("paper", spec)
    record = import_profile(str(model), files["ids.npz"], tmp_path / "p", latency=latency, experts="int8").record
    assert record.spec == spec and spec.remote is not None and spec.remote.form == "int8" and record.loss is None
    assert record.latency.unquantised_expert is not None
    plan = plan_of(read_profile(tmp_path / "p"), tiny_catalog(), remote_share=0.5)
    assert (plan.model.experts, plan.model.packed) == ("int8", True)
    with pytest.raises(UsageError, match="nobody has measured what they lose"):
        refuse_loss("int8", record.loss, accepted=False)


CAVEATS = {
    None: ("no separate routing of generated tokens", "were drawn from the profile's counts", "lengths of answers"),
    "decode": ("no separate routing of prompts", "were drawn from the profile's counts", "lengths of prompts"),
}


@pytest.mark.parametrize("phase", [None, "decode"])
def test_a_plan_from_one_phase_says_so_and_is_verified(phase: Any, model: Path, tmp_path: Path) -> None:
    lengths = (400, 300, 350)
    np.savez(tmp_path / "x.npz", counts=made.count(made.make_ids(lengths), lengths))
    texts = prompts(tmp_path, n_decode_tokens=list(lengths)) if phase == "decode" else None
    profile = import_profile(str(model), tmp_path / "x.npz", tmp_path / "p", latency=made.latency(tmp_path), prompts=texts)
    plan = plan_of(profile, tiny_catalog(), remote_share=0.5)
    assert verify(plan, profile, tiny_catalog()) == ()
    for sentence in CAVEATS[phase]:
        assert any(sentence in note for note in plan.notes), plan.notes
    assert not any("lengths" in sentence for sentence in from_profile(profile, 10, 10).assumptions)


def test_a_profile_of_some_layers_cannot_be_planned(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    profile = import_profile(str(model), files["small.npz"], tmp_path / "p", latency=made.latency(tmp_path))
    assert read_profile(tmp_path / "p").record.routing.layers == (2,)
    with pytest.raises(ArtifactError, match="routing of 1 of the model's 2 MoE layers"):
        plan_of(profile, tiny_catalog())


def test_texts_without_embeddings_and_vectors_without_texts(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    latency = made.latency(tmp_path)
    profile = import_profile(str(model), files["counts.npz"], tmp_path / "p", latency=latency, prompts=prompts(tmp_path))
    assert profile.arrays["prompt_vectors"].shape == (3, 0)
    assert profile.record.dataset.sha256 == prompts(tmp_path).sha256
    with pytest.raises(UsageError, match="need the prompts' texts"):
        import_profile(str(model), files["counts.npz"], tmp_path / "q", latency=latency, vectors_from=str(model))
    assert not (tmp_path / "q").exists()


def test_vectors_from_another_checkpoint(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    other = tmp_path / "other"
    embeddings = save("mixtral", torch.float32, other, fused=True).get_input_embeddings().weight.detach()  # type: ignore[operator]
    words = Tokenizer(models.WordLevel({"text": 3, "0": 5, "1": 6, "2": 7, "?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(other)
    out = tmp_path / "p"
    profile = import_profile(
        str(model), files["counts.npz"], out, latency=made.latency(tmp_path), prompts=prompts(tmp_path), vectors_from=str(other)
    )
    rows = torch.nn.functional.normalize(embeddings[[3, 6]], dim=1).sum(dim=0)
    assert profile.arrays["prompt_vectors"][1] == pytest.approx(rows.numpy(), abs=1e-5)
    assert profile.record.vectors is not None and profile.record.vectors.path == str(other.resolve())
    assert read_profile(out).record.vectors == profile.record.vectors


def test_nothing_is_written_over_foreign_files(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    for out, message in ((tmp_path / "out", "holds files that remoe did not make"), (tmp_path / "out" / "mine.txt", "is a file")):
        with pytest.raises(RemoeError, match=message):
            import_profile(str(model), files["counts.npz"], out, latency=made.latency(tmp_path))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]

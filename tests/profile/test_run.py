"""`profile` from end to end on a tiny checkpoint with a tokenizer of its own: arrays, resuming, and what is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from remoe_cli import artifacts
from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.model.checkpoint import find
from remoe_cli.model.spec import read_spec
from remoe_cli.model.tokens import encode, load_tokenizer
from remoe_cli.profile import function_latency, latency, pass_times
from remoe_cli.profile.hardware import latency_from
from remoe_cli.profile.prompts import PromptSet
from remoe_cli.profile.record import Profile, ProfileRecord, read_profile
from remoe_cli.profile.run import profile
from tests.support import forked
from tests.support.display import Display
from tests.support.families import EXPERTS, HIDDEN_SIZE, TOP_K, VOCAB_SIZE, save

WORDS = [f"w{i}" for i in range(VOCAB_SIZE - 8)]
TEXTS = tuple(" ".join(WORDS[(7 * i + j * j) % len(WORDS)] for j in range(3 + 2 * i)) for i in range(7))
NEW = 6
SETTINGS = {"max_new_tokens": NEW, "max_prompt_tokens": 12, "batch_size": 3}
# A finished profile, and what its progress was
Made = tuple[Profile, list[tuple[int, int]]]


def save_checkpoint(folder: Path, chat: bool = False) -> Path:
    save("qwen3_moe", torch.float32, folder, fused=False)
    vocabulary = {"<pad>": 0, "<s>": 1, "<unk>": 2, "<user>": 3, "<assistant>": 4} | {w: i + 8 for i, w in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>")
    if chat:
        fast.chat_template = "{% for m in messages %}<user> {{ m.content }} {% endfor %}<assistant>"
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@dataclass
class Interrupt:
    """Presses Ctrl-C once `after` prompts are done."""

    after: int

    def __call__(self, done: int, total: int) -> None:
        if done >= self.after:
            raise KeyboardInterrupt


def run(model: Path, out: Path, progress: Callable[[int, int], None] | Display = lambda done, total: None, **changes: Any) -> Profile:
    """Profile with described latencies, which saves the seconds that measuring takes."""
    options: dict[str, Any] = SETTINGS | {"latency": latency_from("paper", read_spec(find(str(model))))} | changes
    prompts = options.pop("prompts", PromptSet("memory", "prompt", TEXTS))
    return profile(str(model), prompts, out, progress=progress if isinstance(progress, Display) else Display(progress), **options)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    seen: list[tuple[int, int]] = []
    return run(model, tmp_path_factory.mktemp("whole") / "profile", lambda done, total: seen.append((done, total))), seen


def same_bytes(folder: Path, expected: Path) -> bool:
    return all((folder / name).read_bytes() == (expected / name).read_bytes() for name in ("arrays.safetensors", "profile.json"))


def test_the_arrays_are_those_of_the_prompts(whole: Made, model: Path) -> None:
    made, progress = whole
    assert sorted(p.name for p in made.path.iterdir()) == ["arrays.safetensors", "profile.json"]
    assert progress == [(0, 7), (3, 7), (6, 7), (7, 7)]
    read = read_profile(made.path)
    assert read.record == made.record
    assert read.record.spec == read_spec(find(str(model)))
    assert (read.record.dataset.prompts, read.record.settings.chat_template, read.record.settings.dtype) == (7, False, "float32")
    arrays = read.arrays
    dtypes = {name: str(a.dtype) for name, a in arrays.items()}
    assert dtypes == dict.fromkeys(dtypes, "int32") | {"prompt_vectors": "float32", "trace_ids": "int16"}
    # 3, 5, .. 15 words, cut at 12 tokens
    assert arrays["prompt_tokens"].tolist() == [3, 5, 7, 9, 11, 12, 12]
    assert arrays["decode_tokens"].tolist() == [NEW - 1] * 7
    for phase, tokens in (("prefill_counts", "prompt_tokens"), ("decode_counts", "decode_tokens")):
        assert arrays[phase].shape == (7, 2, EXPERTS)
        assert (arrays[phase].sum(axis=2) == arrays[tokens][:, None] * TOP_K).all()
    assert arrays["prompt_vectors"].shape == (7, HIDDEN_SIZE)
    assert arrays["trace_prompt"].tolist() == [p for p in range(7) for _ in range(NEW - 1)]
    for p in range(7):
        mine = arrays["trace_ids"][arrays["trace_prompt"] == p]
        counts = np.stack([np.bincount(mine[:, x].ravel(), minlength=EXPERTS) for x in range(2)])
        assert np.array_equal(counts, arrays["decode_counts"][p])


def test_another_batch_size_counts_the_same(whole: Made, model: Path, tmp_path: Path) -> None:
    alone = run(model, tmp_path / "alone", batch_size=1)
    for name in set(alone.arrays) - {"trace_ids"}:
        assert np.array_equal(alone.arrays[name], whole[0].arrays[name]), name
    assert np.array_equal(np.sort(alone.arrays["trace_ids"]), np.sort(whole[0].arrays["trace_ids"]))


def test_prompts_of_similar_length_run_together(model: Path, tmp_path: Path) -> None:
    """Sorted within a window of 16 batches, so that the padding of mixed lengths is not paid for; the next window is on its own."""
    texts = tuple(" ".join(WORDS[: 1 + (5 * i) % 11]) for i in range(34))
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path, Interrupt(34), prompts=PromptSet("memory", "prompt", texts), batch_size=2)
    batches = [artifacts.read_arrays(file) for file in sorted((tmp_path / "partial").glob("batch-*"))]
    lengths = np.concatenate([b["prompt_tokens"] for b in batches])
    assert lengths[:32].tolist() == sorted((len(t.split()) for t in texts[:32]), reverse=True)
    assert sorted(batches[-1]["prompt_index"].tolist()) == [32, 33]


def test_latencies_are_measured_when_first_needed_and_then_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Less of everything: how well it is measured is test_latency.py's business.
    monkeypatch.setattr(pass_times, "_FORWARD_S", 0.02)
    monkeypatch.setattr(latency, "_ROUND_S", 0.002)
    monkeypatch.setattr(function_latency, "_MEMORY_MB", ())
    first, second = Display(Interrupt(3)), Display(lambda done, total: None)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path, first, latency=None)
    kept = json.loads((tmp_path / "partial" / "latency.json").read_text())
    made = run(model, tmp_path, second, latency=None)
    assert made.record.latency.model_dump(mode="json") == kept
    assert (kept["source"], kept["load_s"] > 0, kept["nonexpert_decode_s"] > 0) == ("measured", True, True)
    checks = ("Finding the model", "Checking the model's files", "Checking the prompts")
    load, profiling = f"Loading {model}", "Profiling prompts"
    assert first.titles == [*checks, load, "Measuring how long things take on this machine", profiling]
    assert second.titles == [*checks, load, profiling, "Writing the profile"]


def test_progress_is_reported_within_a_batch(whole: Made, model: Path, tmp_path: Path) -> None:
    """Each call of a layer's experts is a step: 2 MoE layers and NEW passes for each of the batches of 3, 3 and 1 prompts."""
    display = Display(lambda done, total: None)
    run(model, tmp_path, display)
    written = [i for i, done in enumerate(display.reported) if isinstance(done, int)]
    assert [display.reported[i] for i in written] == [0, 3, 6, 7] and written == [0, *(n * (2 * NEW + 1) for n in (1, 2, 3))]
    assert display.reported == sorted(display.reported)
    steps = np.diff(display.reported)[written[1] : written[2]]
    decode, prefill = steps[-1], steps[1]
    assert steps == pytest.approx([0, prefill, prefill, *[decode] * (2 * NEW - 2)]) and prefill > 1.5 * decode
    assert same_bytes(tmp_path, whole[0].path)


def test_an_interrupted_run_goes_on_where_it_was(whole: Made, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile"
    with pytest.raises(KeyboardInterrupt):
        run(model, out, Interrupt(3))
    assert not (out / "profile.json").exists()
    first = out / "partial" / "batch-0000000.safetensors"
    written = first.stat().st_mtime_ns, first.stat().st_ino
    with pytest.raises(KeyboardInterrupt):
        run(model, out, Interrupt(6))
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == written
    seen: list[int] = []
    run(model, out, lambda done, total: seen.append(done))
    assert seen == [6, 7]
    assert same_bytes(out, whole[0].path)
    assert not (out / "partial").exists()


MANY = PromptSet("memory", "prompt", tuple(" ".join(WORDS[(3 * i + j) % len(WORDS)] for j in range(1 + (7 * i) % 12)) for i in range(60)))


def run_aloud(model: Path, out: Path, most: int) -> None:
    """Say how many prompts are done. After `most` of them, wait to be killed, however long a busy machine takes for it."""

    def say(done: int, total: int) -> None:
        print(done, flush=True)
        if most <= done < total:
            time.sleep(60)

    run(model, out, say, prompts=MANY, batch_size=1)


def test_a_process_killed_at_three_random_moments_ends_with_the_same_bytes(model: Path, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    expected = run(model, tmp_path / "whole", prompts=MANY, batch_size=1)
    out, reply = tmp_path / "killed", tmp_path / "reply"
    os.mkfifo(reply)
    points = sorted(generator.sample(range(1, 45), 3))
    for point, how in zip(points, generator.sample([signal.SIGINT, signal.SIGKILL, signal.SIGKILL], 3), strict=True):
        child = forked.start(run_aloud, model, out, point + 10, stdout=reply, stderr=Path(os.devnull))
        with reply.open() as lines:
            for line in lines:
                if int(line) >= point:
                    time.sleep(generator.uniform(0, 0.03))  # somewhere inside the next batch, or while it is written
                    assert child.pid is not None
                    os.kill(child.pid, how)
                    break
            child.join(60)
        assert child.exitcode  # -how, or 1 where the interrupt became an exception
        assert not (out / "profile.json").exists()
    last = forked.complete(run_aloud, model, out, len(MANY.texts))
    assert last.returncode == 0, last.stderr
    assert points[-1] <= int(last.stdout.split()[0]) < 60
    assert same_bytes(out, expected.path)
    assert sorted(p.name for p in out.iterdir()) == ["arrays.safetensors", "profile.json"]


@pytest.mark.parametrize(
    "name",
    ["partial/.inputs.json.remoe-00000001", "partial/inputs.json", ".arrays.safetensors.remoe-00000001", ".profile.json.remoe-00000001"],
)
def test_what_a_kill_leaves_half_written_is_no_obstacle(whole: Made, model: Path, tmp_path: Path, name: str) -> None:
    if not name.startswith("partial/"):
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path, Interrupt(7))
    (tmp_path / "partial").mkdir(exist_ok=True)
    (tmp_path / name).write_text("{")
    run(model, tmp_path)
    assert same_bytes(tmp_path, whole[0].path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["arrays.safetensors", "profile.json"]


def test_a_finished_run_is_not_run_again(whole: Made, model: Path, tmp_path: Path) -> None:
    said, asked = list[str](), list[Path]()
    out = Path(shutil.copytree(whole[0].path, tmp_path / "profile"))
    again = run(model, out, Interrupt(0), say=said.append, may_replace=asked.append)  # no prompt is run
    assert asked == [] and again.record == whole[0].record and "is finished already" in said[0]
    run(model, out, say=said.append, may_replace=asked.append, max_new_tokens=NEW - 1)  # other inputs are another run
    assert (
        asked == [out / "profile.json"]
        and len(said) == 2
        and "which is replaced at the end" in said[1]
        and not same_bytes(out, whole[0].path)
    )


@pytest.fixture
def interrupted(model: Path, whole: Made, tmp_path: Path) -> Path:
    """An output directory as a crash after the first batch leaves it, with latencies that were measured."""
    out = tmp_path / "profile"
    with pytest.raises(KeyboardInterrupt):
        run(model, out, Interrupt(0))
    artifacts.write_json(out / "partial" / "latency.json", whole[0].record.latency)
    with pytest.raises(KeyboardInterrupt):
        run(model, out, Interrupt(3))
    return out


def stopped(seen: list[int]) -> Callable[[int, int], None]:
    def stop(done: int, total: int) -> None:
        seen.append(done)
        raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": NEW - 1},
        {"max_prompt_tokens": 5},
        {"batch_size": 2},
        {"prompts": PromptSet("memory", "prompt", (*TEXTS[:6], "w1 w2"))},
    ],
    ids=lambda changes: str(*changes),
)
def test_changed_inputs_start_anew(interrupted: Path, model: Path, changes: dict[str, Any]) -> None:
    assert (interrupted / "partial" / "batch-0000000.safetensors").is_file()
    seen, asked = list[int](), list[Path]()
    with pytest.raises(KeyboardInterrupt):
        run(model, interrupted, stopped(seen), may_replace=asked.append, **changes)
    assert seen == [0] and asked == [interrupted / "partial"]
    assert [p.name for p in (interrupted / "partial").iterdir()] == ["inputs.json"]


def test_a_changed_model_starts_anew(interrupted: Path, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text()) | {"rms_norm_eps": 1e-5}
    (other / "config.json").write_text(json.dumps(config))
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        run(other, interrupted, stopped(seen))
    assert seen == [0]


def test_batches_without_a_fingerprint_are_not_trusted(interrupted: Path, model: Path, whole: Made) -> None:
    """A crash between removing another run's fingerprint and its batches must not mix two runs."""
    shutil.copy(whole[0].path / "profile.json", interrupted / "profile.json")
    (interrupted / "partial" / "inputs.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        run(model, interrupted, Interrupt(0))
    assert [p.name for p in (interrupted / "partial").iterdir()] == ["inputs.json"]


def test_a_damaged_batch_says_which_file_to_delete(interrupted: Path, model: Path, whole: Made) -> None:
    batch = interrupted / "partial" / "batch-0000000.safetensors"
    batch.write_bytes(batch.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match=r"batch-0000000\.safetensors is damaged") as refused:
        run(model, interrupted)
    assert str(batch) in refused.value.hint
    batch.unlink()
    run(model, interrupted)
    assert (interrupted / "arrays.safetensors").read_bytes() == (whole[0].path / "arrays.safetensors").read_bytes()


def test_a_prompt_without_tokens_is_named(model: Path, whole: Made, tmp_path: Path) -> None:
    """White space is no prompt to prompts.py; what a tokenizer drops beyond that is found here."""
    out = tmp_path / "profile"
    prompts = PromptSet("memory", "prompt", ("w1", "\u3000"))
    with pytest.raises(UsageError, match=r"makes no tokens of the prompt '\\u3000'"):
        run(model, out, prompts=prompts)


def test_prompts_are_wrapped_in_the_models_chat_template(tmp_path: Path) -> None:
    plain, chat = save_checkpoint(tmp_path / "plain"), save_checkpoint(tmp_path / "chat", chat=True)
    assert encode(load_tokenizer(find(str(plain))), "w0 w1") == [8, 9]
    assert encode(load_tokenizer(find(str(chat))), "w0 w1") == [3, 8, 9, 4]


def copy_of(made: Profile, folder: Path) -> Path:
    shutil.copytree(made.path, folder)
    return folder


def test_a_changed_arrays_file_is_noticed(whole: Made, tmp_path: Path) -> None:
    folder = copy_of(whole[0], tmp_path / "copy")
    data = bytearray((folder / "arrays.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "arrays.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"is not the file that profile\.json names"):
        read_profile(folder)
    (folder / "arrays.safetensors").unlink()
    with pytest.raises(ArtifactError, match="There is no file"):
        read_profile(folder)
    (folder / "profile.json").unlink()
    with pytest.raises(UsageError, match="is not a profile"):
        read_profile(folder)


def _add(phase: str, amount: int) -> Callable[[dict[str, Any]], object]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[phase][2, 1, 3] += amount

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_add("prefill_counts", 1), "prefill_counts do not fit prefill tokens and top-2"),
        (_add("decode_counts", 1), "decode_counts do not fit decode tokens"),
        (_add("decode_counts", -99), "decode_counts do not fit decode tokens"),
        (lambda a: a.update(prefill_counts=a["prefill_counts"][:, :, :7]), r"prefill_counts has shape \(7, 2, 7\)"),
        (lambda a: a.update(decode_tokens=a["decode_tokens"][:6]), r"decode_tokens has shape \(6,\), and \(7,\)"),
        (lambda a: a.update(prompt_vectors=a["prompt_vectors"][:6]), "prompt_vectors has shape"),
        (lambda a: a.update(trace_ids=a["trace_ids"][:, :1]), "trace_ids has shape"),
        (lambda a: a.pop("trace_prompt"), "has shape"),
        (lambda a: a.pop("prompt_tokens"), "has shape"),
        (lambda a: a.pop("prompt_vectors"), "has shape"),
    ],
)
def test_arrays_that_do_not_add_up_are_refused(
    whole: Made, change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    """Even with a digest that fits: the numbers themselves are checked."""
    arrays = {name: array.copy() for name, array in whole[0].arrays.items()}
    change(arrays)
    folder = tmp_path / "tampered"
    artifacts.write_arrays(folder / "arrays.safetensors", arrays, "profile")
    digest = artifacts.sha256_file(folder / "arrays.safetensors")
    artifacts.write_json(folder / "profile.json", whole[0].record.model_copy(update={"arrays_sha256": digest}))
    with pytest.raises(ArtifactError, match=message):
        read_profile(tmp_path / "tampered")


def test_a_profile_of_another_schema_or_with_a_broken_field_is_refused(whole: Made, tmp_path: Path) -> None:
    folder = copy_of(whole[0], tmp_path / "copy")
    record = json.loads((folder / "profile.json").read_text())
    artifacts.write_json(folder / "profile.json", record | {"schema_version": "remoe.profile/0"})
    with pytest.raises(ArtifactError, match=r"has the schema 'remoe\.profile/0'"):
        read_profile(folder)
    record["latency"]["local_expert"]["fixed_s"] = "fast"
    artifacts.write_json(folder / "profile.json", record)
    with pytest.raises(ArtifactError, match=r"damaged at 'latency\.local_expert\.fixed_s'"):
        artifacts.read_json(folder / "profile.json", ProfileRecord)

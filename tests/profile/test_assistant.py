"""`profile` with an assistant: what it counts of it is what the main function then does, and what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli.cli.profile_shared import assistant_figures
from remoe_cli.errors import UsageError
from remoe_cli.model.assistant import Assistant, read_assistant_spec
from remoe_cli.model.checkpoint import find
from remoe_cli.model.draft import Speculate
from remoe_cli.model.spec import read_spec
from remoe_cli.profile import assistant as profiled
from remoe_cli.profile.acceptance import MEASURED, MOST_ROWS, assisted_passes
from remoe_cli.profile.hardware import latency_from
from remoe_cli.runtime.engine import Engine
from remoe_cli.runtime.sampling import Sampling
from tests.profile.test_run import TEXTS, run, same_bytes, save_checkpoint
from tests.support.assistants import assistant_of, save_dense
from tests.support.batching import PROMPTS, engine_of

# Tokens of a cycle, now and then of another one, which the text tells at times, and the assistant at others.
CYCLES = {3: 12.0, 4: 11.0, 5: 13.0, 6: 12.5}


@pytest.mark.sweep
@pytest.mark.parametrize("speculate", ["auto", 1, 4, 10])
@pytest.mark.parametrize("name", ["mixtral", "dense"])
def test_answers_take_the_passes_and_the_work_that_are_counted(speculate: Speculate, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, widths, read = engine_of("mixtral"), list[int](), list[int]()
    assistant = assistant_of(name)
    forward = Assistant.forward
    monkeypatch.setattr(Assistant, "forward", lambda self, ids, cache, last=1: (read.append(len(ids)), forward(self, ids, cache, last))[1])
    hook = plain.model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    counted, engine = np.zeros(2, dtype=int), replace(plain, assistant=assistant)
    try:
        for prompt in PROMPTS[1:3]:
            del widths[:], read[:]
            answer = engine.generate(prompt, 40, sampling=Sampling(logit_bias=CYCLES, temperature=0.9, seed=3), speculate=speculate)
            passes, work = _counted(engine, prompt, answer.token_ids, MEASURED.index(speculate))
            assert np.bincount(np.array(widths[1:]) - 1, minlength=MOST_ROWS).tolist() == passes.tolist()
            of_assistant = read[1 : len(read) - 1]  # without the prompt, and what was read to count
            assert (len(of_assistant), sum(of_assistant) - len(of_assistant)) == tuple(work.tolist())
            assert len(of_assistant) >= answer.drafted.assistant_tokens
            counted += work
    finally:
        hook.remove()
    assert counted[0] > 0 and (speculate == 1 or counted[1] > 0)


def _counted(engine: Engine, prompt: list[int], answer: Any, row: int) -> tuple[Any, Any]:
    assistant = engine.assistant
    assert assistant is not None
    guesses = assistant.guesses([*prompt, *answer], len(prompt))
    passes, work = assisted_passes(prompt, answer, 40, engine.ends, guesses, assistant.positions)
    return passes[row], work[row]


def test_passes_and_work_by_hand() -> None:
    """The answer is 7 to 12; the assistant is right but for one token, and nothing is found."""
    passes, work = assisted_passes([1, 2, 3], [7, 8, 9, 10, 11, 12], 99, (), [7, 8, 9, 5, 11, 12, 13], None)
    rows = {
        speculate: ({n: int(c) for n, c in enumerate(row, 1) if c}, made.tolist())
        for speculate, row, made in zip(MEASURED, passes, work, strict=True)
    }
    assert rows[1] == ({2: 3}, [3, 1])  # 8 and 9, then 5 for 10, then 11 and 12: the last draft reads what came beside its own token
    assert rows[4] == ({5: 2}, [8, 0])  # 8 and 9 of four, then 11 and 12 of four
    passes, work = assisted_passes([1, 2, 3], [7, 8, 9], 99, (), [7, 8, 9, 9], 5)
    assert passes[MEASURED.index(4)].tolist()[:3] == [0, 1, 0] and work[MEASURED.index(4)].tolist() == [1, 0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def small(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_dense(tmp_path_factory.mktemp("small"))
    for file in model.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return folder


def test_a_profile_counts_what_an_assistant_drafts(model: Path, small: Path, tmp_path: Path) -> None:
    """Interrupted and whole runs have the same bytes; the model as its own assistant guesses everything."""
    spec = read_assistant_spec(find(str(small)))
    described = latency_from("paper", read_spec(find(str(model))), assistant=spec)
    plain, made = run(model, tmp_path / "plain"), run(model, tmp_path / "made", assistant=str(small), latency=described)
    assert made.record.assistant is not None and made.record.assistant.revision == find(str(small)).revision
    assert made.record.assistant.spec == spec and made.record.latency.assistant is not None
    assert all(np.array_equal(plain.arrays[name], made.arrays[name]) for name in plain.arrays)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "again", lambda done, total: _interrupt(done), assistant=str(small), latency=described)
    run(model, tmp_path / "again", assistant=str(small), latency=described)
    assert same_bytes(tmp_path / "again", made.path)
    own = latency_from("paper", read_spec(find(str(model))), assistant=read_assistant_spec(find(str(model))))
    itself = run(model, tmp_path / "itself", assistant=str(model), latency=own)
    passes, tokens = (
        (each.arrays["assisted_passes"][:, MEASURED.index(4)].sum() for each in (itself, made)),
        itself.arrays["decode_tokens"].sum(),
    )
    right, wrong = passes
    figures, its = (assistant_figures(each) for each in (itself, plain))
    assert (
        its is None
        and figures is not None
        and own.assistant is not None
        and figures["path"] == str(model)
        and figures["decode_s"] == own.assistant.decode_s
    )
    assert figures["passes"] == itself.arrays["assisted_passes"][:, 0].sum() / tokens < figures["passes_without"]
    assert right <= 0.5 * tokens < wrong <= tokens
    assert (made.arrays["assistant_tokens"][:, :, 0].sum(axis=1) > 0).all() and len(TEXTS) == 7


def _interrupt(done: int) -> None:
    if done >= 3:
        raise KeyboardInterrupt


def test_what_cannot_assist_is_refused_before_anything_runs(model: Path, tmp_path: Path) -> None:
    other = save_dense(tmp_path / "other")
    engine_of("mixtral").tokenizer.save_pretrained(other)
    with pytest.raises(UsageError, match="has another vocabulary than the model: of the token '<pad>'"):
        run(model, tmp_path / "out", assistant=str(other))


def test_its_times_are_measured_as_the_main_function_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that tells one second for each token read, and for each pass: decode is a pass of one token."""
    clock, assistant = [0.0], assistant_of("dense")
    forward = Assistant.forward

    def told(self: Assistant, ids: Any, cache: Any, last: int = 1) -> Any:
        clock[0] += 3 + len(ids)
        return forward(self, ids, cache, last)

    monkeypatch.setattr(Assistant, "forward", told)
    monkeypatch.setattr(profiled, "now", lambda device: clock[0])
    times = profiled.time_assistant(assistant)
    assert times.decode_s == 4.0
    assert (times.prefill.fixed_s, times.prefill.per_token_s) == pytest.approx((3.0, 1.0))

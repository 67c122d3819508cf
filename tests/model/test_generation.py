"""generation_config.json: stop strings end an answer as in transformers; what greedy streaming cannot do is set aside by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from remoe_cli.errors import ModelError
from remoe_cli.model.checkpoint import find
from remoe_cli.model.generation import set_aside, stop_strings, visible, warning
from remoe_cli.model.spec import read_spec
from remoe_cli.runtime.engine import Engine, start_engine
from tests.profile.test_run import NEW, TEXTS, run, save_checkpoint
from tests.support.families import TOP_K

PROMPT = list(range(8, 14))
LONG = 24


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint(tmp_path_factory.mktemp("original"))
    (folder / "generation_config.json").unlink()
    return folder


def with_settings(original: Path, folder: Path, file: str = "generation_config.json", **settings: Any) -> Path:
    shutil.copytree(original, folder, dirs_exist_ok=True)
    before = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(before | settings))
    return folder


def engine(folder: Path) -> Engine:
    checkpoint = find(str(folder))
    return start_engine(checkpoint, read_spec(checkpoint), {}, lambda connections, timeout_s: None)


def reference(folder: Path, **settings: Any) -> list[int]:
    """The tokens of plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONG, do_sample=False, pad_token_id=0, **settings)
    return [int(token) for token in made[0, len(PROMPT) :]]


@pytest.fixture(scope="module")
def answer(original: Path) -> list[int]:
    """What the model answers when nothing stops it."""
    return reference(original)


def words_of(answer: list[int], original: Path) -> list[str]:
    return [str(word) for word in AutoTokenizer.from_pretrained(original).convert_ids_to_tokens(answer)]


@pytest.mark.parametrize("place", [2, 5])
@pytest.mark.parametrize("as_list", [False, True])
def test_a_stop_string_ends_the_answer(place: int, as_list: bool, original: Path, answer: list[int], tmp_path: Path) -> None:
    """Its tokens are transformers'; neither it nor the text after it is shown, nor its beginning before it is known."""
    words = words_of(answer, original)
    stop = f"{words[place]} {words[place + 1]}"
    folder = with_settings(original, tmp_path, stop_strings=[stop, "never"] if as_list else stop)
    expected = answer[: next(n for n in range(LONG) if stop in " ".join(words[:n]))]
    pieces: list[str] = []
    here = engine(folder)
    for _ in range(2):  # nothing of one answer is left for the next
        pieces.clear()
        made = here.generate(PROMPT, LONG, lambda piece: pieces.append(piece.text))
        assert list(made.token_ids) == expected
        assert made.finish_reason == "stop"
        whole = here.tokenizer.decode(expected, skip_special_tokens=True)
        assert made.text == "".join(pieces) == whole[: whole.index(stop)]


def test_without_a_stop_string_all_text_is_shown(original: Path, answer: list[int], tmp_path: Path) -> None:
    words = words_of(answer, original)
    folder = with_settings(original, tmp_path, stop_strings=[f"{words[-1]} that never comes", "nor this"])
    pieces: list[str] = []
    here = engine(folder)
    made = here.generate(PROMPT, LONG, lambda piece: pieces.append(piece.text))
    assert (list(made.token_ids), made.finish_reason) == (answer, "length")
    assert made.text == "".join(pieces) == here.tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one", ["###"], "one"),
        ("one #", ["###"], "one "),
        ("one ##", ["###"], "one "),
        ("one ## ", ["###"], "one ## "),
        ("one ###", ["###"], "one "),
        ("one ### two", ["###"], "one "),
        ("one #>", ["###", "#>>"], "one "),
        ("one\n", ["\n\n", "###"], "one"),
        ("aab", ["ab", "aabc"], ""),
        ("", ["###"], ""),
        ("one", [], "one"),
    ],
)
def test_text_that_may_begin_a_stop_string_waits(text: str, stop: list[str], shown: str) -> None:
    assert visible(text, stop, ended=None) == shown


ASIDE: dict[str, Any] = {
    "num_beams": 4,
    "num_beam_groups": 2,
    "num_return_sequences": 3,
    "constraints": ["x"],
    "force_words_ids": [[3]],
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "assistant_model": "someone/small",
    "use_mtp": True,
    "custom_generate": "someone/own",
    "guidance_scale": 1.5,
    "token_healing": True,
    "trust_remote_code": True,
    "logits_processor": ["x"],
    "stopping_criteria": ["x"],
    "streamer": "x",
    "synced_gpus": True,
    "compile_config": {"fullgraph": True},
    "cache_implementation": "quantized",
    "cache_config": {"backend": "quanto"},
    "prefill_chunk_size": 2,
    "max_time": 1e-9,
    "use_cache": False,
    "return_dict_in_generate": True,
    "stop_strings": [""],
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", ASIDE)
def test_what_greedy_streaming_cannot_do_is_set_aside(name: str, original: Path, answer: list[int], tmp_path: Path) -> None:
    """The answer is that without the setting; top_k and diversity_penalty stand beside it, as they do in such files."""
    folder = with_settings(original, tmp_path, **{name: ASIDE[name], "top_k": 4, "diversity_penalty": 0.5, "do_sample": True})
    checkpoint = find(str(folder))
    assert set_aside(checkpoint) == (name,)
    assert name in str(warning(checkpoint))
    here = engine(folder)
    here.warm_up()
    assert list(here.generate(PROMPT, LONG).token_ids) == answer


def test_old_settings_in_config_json_are_set_aside_too(original: Path, answer: list[int], tmp_path: Path) -> None:
    folder = with_settings(original, tmp_path, "config.json", num_beams=4, num_return_sequences=2)
    assert set_aside(find(str(folder))) == ("num_beams", "num_return_sequences")
    assert list(engine(folder).generate(PROMPT, LONG).token_ids) == answer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "penalty_alpha": 0, "streamer": None},
        {"cache_implementation": "hybrid"},
    ],
)
def test_settings_that_ask_for_nothing_are_not_named(settings: dict[str, Any], original: Path, tmp_path: Path) -> None:
    checkpoint = find(str(with_settings(original, tmp_path, **settings)))
    assert (set_aside(checkpoint), warning(checkpoint), stop_strings(checkpoint)) == ((), None, ())


def test_the_log_names_what_is_set_aside_once(original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    here = engine(with_settings(original, tmp_path, num_beams=4, custom_generate="someone/own"))
    here.warm_up()
    here.generate(PROMPT, 2)
    assert [record.getMessage() for record in caplog.records if "generation settings" in record.getMessage()] == [
        "Not followed of the model's generation settings, as remoe makes one answer at a time: custom_generate, num_beams."
    ]


@pytest.mark.parametrize(
    "settings",
    [{"eos_token_id": "x"}, {"sequence_bias": {"x": 1}}, {"suppress_tokens": "x"}, {"early_stopping": "perhaps"}],
)
def test_settings_that_no_answer_can_be_made_with_are_found_when_loading(settings: dict[str, Any], original: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"generat") as caught:
        engine(with_settings(original, tmp_path, **settings)).warm_up()
    assert "generation_config.json" in caught.value.message + caught.value.hint


def test_a_profile_with_beams_is_that_without(original: Path, tmp_path: Path) -> None:
    said: list[str] = []
    plain = run(original, tmp_path / "plain")
    folder = with_settings(original, tmp_path / "model", num_beams=3, num_return_sequences=2, return_dict_in_generate=True)
    beams = run(folder, tmp_path / "beams", say=said.append)
    assert all(np.array_equal(plain.arrays[name], beams.arrays[name]) for name in plain.arrays)
    assert [text for text in said if "num_beams, num_return_sequences, return_dict_in_generate" in text]


def test_a_profile_ends_answers_at_stop_strings(original: Path, tmp_path: Path) -> None:
    """Each prompt decodes as many tokens as when it is asked, and nothing after the stop string is counted."""
    plain = run(original, tmp_path / "plain")
    plainly = engine(original)
    stop = words_of(list(plainly.generate(plainly.prompt_ids(TEXTS[0]), NEW).token_ids), original)[2]
    folder = with_settings(original, tmp_path / "model", stop_strings=[stop])
    stopped = run(folder, tmp_path / "stopped")
    asked = engine(folder)
    lengths = [len(asked.generate(asked.prompt_ids(" ".join(text.split()[:12])), NEW).token_ids) for text in TEXTS]
    assert stopped.arrays["decode_tokens"].tolist() == [length - 1 for length in lengths]
    assert min(lengths) < NEW
    assert (stopped.arrays["decode_counts"].sum(axis=2) == stopped.arrays["decode_tokens"][:, None] * TOP_K).all()
    assert (stopped.arrays["prefill_counts"] == plain.arrays["prefill_counts"]).all()

"""Profiles of a mix of workloads: which requests are in it, how they count, and what cannot be mixed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli.errors import UsageError
from remoe_cli.model.spec import RemoteExperts
from remoe_cli.plan.problem.workload import from_profile
from remoe_cli.profile.loss_record import QuantisationLoss
from remoe_cli.profile.mix import mix
from remoe_cli.profile.record import Profile, read_profile, write_profile
from tests.support.synthetic import synthetic_profile

CHAT, CODE = {"prompts": 40, "prompt_tokens": 30, "decode_tokens": 10, "seed": 1}, {"prompts": 60, "prompt_tokens": 80, "seed": 2}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Profile, Profile]:
    folder = tmp_path_factory.mktemp("parts")
    return synthetic_profile(folder / "chat", **CHAT), synthetic_profile(folder / "code", **CODE)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def mixed(parts: tuple[Profile, Profile], tmp_path_factory: pytest.TempPathFactory) -> Profile:
    out = tmp_path_factory.mktemp("mixed") / "mix"
    mix({parts[0].path: 1.5, parts[1].path: 0.5}, out)
    return read_profile(out)


def is_chat(profile: Profile) -> Any:
    return profile.arrays["prompt_tokens"] == CHAT["prompt_tokens"]


def test_weights_are_shares_of_the_requests(mixed: Profile) -> None:
    """All 40 chats, and a third as many of the code prompts, evenly over these."""
    assert (is_chat(mixed).sum(), (~is_chat(mixed)).sum()) == (40, 13)
    assert mixed.record.dataset.prompts == 53 and "0.75 of synthetic + 0.25 of synthetic" in mixed.record.dataset.source


def test_no_prompt_counts_twice_and_none_is_changed(mixed: Profile, parts: tuple[Profile, Profile]) -> None:
    for part, rows in zip(parts, (is_chat(mixed), ~is_chat(mixed)), strict=True):
        known = [prompt.tobytes() for prompt in part.arrays["prefill_counts"]]
        found = [prompt.tobytes() for prompt in mixed.arrays["prefill_counts"][rows]]
        places = [known.index(prompt) for prompt in found]
        assert len(set(places)) == len(places) and max(places) - min(places) >= len(known) * 0.9 - 1


def test_both_halves_have_the_same_mix(mixed: Profile) -> None:
    """Held-out plans take every other prompt."""
    chats = is_chat(mixed)
    assert abs(int(chats[::2].sum()) - int(chats[1::2].sum())) <= 1 and abs(int((~chats)[::2].sum()) - int((~chats)[1::2].sum())) <= 1
    assert all(0.1 < (~part).mean() < 0.4 for part in np.array_split(chats, 3))


def test_use_is_that_of_the_picked_requests(mixed: Profile, parts: tuple[Profile, Profile]) -> None:
    chat, code = (part.arrays["prefill_counts"] for part in parts)
    picked = np.arange(13) * 60 // 13
    expected = chat.sum(axis=0) + code[picked].sum(axis=0)
    assert mixed.arrays["prefill_counts"].sum(axis=0).tolist() == expected.tolist()
    share = expected / expected.sum(axis=1, keepdims=True) * 2
    np.testing.assert_allclose(from_profile(mixed).use, share)


def test_each_token_is_traced_alike(parts: tuple[Profile, Profile], tmp_path: Path) -> None:
    """Of the chats only every fourth token is traced; of the code prompts then too, and each token belongs to its prompt."""
    few = {name: array[::4] if name.startswith("trace_") else array for name, array in parts[0].arrays.items()}
    sparse = write_profile(tmp_path / "sparse", parts[0].record, few)
    made = mix({sparse.path: 0.5, parts[1].path: 0.5}, tmp_path / "mix")
    traced, chats = made.arrays["trace_prompt"], is_chat(made)
    assert (np.diff(traced) >= 0).all()
    per_token = [
        chats[traced].sum() / made.arrays["decode_tokens"][chats].sum(),
        (~chats[traced]).sum() / made.arrays["decode_tokens"][~chats].sum(),
    ]
    assert per_token[0] == pytest.approx(0.25, rel=0.02) and per_token[1] == pytest.approx(per_token[0], rel=0.02)
    for token, prompt in zip(made.arrays["trace_ids"], traced, strict=True):  # it is one of the prompt's own
        assert all(made.arrays["decode_counts"][prompt, layer, expert] for layer in range(2) for expert in token[layer])


def changed(profile: Profile, folder: Path, **update: Any) -> Path:
    return write_profile(folder, profile.record.model_copy(update=update), profile.arrays).path


def test_unlike_profiles_are_refused(parts: tuple[Profile, Profile], tmp_path: Path) -> None:
    chat, code = parts
    settings = code.record.settings
    assert settings is not None
    for name, update in (
        ("model", {"model": code.record.model.model_copy(update={"revision": "local:1"})}),
        ("form of experts", {"spec": code.record.spec.model_copy(update={"remote": RemoteExperts(form="int8", expert_bytes=1)})}),
        ("settings", {"settings": settings.model_copy(update={"dtype": "float32"})}),
        ("routing", {"routing": code.record.routing.model_copy(update={"trace": "drawn"})}),
    ):
        with pytest.raises(UsageError, match=f"They differ in: {name}"):
            mix({chat.path: 0.5, changed(code, tmp_path / name, **update): 0.5}, tmp_path / "mix")
    routing = code.record.routing.model_copy(update={"row": "batch"})
    with pytest.raises(UsageError, match="are no prompts"):
        mix({chat.path: 0.5, changed(code, tmp_path / "rows", routing=routing): 0.5}, tmp_path / "mix")
    assert not (tmp_path / "mix").exists()


def test_it_loses_what_the_worst_part_loses(parts: tuple[Profile, Profile], tmp_path: Path) -> None:
    figures = {"prompts": 1, "text_tokens": 9, "answer_tokens": 9, "unquantised_perplexity": 9.0, "perplexity": 9.0, "rise_error": 0.0}
    losses = [QuantisationLoss(**figures, divergence_bits=bits, agreement=1.0) for bits in (0.001, 0.2)]  # type: ignore[arg-type]
    paths = [changed(part, tmp_path / str(i), loss=loss) for i, (part, loss) in enumerate(zip(parts, losses, strict=True))]
    for out, order in (("a", paths), ("b", paths[::-1])):
        assert mix({path: 0.5 for path in order}, tmp_path / out).record.loss == losses[1]


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan"), float("inf")])
def test_shares_that_cannot_be(parts: tuple[Profile, Profile], share: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="each with a share above 0"):
        mix({parts[0].path: 1.0, parts[1].path: share}, tmp_path / "mix")


def test_a_profile_is_not_written_over(parts: tuple[Profile, Profile]) -> None:
    with pytest.raises(UsageError, match="is one of the profiles"):
        mix({part.path: 0.5 for part in parts}, parts[0].path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chat=0.7", "does not say how much of"),
        ("chat=0.7,code", "which is no share of one of the profiles"),
        ("chat=0.7,other=0.3", "which is no share of one of the profiles"),
        ("chat=0.7,chat=0.3", "which is no share of one of the profiles"),
        ("chat=0.7,code=few", "which is no number"),
    ],
)
def test_the_option_names_each_profile_once(parts: tuple[Profile, Profile], text: str, message: str) -> None:
    from remoe_cli.cli.profile_merge import _weights

    with pytest.raises(UsageError, match=message):
        _weights(text, [part.path for part in parts])
    assert list(_weights("code=3, chat=1", [part.path for part in parts]).values()) == [3.0, 1.0]


def test_texts_are_kept_where_all_have_them(parts: tuple[Profile, Profile], tmp_path: Path) -> None:
    with_texts = []
    for part in parts:
        sizes = (np.arange(len(part.arrays["prompt_tokens"])) % 3 + 1).astype(np.int32)
        bags = {"bag_sizes": sizes, "bag_tokens": np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)}
        bags["bag_counts"] = np.ones(int(sizes.sum()), dtype=np.int32)
        with_texts.append(replace(part, path=write_profile(tmp_path / part.path.name, part.record, part.arrays | bags).path))
    made = mix({part.path: 0.5 for part in with_texts}, tmp_path / "mix")
    sizes = made.arrays["bag_sizes"]
    assert len(made.arrays["bag_tokens"]) == sizes.sum() and (sizes == made.arrays["bag_tokens"][np.cumsum(sizes) - 1] % 3 + 1).all()
    assert "bag_sizes" not in mix({with_texts[0].path: 0.5, parts[1].path: 0.5}, tmp_path / "without").arrays

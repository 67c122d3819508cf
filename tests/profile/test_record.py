"""A profile directory is read back as it was written, and refused when it does not add up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli import artifacts
from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.profile.record import Profile, RoutingRef, read_profile, read_profile_of, write_profile
from tests.support.synthetic import synthetic_profile

Arrays = dict[str, Any]
IMPORTED = RoutingRef(source="imported", format="counts (.npz)", sha256="0" * 64, phases=("prefill",), trace="drawn")


def rewritten(profile: Profile, arrays: Arrays, routing: RoutingRef) -> None:
    """Write both files as they are, past the check that write_profile makes."""
    artifacts.write_arrays(profile.path / "arrays.safetensors", arrays, "profile")
    digest = artifacts.sha256_file(profile.path / "arrays.safetensors")
    record = profile.record.model_copy(update={"routing": routing, "arrays_sha256": digest})
    artifacts.write_json(profile.path / "profile.json", record)


def without(arrays: Arrays, *, layer: int | None = None, phase: str | None = None) -> Arrays:
    """The arrays with a layer's or a phase's routing left out."""
    out = {name: array.copy() for name, array in arrays.items()}
    if layer is not None:
        out["prefill_counts"][:, layer] = out["decode_counts"][:, layer] = 0
        out["trace_ids"][:, layer] = -1
    if phase is not None:
        out[f"{phase}_counts"][:] = 0
    return out


def test_what_is_written_is_read(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path)
    read = read_profile(tmp_path)
    assert read.record == profile.record and read.record.routing == RoutingRef()
    assert read.arrays.keys() == profile.arrays.keys()
    assert all((read.arrays[name] == profile.arrays[name]).all() for name in profile.arrays)
    assert (read.counts("prefill") == profile.arrays["prefill_counts"]).all()
    assert (read.counts("decode") == profile.arrays["decode_counts"]).all()


def test_what_is_no_profile(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    for path, message in (
        (tmp_path / "nowhere", f"There is no folder {tmp_path / 'nowhere'}."),
        (tmp_path / "plan.json", f"{tmp_path / 'plan.json'} is a file."),
        (tmp_path, f"{tmp_path} is not a profile: it has no profile.json."),
    ):
        with pytest.raises(UsageError) as raised:
            read_profile(path)
        assert raised.value.message == message and "'remoe profile" in raised.value.hint


def test_a_profile_that_a_plan_names_may_be_on_another_machine(tmp_path: Path) -> None:
    plan, profile = Path("plans/demo-local.json"), synthetic_profile(tmp_path / "p")
    assert read_profile_of(plan, tmp_path / "p").record == profile.record
    with pytest.raises(ArtifactError) as raised:
        read_profile_of(plan, tmp_path / "q")
    message = f"The plan plans/demo-local.json was made from the profile {tmp_path / 'q'}, which is not on this machine."
    assert raised.value.message == message and raised.value.hint


@pytest.mark.parametrize("missing", ["prefill", "decode"])
def test_counts_of_a_phase_without_routing_are_those_of_the_other(missing: str, tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path)
    there = "decode" if missing == "prefill" else "prefill"
    rewritten(profile, without(profile.arrays, phase=missing), IMPORTED.model_copy(update={"phases": (there,)}))
    read = read_profile(tmp_path)
    assert (read.counts("prefill") == read.arrays[f"{there}_counts"]).all() and read.counts("decode").any()


def test_layers_without_routing_and_prompts_without_vectors(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path)
    routing = IMPORTED.model_copy(update={"layers": (2,), "phases": ("prefill", "decode")})
    rewritten(profile, without(profile.arrays, layer=0) | {"prompt_vectors": np.empty((20, 0), dtype=np.float32)}, routing)
    assert read_profile(tmp_path).record.routing.layers == (2,)


def test_an_older_schema_is_refused(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path)
    artifacts.write_json(tmp_path / "profile.json", profile.record.model_copy(update={"schema_version": "remoe.profile/1"}))
    with pytest.raises(ArtifactError, match=r"schema 'remoe.profile/1', and this version of remoe reads 'remoe.profile/3'"):
        read_profile(tmp_path)


def one_more(name: str) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        arrays[name][3, 1, 0] += 1
        return arrays

    return change


def put(name: str, at: int, value: int) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        arrays[name][at] = value
        return arrays

    return change


BAGS = {name: np.ones(20, dtype=np.int32) for name in ("bag_sizes", "bag_tokens", "bag_counts")}
WRONG: dict[str, tuple[Callable[[Arrays], Arrays], RoutingRef, str]] = {
    "shape": (lambda a: a | {"trace_prompt": a["trace_prompt"][:-1]}, RoutingRef(), "trace_ids has shape"),
    "gone": (lambda a: {n: x for n, x in a.items() if n != "decode_counts"}, RoutingRef(), "decode_counts has shape None"),
    "too many": (one_more("prefill_counts"), RoutingRef(), "prefill_counts do not fit prefill tokens and top-2"),
    "too many decoded": (one_more("decode_counts"), RoutingRef(), "decode_counts do not fit"),
    "negative": (put("decode_counts", 0, -1), RoutingRef(), "decode_counts do not fit"),
    "layer": (lambda a: a, RoutingRef(layers=(1,)), "prefill_counts hold routing that profile.json does not name"),
    "phase": (lambda a: a, RoutingRef(phases=("prefill",)), "decode_counts hold routing that profile.json does not name"),
    "no layer of it": (lambda a: a, RoutingRef(layers=(0, 1)), "layers or phases"),
    "no phase": (lambda a: a, RoutingRef(phases=()), "layers or phases"),
    "uneven": (put("prefill_counts", 3, 0), RoutingRef(), ""),
    "uneven import": (
        lambda a: a | {"prefill_counts": a["prefill_counts"] * np.arange(2)[None, :, None].astype(np.int32)},
        IMPORTED.model_copy(update={"phases": ("prefill", "decode")}),
        "the sums of prefill_counts differ between layers",
    ),
    "expert": (put("trace_ids", 5, 4), RoutingRef(), "trace_ids holds ids that are not experts"),
    "traced layer": (
        lambda a: without(a, layer=0) | {"trace_ids": a["trace_ids"]},
        IMPORTED.model_copy(update={"layers": (2,), "phases": ("prefill", "decode")}),
        "trace_ids holds ids that are not experts",
    ),
    "prompt": (put("trace_prompt", 0, 20), RoutingRef(), "trace_prompt names prompts"),
    "bags": (lambda a: a | BAGS, RoutingRef(), ""),
    "some bags": (lambda a: a | {"bag_sizes": BAGS["bag_sizes"]}, RoutingRef(), "bag_tokens has shape None"),
    "bag sizes": (lambda a: a | BAGS | {"bag_sizes": BAGS["bag_sizes"] * 2}, RoutingRef(), r"bag_tokens has shape \(20,\).*\(40,\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_add_up_is_neither_written_nor_read(name: str, tmp_path: Path) -> None:
    change, routing, message = WRONG[name]
    profile = synthetic_profile(tmp_path / "p")
    arrays = change({name: array.copy() for name, array in profile.arrays.items()})
    record = profile.record.model_copy(update={"routing": routing})
    rewritten(profile, arrays, routing)
    if not message:
        read_profile(tmp_path / "p")
        write_profile(tmp_path / "q", record, arrays)
        return
    with pytest.raises(ArtifactError, match=message):
        read_profile(tmp_path / "p")
    with pytest.raises(ArtifactError, match=message):
        write_profile(tmp_path / "q", record, arrays)
    assert not (tmp_path / "q").exists()

"""A deployment with an assistant: its files are where the main function's are, its drafts change no token, and it stays as profiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from remoe_cli.artifacts import write_json
from remoe_cli.deploy import main_files
from remoe_cli.deploy.aws.contents import expected
from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.deploy.inputs import check_model
from remoe_cli.deploy.local import lifecycle, target
from remoe_cli.deploy.target import DeployOptions
from remoe_cli.errors import ArtifactError
from remoe_cli.model.assistant import load_assistant, read_assistant_spec
from remoe_cli.model.checkpoint import Checkpoint, find
from remoe_cli.package import bundle
from remoe_cli.package.assistant_files import packaged_assistant
from remoe_cli.plan.document import LayerPlan, PlannedAssistant, Source
from remoe_cli.profile.record import AssistantRef
from remoe_cli.progress import no_progress
from remoe_cli.runtime import client
from tests.plan.test_assistant import with_assistant
from tests.plan.test_drafts import with_answers
from tests.support.assistants import save_dense
from tests.support.by_hand import PROMPT, ByHand, by_hand, on_twin
from tests.support.damage import flip
from tests.support.families import VOCAB_SIZE

HERE = target.LocalTarget(SILENT)
LAYERS = (LayerPlan(layer=1, remote=(1, 3), memory_mb=1769, replicas=1),)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ByHand]:
    """What a deployment takes whose plan has an assistant, in the folder `small`; nothing of one outlives the test."""
    plain = by_hand(tmp_path, LAYERS)
    helped = with_assistant(with_answers(plain.profile, 0.5, tmp_path / "answers"), 0.9, tmp_path)
    small = find(str(save_dense(tmp_path / "small")))
    record = helped.record.model_copy(
        update={"assistant": AssistantRef(path=small.name, revision=small.revision, spec=read_assistant_spec(small))}
    )
    profile = replace(helped, record=record)
    write_json(profile.path / "profile.json", record)
    assistant = PlannedAssistant(name=small.name, revision=small.revision, bytes=read_assistant_spec(small).bytes)
    source = Source(path=str(profile.path), sha256=profile.sha256)
    plan = plain.plan.model_copy(update={"speculate": 3, "assistant": assistant, "profile": source})
    write_json(plain.plan_path, plan)
    with on_twin(replace(plain, profile=profile, plan=plan), tmp_path, monkeypatch) as made:
        yield made


@pytest.mark.parametrize("endpoint", [None, pytest.param(Endpoint.aws_lambda, marks=pytest.mark.nightly)])
def test_answers_have_the_same_tokens_with_its_drafts(made: ByHand, endpoint: Endpoint | None) -> None:
    HERE.deploy(made.plan_path, "d", DeployOptions(endpoint=endpoint))
    document = client.answer(HERE.main_address("d"), PROMPT, 16, lambda text: None)
    assert document["token_ids"] == made.tokens() and document["receipt"]["assistant_draft_tokens"] > 3
    if endpoint is None:
        assert made.plan.assistant is not None and HERE.status("d")["main"]["assistant"] == made.plan.assistant.name


def test_its_files_lie_beside_the_models_and_are_none_of_them(made: ByHand, tmp_path: Path) -> None:
    manifest = bundle.build(made.plan, made.plan_path, made.profile, tmp_path / "bundle")
    config, without = (
        main_files.server_config(made.plan, made.profile, made.catalog, manifest, str, speculate=one) for one in (None, "off")
    )
    assert config.assistant is not None and without.assistant is None and "assistant" not in without.model_dump(exclude={"planned"})
    packaged, plain = (
        main_files.write_main_files(one, made.plan_path, tmp_path / name) for one, name in ((config, "with"), (without, "without"))
    )
    more = {file.name for file in packaged.files} - {file.name for file in plain.files}
    assert {"config.json.assistant", "model.safetensors.assistant"} <= more and all(name.endswith(".assistant") for name in more)
    folders = [Checkpoint("m", tmp_path / name) for name in ("with", "without")]
    assert [file.name for file in folders[0].files] == [file.name for file in folders[1].files]
    with packaged_assistant(tmp_path / "with", config.assistant) as found:
        assert found is not None
        loaded, own = load_assistant(found, VOCAB_SIZE), load_assistant(find(config.assistant.path), VOCAB_SIZE)
    for one, other in zip(loaded.model.parameters(), own.model.parameters(), strict=True):
        assert one.equal(other)
    assert made.plan.assistant is not None
    assert (
        expected(made.plan).main_bytes - expected(made.plan.model_copy(update={"assistant": None})).main_bytes == made.plan.assistant.bytes
    )


def test_one_that_has_changed_is_refused(made: ByHand, tmp_path: Path) -> None:
    manifest = bundle.build(made.plan, made.plan_path, made.profile, tmp_path / "bundle")
    config = main_files.server_config(made.plan, made.profile, made.catalog, manifest, str)
    weights = tmp_path / "small" / "model.safetensors"
    flip(weights, weights.stat().st_size - 100)
    for load in (
        lambda: check_model(made.plan, made.profile, no_progress),
        lambda: main_files.write_main_files(config, made.plan_path, tmp_path / "main"),
        lambda: HERE.deploy(made.plan_path, "d", DeployOptions()),
    ):
        with pytest.raises(ArtifactError, match="small has changed since it was profiled"):
            load()
    assert lifecycle.names() == []

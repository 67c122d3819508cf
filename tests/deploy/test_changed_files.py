"""Files that change on disk: before, while and after a plan is deployed on the local twin."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from remoe_cli.artifacts import json_text, parse_document, read_json
from remoe_cli.deploy import inputs as deploy_inputs
from remoe_cli.deploy import main_files
from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.local import lifecycle, target
from remoe_cli.deploy.local.calibrate import restart
from remoe_cli.deploy.target import DeployOptions
from remoe_cli.errors import ArtifactError, InvokeError
from remoe_cli.function.weights import Head, read_head
from remoe_cli.model import shards
from remoe_cli.package import bundle
from remoe_cli.plan.cost import main_function
from remoe_cli.plan.document import LayerPlan
from remoe_cli.plan.problem.request import problem_of
from remoe_cli.profile.acceptance import MEASURED, MOST_ROWS
from remoe_cli.runtime import client
from remoe_cli.runtime.last_resort import ROOM_BYTES
from remoe_cli.runtime.load_main import load_here
from remoe_cli.runtime.server_config import ServerConfig
from tests.support.by_hand import PROMPT, ByHand, by_hand, on_twin
from tests.support.damage import flip, overwrite
from tests.support.trees import tree

HERE = target.LocalTarget(SILENT)
LAYERS = (
    LayerPlan(layer=0, remote=(0, 1, 2, 3, 4, 5, 6, 7), memory_mb=1769, replicas=1),
    LayerPlan(layer=1, remote=(1, 3), memory_mb=1769, replicas=1),
)
MODEL_FILES = ("model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json")
CHANGED = "has changed since it was profiled"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ByHand]:
    """What a deployment takes; nothing of one outlives the test."""
    whole = by_hand(tmp_path, LAYERS, {"chat_template.jinja": "{{ messages[0].content }}", "generation_config.json": '{"pad_token_id": 1}'})
    monkeypatch.setattr(deploy_inputs, "read_inputs", lambda path: (whole.plan, whole.profile, whole.catalog))
    with on_twin(whole, tmp_path, monkeypatch) as made:
        yield made


def deploy(made: ByHand) -> None:
    HERE.deploy(made.plan_path, "d", DeployOptions())


def answer() -> list[int]:
    document = client.answer(HERE.main_address("d"), PROMPT, 16, lambda text: None)
    tokens: list[int] = document["token_ids"]
    return tokens


def test_the_main_function_is_told_which_experts_are_on_its_gpu(made: ByHand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By layer, in server.json; its text is what it was where none are. Nobody knows what an expert takes on the GPU of this plan."""
    monkeypatch.setattr(main_files, "costs_of", lambda problem, placement: None)
    manifest = bundle.build(made.plan, made.plan_path, made.profile, tmp_path / "bundle")
    layer = next(layer for layer in made.plan.layers if len(layer.remote) < made.plan.model.experts_per_layer)
    there = tuple(e for e in range(made.plan.model.experts_per_layer) if e not in layer.remote)[-1:]
    layers = tuple(each.model_copy(update={"gpu": there}) if each is layer else each for each in made.plan.layers)
    plan = made.plan.model_copy(update={"layers": layers})
    without, config = (main_files.server_config(each, made.profile, made.catalog, manifest, str) for each in (made.plan, plan))
    assert config.gpu_experts == {layer.layer: there}
    assert without == config.model_copy(update={"gpu_experts": {}, "spare_experts": without.spare_experts})
    assert parse_document(json_text(config).encode(), ServerConfig, "server.json") == config
    assert "gpu_experts" not in json_text(without)


def test_the_main_function_is_told_the_drafts_of_the_plan_unless_others_are_asked_for(made: ByHand, tmp_path: Path) -> None:
    manifest = bundle.build(made.plan, made.plan_path, made.profile, tmp_path / "bundle")
    passes = np.zeros((len(made.profile.arrays["decode_tokens"]), len(MEASURED), MOST_ROWS), dtype=np.int32)
    passes[:, :, 0] = made.profile.arrays["decode_tokens"][:, None]
    profile = replace(made.profile, arrays=made.profile.arrays | {"draft_passes": passes})
    plan = made.plan.model_copy(update={"speculate": 3})
    config, other = (main_files.server_config(plan, profile, made.catalog, manifest, str, speculate=each) for each in (None, "off"))
    assert (config.speculate, other.speculate) == (3, "off")


def test_the_main_function_is_told_how_many_requests_to_serve_at_once(made: ByHand, tmp_path: Path) -> None:
    manifest = bundle.build(made.plan, made.plan_path, made.profile, tmp_path / "bundle")
    plan = made.plan.model_copy(update={"concurrency": 4, "workload": made.plan.workload.model_copy(update={"concurrency": 4})})
    without, config = (main_files.server_config(each, made.profile, made.catalog, manifest, str) for each in (made.plan, plan))
    same = {"concurrency": 1, "planned": without.planned, "spare_experts": without.spare_experts}
    assert config.concurrency == 4 and without == config.model_copy(update=same)
    assert config.spare_experts < without.spare_experts, "each request at once has a cache of its own"
    assert parse_document(json_text(config).encode(), ServerConfig, "server.json") == config
    assert '"concurrency"' not in json_text(without)


def test_the_main_function_is_told_what_to_start_and_how_many_more_experts_fit(made: ByHand, tmp_path: Path) -> None:
    manifest = bundle.build(made.plan, made.plan_path, made.profile, tmp_path / "bundle")
    config = main_files.server_config(made.plan, made.profile, made.catalog, manifest, str)
    problem, policy = problem_of(made.plan, made.profile, made.catalog), config.start_ahead
    assert policy is not None and policy.idle_s == made.catalog.function.idle_ttl_s and policy.n_in == problem.workload.n_in
    assert policy.most_usd == pytest.approx(made.plan.cost_usd_per_request / 10)
    for function in config.functions:
        assert function.use == pytest.approx(problem.workload.use[function.layer][list(function.experts)], abs=1e-6)
        assert 0 < function.expert_usd < function.start_usd
    experts = sum(8 - len(layer.remote) for layer in made.plan.layers)
    limit = 0.95 * made.plan.main.memory_mb * 2**20 - ROOM_BYTES
    held = [main_function.main_memory_bytes(problem, made.plan.main, experts + config.spare_experts + more) for more in (0, 1)]
    assert held[0] <= limit < held[1], "the plan's longest requests, the reserve and local experts have their memory, and no more is left"
    older = {"start_ahead": None, "spare_experts": 0, "functions": ()}
    assert not {*older} & {*json.loads(json_text(config.model_copy(update=older)))} - {"functions"}


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_changed_model_is_refused_by_all_that_load_it(made: ByHand, tmp_path: Path, name: str) -> None:
    remote = bundle.build(made.plan, made.plan_path, made.profile, tmp_path / "bundle")
    config = main_files.server_config(made.plan, made.profile, made.catalog, remote, str)
    main_files.write_main_files(config, made.plan_path, tmp_path / "main")
    path = tmp_path / "model" / name
    flip(path, path.stat().st_size // 2)
    before = tree(tmp_path)
    server_json = tmp_path / "main" / "server.json"
    loaders: tuple[Callable[[], object], ...] = (
        lambda: deploy(made),
        lambda: bundle.build(made.plan, made.plan_path, made.profile, tmp_path / "again"),
        lambda: main_files.write_main_files(config, made.plan_path, tmp_path / "again"),
        lambda: load_here(server_json, lambda connections, timeout_s: pytest.fail("it is called before the model is checked")),
    )
    for load in loaders:
        with pytest.raises(ArtifactError, match=CHANGED):
            load()
    assert tree(tmp_path) == before and lifecycle.names() == []


@pytest.mark.parametrize("what", ["functions", "main function"])
def test_a_model_that_changes_while_it_is_packaged_is_refused(
    made: ByHand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    weights = tmp_path / "model" / "model.safetensors"

    def flipped(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **more: object) -> object:
            flip(weights, weights.stat().st_size - 100)
            return real(*arguments, **more)

        return call

    if what == "functions":
        monkeypatch.setattr(shards, "write_shards", flipped(shards.write_shards))
        with pytest.raises(ArtifactError, match=CHANGED):
            bundle.build(made.plan, made.plan_path, made.profile, tmp_path / "bundle")
        assert not (tmp_path / "bundle" / "manifest.json").exists()
        return
    remote = bundle.build(made.plan, made.plan_path, made.profile, tmp_path / "bundle")
    config = main_files.server_config(made.plan, made.profile, made.catalog, remote, str)
    monkeypatch.setattr(
        main_files.partial_checkpoint, "write_partial_checkpoint", flipped(main_files.partial_checkpoint.write_partial_checkpoint)
    )
    with pytest.raises(ArtifactError, match=CHANGED):
        main_files.write_main_files(config, made.plan_path, tmp_path / "main")
    assert not (tmp_path / "main" / "main.json").exists()


def test_a_deployment_that_runs_does_not_change_with_the_models_files(made: ByHand, tmp_path: Path) -> None:
    expected = made.tokens()
    deploy(made)
    assert answer() == expected
    weights = tmp_path / "model" / "model.safetensors"
    overwrite(weights, len(read_head(weights)), os.urandom(weights.stat().st_size - len(read_head(weights))))
    assert answer() == expected
    weights.write_bytes(b"")  # mapped weights would end the main server here
    assert answer() == expected
    assert HERE.status("d")["main"]["restarts"] == 0
    # When it has to load again, it says why it cannot, rather than join another model with the functions' experts.
    os.kill(HERE.status("d")["main"]["pid"], signal.SIGKILL)
    give_up = time.monotonic() + 60
    while not any(CHANGED in line for line in HERE.logs("d", "main")["main"]):
        assert time.monotonic() < give_up, HERE.logs("d")
        time.sleep(0.1)


@pytest.mark.parametrize("where", ["head", "experts"])
def test_a_function_does_not_compute_with_a_damaged_shard(made: ByHand, where: str) -> None:
    deploy(made)
    assert answer() == made.tokens()
    folder = lifecycle.state_dir("d")
    function = read_json(folder / "server.json", ServerConfig).functions[0].function
    shard = folder / "bundle" / "layer-000.safetensors"
    head = Head.parse(read_head(shard))
    places = [100] if where == "head" else [sum(head.range(expert)) // 2 for expert in head.tensors]
    for at in places:
        flip(shard, at)
    restart("d", function)
    with pytest.raises(InvokeError, match="ShardDigestError") as raised:
        answer()
    assert "is not the one that was deployed" in raised.value.message and function in raised.value.message

"""Same tokens through real twin workers: shards, zip, awslambdaric, Invoke API, boto3."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from remoe_cli.deploy.local.config import FunctionConfig
from remoe_cli.limits import Mechanism
from remoe_cli.model.checkpoint import find
from remoe_cli.model.experts import attach, expert_layers
from remoe_cli.model.loader import load
from remoe_cli.model.shards import write_shards
from remoe_cli.package.bundle import HANDLER, function_zip
from remoe_cli.runtime import dispatch
from remoe_cli.runtime.dispatch import Dispatcher, RemoteLayer
from remoe_cli.runtime.invoke import make_client
from tests.families import save
from tests.harness import clear_steps, greedy, logits
from tests.twin import run_twin

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h"]


@contextmanager
def _deployed(
    family: str, dtype: torch.dtype, folder: Path, probed: Mechanism
) -> Iterator[tuple[PreTrainedModel, PreTrainedModel, Dispatcher]]:
    """The reference, the same model with the odd experts of every layer in twin workers, and its dispatcher."""
    save(family, dtype, folder / "model", fused=False)
    checkpoint = find(str(folder / "model"))
    reference = AutoModelForCausalLM.from_pretrained(checkpoint.path, experts_implementation="eager")
    layers = expert_layers(reference)
    remote = {x.layer: tuple(range(1, x.experts, 2)) for x in layers}
    stay = {x.layer: tuple(range(0, x.experts, 2)) for x in layers}
    shards = {x.layer: x.path for x in write_shards(checkpoint, {n: [e] for n, e in remote.items()}, 1, folder / "bundle")}
    zipfile.ZipFile(io.BytesIO(function_zip())).extractall(folder / "code")
    functions = [
        FunctionConfig(
            name=path.stem,
            handler=HANDLER,
            code_dir=str(folder / "code"),
            environment={"REMOE_SHARD": str(path)},
            memory_mb=1769,
            timeout_s=20,
            reserved_concurrency=2,
        )
        for path in shards.values()
    ]
    with run_twin(functions, folder / "logs", probed) as twin, ThreadPoolExecutor(2) as pool:
        split = load(checkpoint, stay)
        dispatcher = Dispatcher(
            client=make_client(twin.endpoint, 2, 20),
            local={layer: {e: row for row, e in enumerate(experts)} for layer, experts in stay.items()},
            remote={layer: RemoteLayer(path.stem, remote[layer], 2) for layer, path in shards.items()},
            pool=pool,
        )
        attach(split, dispatcher)
        yield reference, split, dispatcher
        dispatcher.client.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_tokens_are_equal(family: str, tmp_path: Path, probed: Mechanism) -> None:
    with _deployed(family, torch.float32, tmp_path, probed) as (reference, split, dispatcher):
        assert (logits(split) - logits(reference)).abs().max() < 1e-4
        sent = dispatcher.take()
        assert {i.function for i in sent} == {layer.function for layer in dispatcher.remote.values()}
        assert torch.equal(greedy(split), greedy(reference))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_within_a_rounding_step(family: str, tmp_path: Path, probed: Mechanism) -> None:
    with _deployed(family, torch.bfloat16, tmp_path, probed) as (reference, split, _):
        ours, theirs = logits(split), logits(reference)
        clear = clear_steps(theirs)
        assert clear.float().mean() > 0.5
        assert torch.equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])


def test_zeroed_answers_are_noticed(tmp_path: Path, probed: Mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the tests above fail when what the workers answer does not count."""
    with _deployed("mixtral", torch.float32, tmp_path, probed) as (reference, split, _):
        monkeypatch.setattr(dispatch, "from_storage", lambda array, dtype: torch.zeros(array.shape, dtype=dtype))
        assert (logits(split) - logits(reference)).abs().max() > 0.01
        assert not torch.equal(greedy(split), greedy(reference))


def test_one_invocation_a_layer_and_token(tmp_path: Path, probed: Mechanism) -> None:
    with _deployed("mixtral", torch.float32, tmp_path, probed) as (_, split, dispatcher):
        with torch.inference_mode():
            split(input_ids=torch.tensor([[5]]))
        assert len(dispatcher.take()) <= len(dispatcher.remote)

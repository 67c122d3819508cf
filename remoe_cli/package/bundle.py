"""The bundle: code and experts of one plan's functions in a folder, reproducible byte for byte.

manifest.json              a Manifest; it names every other file by its sha256
function.zip               the code of remoe_cli/function, the same for every plan
layer-NNN.safetensors      the remote experts of hidden layer NNN,
layer-NNN-P.safetensors    or those of its function P, from 0, where the layer has several functions
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field

from remoe_cli import artifacts, function, owned
from remoe_cli.errors import ArtifactError, ModelError
from remoe_cli.function.weights import Head, read_head
from remoe_cli.model.checkpoint import find_profiled
from remoe_cli.model.spec import MoeSpec
from remoe_cli.plan.document import Plan, Source
from remoe_cli.profile.record import ModelRef, Profile

HANDLER = "function.handler.handle"
_CODE = "function.zip"


class FunctionEntry(artifacts.Part):
    """One expert function, which holds `experts` of hidden layer `layer`.

    replicas                   instances of it that may run at once
    timeout_s                  after which the platform ends a call
    form                       in which it computes its experts: `ready` or `packed` (function/ready.py)
    head_bytes, head_sha256    of its shard's head (function/weights.py)
    """

    name: artifacts.FileName
    layer: artifacts.LayerIndex
    experts: artifacts.Experts
    memory_mb: artifacts.Megabytes
    replicas: artifacts.Replicas
    timeout_s: artifacts.Tokens
    shard: artifacts.FileName
    shard_sha256: str
    shard_bytes: artifacts.Bytes
    head_bytes: artifacts.Bytes
    head_sha256: str
    form: Literal["ready", "packed"] = Field(default="ready", exclude_if=lambda form: form == "ready")


class Manifest(artifacts.Document):
    schema_version: str = "remoe.bundle/3"
    plan: Source
    model: ModelRef
    spec: MoeSpec
    code_sha256: str
    functions: tuple[FunctionEntry, ...]

    @property
    def remote(self) -> dict[int, tuple[int, ...]]:
        """Map hidden layer -> remote experts, ascending, whichever function of the layer holds them."""
        experts: dict[int, tuple[int, ...]] = {}
        for f in self.functions:
            experts[f.layer] = tuple(sorted((*experts.get(f.layer, ()), *f.experts)))
        return experts


def function_sources(machine: str | None = None) -> list[Path]:
    """List the files of the function's code, by name: for one kind of processor, or for all."""
    folder = Path(function.__file__).parent
    return sorted((*folder.glob("*.py"), *folder.glob(f"*-{machine or '*'}.so")))


def expert_form(form: str) -> dict[str, str]:
    """Return the environment that tells a function in which form it computes; `ready` needs none."""
    return {} if form == "ready" else {"REMOE_EXPERTS": form}


def function_zip() -> bytes:
    """Zip the function's code. The bytes depend on nothing but the code: names are sorted, times fixed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for source in function_sources():
            info = zipfile.ZipInfo(f"function/{source.name}", date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, source.read_bytes())
    return buffer.getvalue()


def build(
    plan: Plan, plan_path: Path, profile: Profile, folder: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> Manifest:
    """Write the bundle of `plan` into the empty folder `folder`.

    `progress` is called with the functions done and their total.

    Raises: ArtifactError when the model has changed since it was profiled, ModelError when its chat template cannot be used or its experts
    do not have the plan's form, UsageError for a folder that is not empty.
    """
    reference = profile.record.model
    checkpoint = find_profiled(reference.path, reference.revision)
    from remoe_cli.model.quantise import BY_NAME
    from remoe_cli.model.shards import write_shards
    from remoe_cli.model.tokens import check_chat_template

    check_chat_template(checkpoint)
    owned.require_empty(folder)
    layers = {layer.layer: layer for layer in plan.layers}
    parts = {number: layer.parts for number, layer in layers.items()}
    code = function_zip()
    (folder / _CODE).write_bytes(code)
    entries = []
    spec = profile.record.spec
    to = None if spec.remote is None else BY_NAME[spec.remote.form]
    for shard in write_shards(checkpoint, parts, spec.expert_bytes, folder, to):
        layer, head = layers[shard.layer], read_head(shard.path)
        if plan.model.packed and (reason := Head.parse(head).packed_refusal()) is not None:
            raise ModelError(
                f"The plan's functions compute from the stored bytes of experts, which layer {shard.layer} does not allow: {reason}.",
                "Keep all experts local, and report the checkpoint.",
            )
        entries.append(
            FunctionEntry(
                name=shard.path.stem,
                layer=shard.layer,
                experts=shard.experts,
                memory_mb=layer.memory_mb,
                replicas=layer.replicas,
                timeout_s=layer.timeout_s,
                shard=shard.path.name,
                shard_sha256=artifacts.sha256_file(shard.path),
                shard_bytes=shard.path.stat().st_size,
                head_bytes=len(head),
                head_sha256=artifacts.sha256_bytes(head),
                form="packed" if plan.model.packed else "ready",
            )
        )
        progress(len(entries), sum(map(len, parts.values())))
    checkpoint.check(reference.revision)
    manifest = Manifest(
        plan=Source(path=str(plan_path), sha256=artifacts.sha256_file(plan_path)),
        model=reference,
        spec=spec,
        code_sha256=artifacts.sha256_bytes(code),
        functions=tuple(entries),
    )
    artifacts.write_json(folder / "manifest.json", manifest)
    return manifest


def files(folder: Path) -> list[str]:
    """List the names of the files of a bundle that is there already; none where there is no manifest."""
    try:
        return ["manifest.json", _CODE, *(f.shard for f in artifacts.read_json(folder / "manifest.json", Manifest).functions)]
    except ArtifactError:
        return []


def read(folder: Path) -> Manifest:
    """Read a bundle and check every file against its digest.

    Raises: ArtifactError for the first file that differs.
    """
    manifest = artifacts.read_json(folder / "manifest.json", Manifest)
    expected = {_CODE: manifest.code_sha256} | {f.shard: f.shard_sha256 for f in manifest.functions}
    for name, digest in expected.items():
        if not (folder / name).is_file() or artifacts.sha256_file(folder / name) != digest:
            raise ArtifactError(f"{folder / name} is missing or is not the file that the manifest names.", "Deploy the plan again.")
    return manifest


def unpack_code(folder: Path) -> Path:
    """Unpack function.zip beside the manifest; return the folder for PYTHONPATH."""
    code = folder / "code"
    with zipfile.ZipFile(folder / _CODE) as archive:
        archive.extractall(code)
    return code

"""The function as AWS runs it. Its zip: the same bytes each time, with nothing in it that no function reads. On the twin: from that zip
alone, by another Python, its shard over HTTP from a bucket that checks signatures and permissions."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import httpx
import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from remoe_cli.artifacts import sha256_file
from remoe_cli.cages import Mechanism
from remoe_cli.errors import ArtifactError, InvokeError, UsageError
from remoe_cli.function.codec import Batch, from_wire, pack, to_wire, unpack
from remoe_cli.function.expert_ffn import Expert, FfnSpec, narrow
from remoe_cli.function.weights import Head, ShardFile, read_head
from remoe_cli.model.checkpoint import find
from remoe_cli.model.demo import demo_model
from remoe_cli.model.experts import ExpertLayer, attach, expert_layers
from remoe_cli.model.loader import load
from remoe_cli.model.shards import write_shard, write_shards
from remoe_cli.model.tokens import encode, load_tokenizer
from remoe_cli.package import dependencies
from remoe_cli.package.bundle import function_sources
from remoe_cli.package.dependencies import RUNTIMES, FunctionPackage, function_package
from remoe_cli.package.elf import stripped
from remoe_cli.runtime.dispatch import Dispatcher
from remoe_cli.runtime.invoke import invoke, make_client
from remoe_cli.runtime.remote_function import RemoteFunction
from tests.support.families import HIDDEN_SIZE, build
from tests.support.shards import shard_environment
from tests.support.twin import run_twin
from tests.support.zipped import ARCHITECTURE, Zipped, make

LIMIT_BYTES = 60 << 20
_MACHINES = {"x86_64": 62, "arm64": 183}  # e_machine
MACHINE = {"x86_64": "x86_64", "arm64": "aarch64"}[ARCHITECTURE]
BUCKET, PREFIX = "remoe-t-000000000000-us-east-1", "functions/layer-000"
ROWS = np.random.default_rng(0).standard_normal((3, HIDDEN_SIZE), dtype=np.float32)


def frame(*experts: int) -> bytes:
    """Three rows for each expert."""
    data = narrow(np.concatenate([ROWS] * len(experts)), "bfloat16")
    return pack(Batch("bfloat16", experts, (3,) * len(experts), data))


def expected(shard: ShardFile, *experts: int) -> np.ndarray[Any, Any]:
    """What the function's code answers in this process, from disk."""
    rows, spec = narrow(ROWS, "bfloat16"), FfnSpec(**shard.head.ffn)
    return np.concatenate([Expert.of(shard.tensors(e), spec).run(rows) for e in experts])


@pytest.fixture(scope="module")
def zipped(tmp_path_factory: pytest.TempPathFactory) -> Zipped:
    return make(tmp_path_factory.mktemp("zipped"))


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shard") / "layer-000.safetensors"
    write_shard(path, expert_layers(build("mixtral", torch.bfloat16))[0], range(8))
    return path


class Bucket:
    """moto's S3, over HTTP. From `enforce` on it checks every request's signature, and that the function's user may make it."""

    def __init__(self) -> None:
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        self.url = "http://{}:{}".format(*self.server.get_host_and_port())
        self.s3, self._iam = (
            boto3.client(service, endpoint_url=self.url, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
            for service in ("s3", "iam")
        )
        self.s3.create_bucket(Bucket=BUCKET)
        self._iam.create_user(UserName="function")
        allowed = {"Effect": "Allow", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{BUCKET}/{PREFIX}/*"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
        self._iam.put_user_policy(UserName="function", PolicyName="shard", PolicyDocument=document)
        key = self._iam.create_access_key(UserName="function")["AccessKey"]
        self.keys = {
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
            "AWS_ENDPOINT_URL_S3": self.url,
        }

    def put(self, data: bytes, key: str = "") -> str:
        """Under the function's prefix, unless `key` is another."""
        key = key or f"{PREFIX}/{hashlib.sha256(data).hexdigest()}.safetensors"
        self.s3.put_object(Bucket=BUCKET, Key=key, Body=data)
        return key

    def enforce(self, actions: str = "0") -> None:
        httpx.post(f"{self.url}/moto-api/reset-auth", content=actions).raise_for_status()

    def close(self) -> None:
        self.enforce("inf")
        httpx.post(f"{self.url}/moto-api/reset").raise_for_status()
        for client in (self.s3, self._iam):
            client.close()
        self.server.stop()

    def environment(self, key: str, head: bytes, **more: str) -> dict[str, str]:
        header = f"{len(head)}:{hashlib.sha256(head).hexdigest()}"
        own = self.keys | {"AWS_ENDPOINT_URL_S3": self.url}
        return own | {"REMOE_SHARD": f"s3://{BUCKET}/{key}", "REMOE_SHARD_HEADER": header} | more


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    made = Bucket()
    yield made
    made.close()


def test_two_builds_are_the_same_bytes(zipped: Zipped, tmp_path: Path, measured: Callable[[str], None]) -> None:
    again = tmp_path / "elsewhere" / "again.zip"
    dependencies.build(again, ARCHITECTURE, zipped.python, zipped.interpreter)
    assert sha256_file(again) == sha256_file(zipped.zip)
    made = FunctionPackage.of(again)
    assert made.compiled and made.zipped_bytes < LIMIT_BYTES and made.unpacked_bytes < LIMIT_BYTES
    largest = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in made.largest[:4])
    measured(f"{ARCHITECTURE}: {made.zipped_bytes / 1e6:.1f} MB zipped, {made.unpacked_bytes / 1e6:.1f} MB unpacked ({largest})")


def test_it_holds_what_a_function_reads_with_its_licences(zipped: Zipped) -> None:
    with zipfile.ZipFile(zipped.zip) as archive:
        infos = archive.infolist()
        sources = {path: archive.read(f"function/{path.name}") for path in function_sources(MACHINE)}
    names = [info.filename for info in infos]
    assert names == sorted(names)
    assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)} and {info.external_attr >> 16 for info in infos} == {0o644}
    assert sources == {path: path.read_bytes() for path in function_sources(MACHINE)}
    libraries = [name for name in names if name.startswith("function/") and name.endswith(".so")]
    assert libraries == [f"function/packed-{MACHINE}.so", *(["function/products-x86_64.so"] if MACHINE == "x86_64" else [])]
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "function", "numpy", "numpy.libs", "numkong", "numkong.libs", "pybase64"
    }  # fmt: skip
    for package in ("numpy", "numkong", "pybase64"):
        assert any(name.startswith(f"{package}-") and "/licenses/" in name for name in names)
        assert any(name.startswith(f"{package}-") and name.endswith("/METADATA") for name in names)
    assert not [name for name in names if "/tests/" in name or name.endswith((".pyi", ".h", ".a", "RECORD"))]
    compiled = {name.replace("__pycache__/", "").split(".")[0] for name in names if name.endswith(".pyc")}
    assert compiled == {name.split(".")[0] for name in names if name.endswith(".py")}


def _machines(path: Path) -> set[int]:
    with zipfile.ZipFile(path) as archive:
        libraries = [archive.read(name) for name in archive.namelist() if ".so" in name]
    assert len(libraries) > 10
    return {struct.unpack_from("<H", library, 18)[0] for library in libraries}


def test_its_digest_is_the_same_on_machines_whose_bytecode_and_zlib_differ(zipped: Zipped, tmp_path: Path) -> None:
    """Another machine's zip: other bytecode in one file, none for another, and not compressed alike."""
    here, there, changed = FunctionPackage.of(zipped.zip), tmp_path / "there.zip", tmp_path / "changed.zip"
    with zipfile.ZipFile(zipped.zip) as archive:
        small = [info for info in archive.infolist() if info.filename.startswith(("function/", "pybase64/"))]
        files = {info.filename: archive.read(info) for info in small}
    compiled = sorted(name for name in files if name.endswith(".pyc"))
    theirs = files | {compiled[0]: b"other bytecode"}
    del theirs[compiled[1]]
    handler = {"function/handler.py": files["function/handler.py"] + b"#"}
    ours = tmp_path / "ours.zip"
    for path, packed, way in ((ours, files, zipfile.ZIP_DEFLATED), (there, theirs, zipfile.ZIP_STORED), (changed, files | handler, 8)):
        with zipfile.ZipFile(path, "w", way) as archive:
            for name, content in packed.items():
                archive.writestr(name, content)
    assert FunctionPackage.of(ours).sha256 == FunctionPackage.of(there).sha256 != FunctionPackage.of(changed).sha256
    assert sha256_file(ours) != sha256_file(there) and here.sha256 != FunctionPackage.of(ours).sha256


def test_either_architecture_is_made_here(zipped: Zipped, tmp_path: Path, measured: Callable[[str], None]) -> None:
    (other,) = {"x86_64", "arm64"} - {ARCHITECTURE}
    dependencies.build(tmp_path / "other.zip", other, zipped.python, None)
    assert _machines(tmp_path / "other.zip") == {_MACHINES[other]} and _machines(zipped.zip) == {_MACHINES[ARCHITECTURE]}
    made = FunctionPackage.of(tmp_path / "other.zip")
    assert not made.compiled and made.unpacked_bytes < LIMIT_BYTES
    measured(f"{other}, without bytecode: {made.zipped_bytes / 1e6:.1f} MB zipped, {made.unpacked_bytes / 1e6:.1f} MB unpacked")


def test_it_is_made_once_for_the_same_inputs(zipped: Zipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str]] = []

    def copied(path: Path, architecture: str, python: str, interpreter: object) -> None:
        made.append((architecture, python))
        path.parent.mkdir(exist_ok=True, parents=True)
        shutil.copyfile(zipped.zip, path)

    monkeypatch.setenv("REMOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(dependencies, "build", copied)
    monkeypatch.setattr(dependencies, "find_interpreter", lambda python: zipped.interpreter)
    first = function_package("arm64")
    assert function_package("arm64") == first
    function_package("x86_64")
    function_package("arm64", "3.14")
    changed = tmp_path / "changed.py"
    changed.write_text("# other code")
    monkeypatch.setattr(dependencies, "function_sources", lambda machine: [changed])
    function_package("arm64")
    assert made == [("arm64", "3.13"), ("x86_64", "3.13"), ("arm64", "3.14"), ("arm64", "3.13")]
    assert first.sha256 == FunctionPackage.of(zipped.zip).sha256


def test_without_the_functions_python_nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependencies, "find_interpreter", lambda python: None)
    with pytest.raises(UsageError, match=r"no Python 3\.13 on this machine") as raised:
        function_package("arm64")
    assert "uv python install 3.13" in raised.value.hint


@pytest.mark.parametrize(
    ("architecture", "python", "message"),
    [("riscv64", "3.13", "no architecture 'riscv64'"), ("arm64", "3.11", "do not run on Lambda's Python 3.11")],
)
def test_what_lambda_does_not_run_is_refused(architecture: str, python: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        function_package(architecture, python)
    assert "arm64" in raised.value.hint or all(version in raised.value.hint for version in RUNTIMES)


def test_without_an_index_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a pip that may look into one empty folder only."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        ArtifactError, match=r"pip cannot fetch .* for Python 3.13 on arm64: No matching distribution found for numpy"
    ) as raised:
        dependencies.build(tmp_path / "x.zip", "arm64", "3.13", None)
    assert "numkong" in raised.value.hint
    assert not list(tmp_path.iterdir())


def test_only_libraries_are_stripped() -> None:
    assert stripped(b"import numpy\n") == b"import numpy\n"
    assert stripped(b"\x7fELF\x01\x01" + bytes(60)) == b"\x7fELF\x01\x01" + bytes(60)  # 32 bits


STANDARD = """
from awslambdaric.lambda_runtime_client import LambdaRuntimeClient
from function.handler import handle
del LambdaRuntimeClient.marshaller  # as in a runtime that knows no other codec than its own
"""


def test_from_its_zip_and_s3_alone_it_answers_bit_for_bit_as_from_disk(
    zipped: Zipped, shard: Path, bucket: Bucket, tmp_path: Path, probed: Mechanism, measured: Callable[[str], None]
) -> None:
    head = read_head(shard)
    from_s3 = bucket.environment(bucket.put(shard.read_bytes()), head)
    bucket.enforce()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "standard.py").write_text(STANDARD)
    functions = [
        zipped.function("s3", from_s3),
        zipped.function("disk", shard_environment(shard)),
        zipped.function("standard", from_s3 | {"PYTHONPATH": str(tmp_path / "more")}, handler="standard.handle"),
    ]
    before = {path: path.stat().st_mtime_ns for path in zipped.root.rglob("*")}
    wanted = expected(ShardFile(shard), 1, 3, 4)
    times: dict[str, list[float]] = {"s3": [], "disk": []}
    with run_twin(functions, tmp_path / "logs", probed, idle_ttl_s=0.2) as twin:
        for name in ("s3", "disk", "disk", "s3"):
            start = time.perf_counter()
            answer = twin.raw(to_wire(frame(1, 3, 4)), name)
            times[name].append(time.perf_counter() - start)
            assert "FunctionError" not in answer, answer["body"]
            assert np.array_equal(unpack(from_wire(answer["body"])).data, wanted)
            health = twin.call({"health": True}, name=name)
            assert ("hmac" in health["modules"]) == (name == "s3")  # what is on disk needs no client of S3
            while any(f["instances"] for f in twin.status()["functions"]):
                time.sleep(0.02)
        assert health["experts"] == list(range(8)) and health["experts_ready"] == [1, 3, 4]
        assert {"numpy", "numkong", "awslambdaric", "function"} <= set(health["modules"])
        assert {"remoe_cli", "torch", "boto3", "botocore", "pydantic", "site"}.isdisjoint(health["modules"])
        standard = twin.raw(to_wire(frame(1, 3, 4)), "standard")
        assert np.array_equal(unpack(from_wire(standard["body"])).data, wanted)
        assert twin.call({"health": True}, name="standard")["experts_ready"] == [1, 3, 4]
    assert {path: path.stat().st_mtime_ns for path in zipped.root.rglob("*")} == before
    s3_s, disk_s = (min(times[name]) for name in ("s3", "disk"))
    measured(f"zip on Python {zipped.python}, cold start to first result: {s3_s * 1000:.0f} ms from S3, {disk_s * 1000:.0f} ms from disk")
    assert s3_s - disk_s < 1


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_what_is_wrong_with_a_shard_is_named_and_nothing_else_is_answered(
    zipped: Zipped, shard: Path, bucket: Bucket, tmp_path: Path, probed: Mechanism
) -> None:
    bucket.enforce("inf")
    data, head = shard.read_bytes(), read_head(shard)
    first, last = Head.parse(head).range(4)
    good = bucket.put(data)
    wrong: dict[str, tuple[dict[str, str], str, str]] = {
        "head": (
            bucket.environment(bucket.put(data[: len(head) - 1] + b"\n" + data[len(head) :]), head),
            "ShardDigestError",
            "head of s3://",
        ),
        "expert": (bucket.environment(bucket.put(_flipped(data, (first + last) // 2)), head), "ShardDigestError", "expert 4 of s3://"),
        "short": (bucket.environment(bucket.put(data[:-1]), head), "ShardTruncatedError", f"has {len(data) - 1} bytes"),
        "gone": (bucket.environment(f"{PREFIX}/0.safetensors", head), "ShardMissingError", "S3 answers 404 NoSuchKey"),
        "denied": (bucket.environment(bucket.put(data, "functions/layer-001/x"), head), "ShardDeniedError", "403 AccessDenied"),
        "stranger": (bucket.environment(good, head, AWS_SECRET_ACCESS_KEY="x"), "ShardDeniedError", "403 SignatureDoesNotMatch"),
        "nobody": (bucket.environment(good, head, AWS_ENDPOINT_URL_S3="http://127.0.0.1:9"), "ShardUnreachableError", "in 3 tries"),
        "memory": (bucket.environment(good, head, AWS_LAMBDA_FUNCTION_MEMORY_SIZE="32"), "FunctionMemoryError", "an expert takes 0.0 MB"),
        "storage": (bucket.environment(good, head, TMPDIR="/proc"), "FunctionStorageError", "has room for 0"),
    }
    bucket.enforce()
    functions = [zipped.function(name, environment) for name, (environment, _, _) in wrong.items()]
    with run_twin(functions, tmp_path / "logs", probed) as twin:
        for name, (_, kind, message) in wrong.items():
            answer = twin.raw(to_wire(frame(3, 4)), name)
            error = json.loads(answer["body"])
            assert answer["FunctionError"] == "Unhandled"
            assert (error["errorType"], message in error["errorMessage"]) == (kind, True), error
        again = twin.raw(to_wire(frame(1, 3)), "expert")  # what is sound in that shard is served
        assert np.array_equal(unpack(from_wire(again["body"])).data, expected(ShardFile(shard), 1, 3))
        client = make_client(twin.endpoint, 1, 20)
        with pytest.raises(InvokeError, match=r"function expert failed: ShardDigestError: expert 4 of s3://.* is not the one") as raised:
            invoke(client, "expert", frame(4))
        assert "deploy the plan again" in raised.value.hint
        client.close()
    logs = "".join(path.read_text() for path in (tmp_path / "logs").rglob("*.log"))
    assert "ShardDeniedError" in logs and bucket.keys["AWS_SECRET_ACCESS_KEY"] not in logs


def test_the_demo_model_with_experts_in_s3_gives_the_same_tokens(zipped: Zipped, bucket: Bucket, tmp_path: Path, probed: Mechanism) -> None:
    """Half of the experts of every eighth layer."""
    bucket.enforce("inf")
    checkpoint = find(str(demo_model("float32")))
    reference = AutoModelForCausalLM.from_pretrained(checkpoint.path, experts_implementation="eager")
    everywhere = {x.layer: tuple(range(x.experts)) for x in expert_layers(reference)}
    local_ids = {layer: experts if layer % 8 else experts[::2] for layer, experts in everywhere.items()}
    leave = {layer: (everywhere[layer][1::2],) for layer in everywhere if local_ids[layer] != everywhere[layer]}
    shards = list(write_shards(checkpoint, leave, 1, tmp_path / "bundle"))
    functions = [zipped.function(x.path.stem, bucket.environment(bucket.put(x.path.read_bytes()), read_head(x.path))) for x in shards]
    bucket.enforce()
    with run_twin(functions, tmp_path / "logs", probed) as twin, ThreadPoolExecutor(1) as pool:
        split = load(checkpoint, local_ids)
        dispatcher = Dispatcher(
            client=make_client(twin.endpoint, 1, 20),
            local={layer: {e: row for row, e in enumerate(experts)} for layer, experts in local_ids.items()},
            remote={x.layer: [RemoteFunction(x.path.stem, x.experts, 1, 0.0)] for x in shards},
            pool=pool,
        )
        attach(split, dispatcher)
        prompt = torch.tensor([encode(load_tokenizer(checkpoint), "The capital of France is")])
        ours, theirs = (model.generate(prompt, max_new_tokens=12, do_sample=False) for model in (split, reference))
        assert torch.equal(ours, theirs)
        assert {call.function for call in dispatcher.take()} == {x.path.stem for x in shards} and len(shards) == 4
        dispatcher.client.close()


def test_more_experts_than_memory_holds_take_turns(zipped: Zipped, tmp_path: Path, probed: Mechanism) -> None:
    """8 experts of 14 MB in a function of 128 MB."""
    config = MixtralConfig(hidden_size=1024, intermediate_size=2304, num_local_experts=8)
    module = MixtralExperts(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        one = torch.randn(parameter.shape[1:], generator=generator) / 64
        parameter.data = torch.stack([(one * (1 + expert / 8)).to(torch.bfloat16) for expert in range(8)])
    path = tmp_path / "layer-000.safetensors"
    write_shard(path, ExpertLayer(0, "experts", module, 8), range(8))
    shard, rows = ShardFile(path), narrow(np.tile(ROWS, 16), "bfloat16")
    assert sum(map(shard.head.expert_bytes, shard.experts)) > 105 << 20
    with run_twin([zipped.function("f", shard_environment(path), memory_mb=128)], tmp_path / "logs", probed) as twin:
        for expert in (*range(8), 0, 7):
            answer = twin.raw(to_wire(pack(Batch("bfloat16", (expert,), (3,), rows))))
            assert "FunctionError" not in answer, answer["body"]
            wanted = Expert.of(shard.tensors(expert), FfnSpec(**shard.head.ffn)).run(rows)
            assert np.array_equal(unpack(from_wire(answer["body"])).data, wanted)
        ready = twin.call({"health": True})["experts_ready"]
    assert {0, 7} <= set(ready) and ready == [0, *range(9 - len(ready), 8)] and 4 <= len(ready) < 8

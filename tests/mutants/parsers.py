"""Every parser of remoe with inputs that it takes: what mutants are made of.

A parser takes bytes and returns, or raises a RemoeError; those of the expert function raise errors of their own.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random

import numpy as np

from remoe_cli import artifacts, owned, recognise
from remoe_cli.deploy.local.config import ChildrenRecord, MainConfig, ProcessRef, SupervisorRecord, TwinConfig
from remoe_cli.digests import Remembered
from remoe_cli.errors import RemoeError, UsageError
from remoe_cli.function import codec, weights
from remoe_cli.function.errors import WeightsError
from remoe_cli.model import checkpoint, stored
from remoe_cli.model.checkpoint import HeldExperts
from remoe_cli.model.tokens import load_tokenizer
from remoe_cli.package.bundle import Manifest
from remoe_cli.package.partial_checkpoint import MainFile, MainManifest
from remoe_cli.plan.catalog.catalog import catalog_text, read_catalog
from remoe_cli.plan.cost.prices import MainPrices, function_prices
from remoe_cli.plan.document import Source, read_plan
from remoe_cli.plan.problem.trace_traffic import read_traffic
from remoe_cli.plan.solve.given import read_placement
from remoe_cli.predict import ridge, train, tree
from remoe_cli.profile.hardware import read_hardware
from remoe_cli.profile.imports.importer import import_routing
from remoe_cli.profile.prompts import read_prompts
from remoe_cli.profile.record import ModelRef, read_profile
from remoe_cli.report.inputs import read_inputs
from remoe_cli.runtime import client
from remoe_cli.runtime.kept import Book, Ended
from remoe_cli.runtime.main_function import parse as parse_request
from remoe_cli.runtime.observed import Observed
from remoe_cli.runtime.receipt import Prices, failed_receipt
from tests.mutants import mutate
from tests.mutants.parser import Parse, Parser
from tests.mutants.servers import servers_parsers
from tests.support import routing_files
from tests.support.api_server import whole_model
from tests.support.by_hand import by_hand
from tests.support.chatml import save_chatml
from tests.support.damage import checked
from tests.support.families import FAMILIES
from tests.support.synthetic import plan_of, problem_of, synthetic_profile, tiny_catalog
from tests.support.topical import topical

MAIN_PRICES = MainPrices(rented=False, usd_per_s=1e-5, usd_per_request=0.0, usd_per_read=0.0)


def at(path: Path, read: Callable[[Path], object]) -> Parse:
    """A reader of a path as a parser of bytes."""

    def parse(data: bytes) -> object:
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        return read(path)

    return parse


def rezipped(data: bytes, random: Random) -> bytes:
    """A zip in which one member is changed, and all checksums are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = random.choice(old.namelist())
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, random.choice(mutate.BYTES)(content, random) if entry.filename == chosen and content else content)
    return out.getvalue()


def reheaded(data: bytes, random: Random) -> bytes:
    """A safetensors file whose head is changed, and has the right length."""
    length = int.from_bytes(data[:8], "little")
    head = random.choice(mutate.JSON)(data[8 : 8 + length].rstrip(), random)
    return len(head).to_bytes(8, "little") + head + data[8 + length :]


def repacked(data: bytes, random: Random) -> bytes:
    """Text that is changed and then compressed."""
    return gzip.compress(random.choice(mutate.TEXT)(gzip.decompress(data), random), 1)


def wire(body: bytes) -> object:
    frame = codec.from_wire(body)
    with suppress(codec.FrameError):
        codec.unpack(frame)
    return codec.unpack(checked(frame))  # what its check lets through


def answered(lines: bytes) -> object:
    """What a client makes of a main function's lines."""
    events = map(client._event, client._lines([lines[:7], lines[7:]]))
    original = client._events
    client._events = lambda endpoint, request: events  # type: ignore[assignment, return-value]
    try:
        return client.answer(client.Http("http://x"), "prompt", 3, lambda text: None)
    except ValueError as error:
        raise UsageError(f"{error}".partition("\n")[0]) from None  # as _http does with its stream
    finally:
        client._events = original


def with_arrays(folder: Path) -> Callable[[bytes], object]:
    """A profile whose arrays are these, and whose document names their digest; its predictor is read over it."""

    def parse(data: bytes) -> object:
        (folder / "arrays.safetensors").write_bytes(data)
        record = json.loads((folder / "profile.json").read_text())
        record["arrays_sha256"] = artifacts.sha256_bytes(data)
        (folder / "profile.json").write_text(json.dumps(record))
        return read_profile(folder)

    return parse


def predictor(file: Path) -> Callable[[bytes], object]:
    """A stored predictor, which is restored and asked."""
    history = topical(12)
    stored = {"tree": tree.build(history.prompts.vectors), "ridge": ridge.fit(history, 0)}
    arrays = {f"{prefix}.{name}": array for prefix, made in stored.items() for name, array in made.to_arrays().items()}
    artifacts.write_arrays(file, arrays, "predictor")

    def read(path: Path) -> object:
        restored = train.restored(artifacts.read_arrays(path), history)
        return restored["ridge"]().predict(history.prompts), restored["SPS"]().predict(history.prompts)

    return at(file, read)


def model(folder: Path) -> Callable[[bytes], object]:
    from remoe_cli.model.loader import read_config

    return at(folder / "config.json", lambda path: read_config(checkpoint.find(str(path.parent))))


def quantised(folder: Path) -> Callable[[bytes], object]:
    """The quantisation that stands beside a configuration: how much it takes, and whether it is served."""
    folder.mkdir()

    def read(path: Path) -> object:
        settings = stored.quantisation(path.parent)
        return settings and (stored.bits_per_weight(settings), stored.refuse_format(settings))

    return at(folder / "hf_quant_config.json", read)


def tokenizer(path: Path) -> object:
    """The tokenizer of the folder that the file is in."""
    return load_tokenizer(checkpoint.find(str(path.parent)))


DOCUMENTS: tuple[artifacts.Document, ...] = (
    HeldExperts(experts={0: (0, 1)}),
    MainManifest(files=(MainFile(name="a", bytes=1, sha256="0" * 64),)),
    TwinConfig(name="a", functions=(), python="python", main=MainConfig(argv=["a"])),
    SupervisorRecord(process=ProcessRef(pid=1, start_time="1"), endpoint="http://127.0.0.1:1", groups=()),
    ChildrenRecord(children=(ProcessRef(pid=1, start_time="1"),)),
    Remembered(files={"1:2:3:4:5": "0" * 64}),
)
QUANTISATIONS = (
    b'{"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "*gate"]}}',
    b'{"quantization": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": '
    b'{"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}}, "ignore": ["re:.*gate$"]}}',
    b'{"quantization": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}',
)
TRACES = (
    b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:01:51.0,100,20\n2023-11-16 18:01:52.5,300,1\n",
    b'{"timestamp": 0, "input_length": 5, "output_length": 3, "hash_ids": [1]}\n'
    b'{"timestamp": 900, "input_length": 6, "output_length": 2}\n',
    b'[{"usage": {"prompt_tokens": 3, "completion_tokens": 4}, "created": 1700000000}, '
    b'{"usage": {"prompt_tokens": 3, "completion_tokens": 9}, "created": 1700000100}]',
    b'{"data": [{"n_in": 1, "n_out": 2, "weight": 3}]}',
    b'{"input_lens": [1, 2], "output_lens": [3, 4], "start_times": [0.5, 7]}',
)
RECEIPT = b'{"prompt_tokens": 5, "generated_tokens": 4, "ttft_s": 0.2, "tpot_s": null, "total_s": 0.4, "cost": {"total_usd": 2e-6}}'
RECEIPTS = (b'{"text": "x", "receipt": ' + RECEIPT + b'}\n{"error": {"kind": "Invoke", "message": "m"}}\n' + RECEIPT, b"[" + RECEIPT + b"]")
PROMPTS = {
    "a.jsonl": b'{"prompt": "Hi", "n_prompt_tokens": 3}\n{"prompt": "There", "n_prompt_tokens": 4}\n',
    "b.jsonl": b'{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "tools": [{"type": "function"}]}\n',
    "c.json": b'[{"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}]',
    "d.jsonl": b'{"custom_id": "1", "body": {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}}\n',
    "e.csv": b'prompt,other\n"a ""quoted"" one",1\nb,2\n',
    "f.txt": "one\nzwei ä\n".encode(),
    "g.jsonl": b'{"instruction": "a", "input": "b", "history": [["q", "a"]]}\n',
    "h.json": b'[[{"role": "user", "content": "u"}], [{"role": "user", "content": "v"}]]',
}


def all_parsers(folder: Path) -> dict[str, Parser]:
    """Make the valid inputs in `folder`, and return every parser by name."""
    catalog = tiny_catalog()
    profile = synthetic_profile(folder / "profile", prompts=12, hidden_size=8)
    planned = synthetic_profile(folder / "planned", prompts=4, hidden_size=8)
    plan = artifacts.json_text(plan_of(profile, catalog)).encode()
    problem = problem_of(planned, catalog)
    FAMILIES["olmoe"]().save_pretrained(folder / "model")
    tokens, settings = (by_hand(folder / name, ()).plan_path.with_name("model") for name in ("tokens", "settings"))
    formats = routing_files.every_format(folder / "routing", routing_files.make_ids())
    routing: dict[str, bytes] = {name: file.read_bytes() for name, file in formats.items()}
    shard = json.dumps(
        {
            "__metadata__": {"ffn": json.dumps({"dtype": "float32"}), "sha256": json.dumps({"0": "a" * 64})},
            "00000.up": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        }
    ).encode()
    frame = codec.to_wire(codec.pack(codec.Batch("float32", (3, 7), (1, 2), np.zeros((3, 4), dtype="<f4"))))
    source = Source(path="plan.json", sha256=artifacts.sha256_bytes(plan))
    bundle = Manifest(plan=source, model=ModelRef(path="m", revision="r"), spec=profile.record.spec, code_sha256="0", functions=())
    answer = {"text": "x", "receipt": {"prompt_tokens": 3, "generated_tokens": 2}, "token_ids": [1]}
    lines = b'{"text": "x"}\n' + json.dumps({"answer": answer}).encode() + b"\n"
    failed = b'{"error": {"kind": "Model", "message": "The model failed.", "hint": "h"}}\n'
    requests = (
        b'{"prompt": "a", "max_new_tokens": 5, "stream": true}',
        b'{"messages": [{"role": "user", "content": "u"}], "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}',
    )
    (folder / "kept").mkdir()
    book = Book(folder / "valid")
    prices = Prices(catalog="c", main=MAIN_PRICES, function=function_prices(catalog))
    seen = Observed(revision="r", prefill=((1, 2),), decode=((0, 1),), tokens=((0.1, ((9, 0.1, 0.1, 0.1),)),), cold=((0.1, 0.2, 0.3),))
    for _ in range(2):
        book.keep(Ended("answered", failed_receipt(prices, 0.5, ()), "user", seen))
    kept = [(folder / "valid" / f"{name}.jsonl").read_bytes() for name in ("receipts", "observations")]
    index = b'{"metadata": {"total_size": 5}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    parsers: dict[str, Parser] = {
        "plan": Parser(at(folder / "plan.json", read_plan), (plan,), mutate.JSON),
        "placement": Parser(at(folder / "given.json", lambda path: read_placement(path, problem)), (plan,), mutate.JSON),
        "profile": Parser(
            at(folder / "profile/profile.json", lambda path: read_profile(path.parent)),
            ((folder / "profile/profile.json").read_bytes(),),
            mutate.JSON,
        ),
        "profile's arrays": Parser(
            with_arrays(folder / "planned"), ((folder / "planned/arrays.safetensors").read_bytes(),), (*mutate.BYTES, reheaded), 0.5
        ),
        "predictor": Parser(predictor(folder / "predictor"), ((folder / "predictor").read_bytes(),), (*mutate.BYTES, reheaded), 0.3),
        "receipts": Parser(at(folder / "answers.jsonl", lambda path: read_inputs([path])), RECEIPTS, mutate.JSON),
        "catalog": Parser(
            at(folder / "my.toml", lambda path: read_catalog(str(path))), (catalog_text("local").encode(),), mutate.TEXT, 0.3
        ),
        "hardware": Parser(
            at(folder / "my-hardware.toml", lambda path: read_hardware(str(path))),
            ((Path(read_hardware.__code__.co_filename).parent / "hardware/g5.xlarge.toml").read_bytes(),),
            mutate.TEXT,
        ),
        "requests": Parser(at(folder / "trace", read_traffic), TRACES, mutate.JSON, 2),
        "requests, packed": Parser(at(folder / "trace.gz", read_traffic), tuple(map(gzip.compress, TRACES)), (*mutate.BYTES, repacked)),
        "quantisation": Parser(quantised(folder / "quantised"), QUANTISATIONS, mutate.JSON, 0.3),
        "config": Parser(model(folder / "model"), ((folder / "model/config.json").read_bytes(),), mutate.JSON, 0.3),
        "tokenizer": Parser(at(tokens / "tokenizer.json", tokenizer), ((tokens / "tokenizer.json").read_bytes(),), mutate.JSON, 0.05),
        "tokenizer's settings": Parser(
            at(settings / "tokenizer_config.json", tokenizer), ((settings / "tokenizer_config.json").read_bytes(),), mutate.JSON, 0.05
        ),
        "index": Parser(at(folder / "index.json", checkpoint._indexed), (index,), mutate.JSON),
        "shard": Parser(lambda data: weights.Head.parse(bytes(8) + data), (shard,), mutate.JSON, errors=(WeightsError,)),
        "frame": Parser(wire, (frame,), mutate.BYTES, 2, (codec.FrameError,)),
        "answer": Parser(answered, (lines, failed), mutate.JSON, 2),
        "request": Parser(parse_request, requests, mutate.JSON, 2),
        **servers_parsers(whole_model(save_chatml(folder / "chatml"))),
        "kept receipts": Parser(
            at(folder / "kept/receipts.jsonl", lambda path: list(Book(path.parent).receipts())), (kept[0],), mutate.JSON
        ),
        "observations": Parser(
            at(folder / "kept/observations.jsonl", lambda path: list(Book(path.parent).observations())), (kept[1],), mutate.JSON
        ),
        "mark": Parser(
            at(folder / "marked/.remoe", lambda path: owned.read_mark(path.parent)),
            (b'{\n "schema_version": "remoe.folder/1", "kind": "package", "files": {"a": [1, 2]}}',),
            mutate.JSON,
        ),
        "what remoe made": Parser(
            at(folder / "made", lambda path: [made.recognises(path) for made in (recognise.PICTURE, recognise.document("remoe.plan"))]),
            (plan[:3000], routing["c.safetensors"], b"\x89PNG...tEXtSoftware\0remoe"),
            mutate.JSON,
        ),
        "bundle": Parser(
            at(folder / "manifest.json", lambda path: artifacts.read_json(path, Manifest)),
            (artifacts.json_text(bundle).encode(),),
            mutate.JSON,
        ),
        **{
            document.schema_version.partition("/")[0]: Parser(
                at(folder / "document.json", partial(artifacts.read_json, kind=type(document))),
                (artifacts.json_text(document).encode(),),
                mutate.JSON,
                0.5,
            )
            for document in DOCUMENTS
        },
        **{
            f"prompts {name}": Parser(at(folder / name, lambda path: read_prompts(str(path))), (content,), mutate.JSON, 0.7)
            for name, content in PROMPTS.items()
        },
        **{
            f"routing {name}": Parser(
                at(folder / "routing.bin", lambda path: import_routing(path, routing_files.SPEC)),
                (content,),
                (*mutate.BYTES, rezipped) if name.endswith((".npz", ".pt")) else mutate.BYTES if name.endswith("s") else mutate.JSON,
                0.2 if name.endswith(".pt") else 0.5,
            )
            for name, content in routing.items()
        },
    }
    (folder / "marked").mkdir()
    return parsers


def is_one_sentence(error: Exception) -> bool:
    """Whether an error says one thing in one line."""
    message = error.message if isinstance(error, RemoeError) else str(error)
    return 0 < len(message) < 2000 and "\n" not in message

"""Prints the tables of ADR 7: how large the function's zip for AWS is, and what its cold starts take.

`make measure` runs it. It fetches wheels, and wants a Python on this machine of the version that the functions have on AWS.

A start is from the process to its first result, one row through one expert of DeepSeek-V2-Lite's size (17.3 MB), without Lambda's own
runtime client. Ways in turn, one thread. S3 is moto's server on this machine: no network, no TLS, and slow at sending.
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import hashlib
import logging
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from datetime import date
from pathlib import Path

import boto3
import torch
from moto.server import ThreadedMotoServer
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from remoe_cli.function.weights import read_head
from remoe_cli.model.experts import ExpertLayer
from remoe_cli.model.shards import write_shard
from remoe_cli.package.dependencies import PACKAGES, PYTHON, FunctionPackage, fetch, find_interpreter, pack

START = """
import numpy as np
from function.codec import Batch, pack, unpack
from function.handler import handle
unpack(handle(pack(Batch("bfloat16", (1,), (1,), np.full((1, 2048), 0x3F80, np.uint16))), None))
"""
IMPORTS = {
    "http.client, ssl, hmac and threads (chosen)": "import http.client, ssl, hmac, concurrent.futures.thread",
    "botocore.auth alone, for signatures": "import botocore.auth",
    "a boto3 S3 client, made": "import boto3; boto3.client('s3', region_name='us-east-1')",
}


def sizes(folder: Path) -> dict[str, Path]:
    """The zips of both architectures, and one of this one without bytecode, by what they are."""
    interpreter, zips = find_interpreter(PYTHON), {}
    print("| zip | zipped MB | unpacked MB | largest folders, MB | wheels as they are, unpacked MB |\n| --- | --- | --- | --- | --- |")
    for architecture in ("x86_64", "arm64"):
        wheels = folder / architecture
        fetch(PACKAGES, architecture, PYTHON, wheels)
        whole = sum(info.file_size for wheel in wheels.iterdir() for info in zipfile.ZipFile(wheel).infolist())
        for what, compiler in (("", interpreter), (", without bytecode", None)):
            name = architecture + what
            zips[name] = folder / f"{name}.zip"
            pack(zips[name], wheels.iterdir(), compiler, architecture)
            made = FunctionPackage.of(zips[name])
            largest = ", ".join(f"{part} {size / 1e6:.1f}" for part, size in made.largest[:4])
            print(f"| {name} | {made.zipped_bytes / 1e6:.1f} | {made.unpacked_bytes / 1e6:.1f} | {largest} | {whole / 1e6:.1f} |")
    return zips


def starts(folder: Path, zips: dict[str, Path], python: str) -> None:
    module = MixtralExperts(MixtralConfig(hidden_size=2048, intermediate_size=1408, num_local_experts=2)).to(torch.bfloat16)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    shard = folder / "layer-000.safetensors"
    write_shard(shard, ExpertLayer(0, "experts", module, 2), range(2))
    logging.disable()  # of every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
    s3 = boto3.client("s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
    s3.create_bucket(Bucket="shards")
    s3.upload_file(str(shard), "shards", "x")
    head = read_head(shard)
    header = f"{len(head)}:{hashlib.sha256(head).hexdigest()}"
    sources = {
        "disk": {"REMOE_SHARD": str(shard), "REMOE_SHARD_HEADER": header},
        "S3": keys | {"REMOE_SHARD": "s3://shards/x", "REMOE_SHARD_HEADER": header, "AWS_ENDPOINT_URL_S3": url},
    }
    ways = {}
    for name, zip in zips.items():
        if name.startswith(platform.machine()):
            root = folder / f"{name} unpacked"
            zipfile.ZipFile(zip).extractall(root)
            for source, environment in sources.items():
                ways[f"{name}, shard on {source}"] = environment | {"PYTHONPATH": str(root)}
    print("\n| first result | ms, median (least to most) | processor's ms, median |")
    table({way: ([python, "-S", "-B", "-c", START], environment) for way, environment in ways.items()})
    server.stop()


def table(ways: dict[str, tuple[list[str], dict[str, str]]]) -> None:
    """Time as it passes hangs on what else the machine does, the processor's time hardly."""
    print("| --- | --- | --- |")
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(11):
        for way, (argv, environment) in ways.items():
            start, used = time.perf_counter(), _processor_s()
            subprocess.run(argv, env=environment | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}, check=True)
            times[way].append(((time.perf_counter() - start) * 1e3, (_processor_s() - used) * 1e3))
    for way, pairs in times.items():
        passed, used_ms = zip(*pairs, strict=True)
        print(f"| {way} | {statistics.median(passed):.0f} ({min(passed):.0f} to {max(passed):.0f}) | {statistics.median(used_ms):.0f} |")


def _processor_s() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def main() -> None:
    interpreter = find_interpreter(PYTHON)
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, functions on Python {interpreter and interpreter.version}\n")
    with tempfile.TemporaryDirectory() as folder:
        zips = sizes(Path(folder))
        if interpreter:
            starts(Path(folder), zips, interpreter.command)
    print("\n| process that imports | ms, median (least to most) | processor's ms, median |")
    table({"nothing": ([sys.executable, "-c", ""], {})} | {what: ([sys.executable, "-c", code], {}) for what, code in IMPORTS.items()})


if __name__ == "__main__":
    main()

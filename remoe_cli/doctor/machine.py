"""This machine: software, device, number types that it computes fast, memory, disk, limits, ports."""

from __future__ import annotations

import errno
import os
import platform
import secrets
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement

from remoe_cli import cages, settings
from remoe_cli.doctor.finding import Finding, price_age, tried
from remoe_cli.errors import RemoeError
from remoe_cli.openmp import usable_cores
from remoe_cli.units import size

_PORT = 8080  # of `remoe serve`, unless --port names another one
_LEAST_FREE_BYTES = 2e9  # the demo model and its deployment take less than half of it
_LIBRARIES = ("torch", "transformers", "pulp", "highspy", "numkong", "boto3")
_PRODUCT = (1024, 4096)  # rows and columns of a weight matrix that the caches do not hold twice, times a prompt of _ROWS tokens
_ROWS, _ROUNDS = 16, 5
_DOCKER_S = 5.0  # for an answer of its server


def findings() -> Iterator[Finding]:
    """Look at this machine."""
    yield Finding(name="Python", ok=True, value=f"{platform.python_version()}, {platform.machine()}")
    yield Finding(name="remoe", ok=True, value=version("remoe"))
    for requirement in map(Requirement, requires("remoe") or ()):
        if requirement.name in _LIBRARIES:
            yield _library(requirement)
    yield tried("solver", _solver)
    yield _device()
    yield _number_types()
    yield _memory()
    for name, folder in (("disk of caches", settings.cache_dir()), ("disk of deployments", settings.state_dir())):
        yield _disk(name, folder)
    yield _limits()
    yield _port()
    yield _docker()
    yield from _prices()


def _library(requirement: Requirement) -> Finding:
    found = version(requirement.name)
    ok = requirement.specifier.contains(found, prereleases=True)
    hint = "" if ok else f"Install {requirement}."
    return Finding(name=requirement.name, ok=ok, value=f"{found} (remoe takes {requirement.specifier})", hint=hint)


def _solver() -> Finding:
    import pulp

    from remoe_cli.plan.solve.master_lp import quiet_highs

    quiet_highs()
    problem = pulp.LpProblem("doctor", pulp.LpMinimize)
    x = problem.add_variable("x", 0, 9, pulp.LpInteger)
    problem += pulp.LpAffineExpression([(x, 1.0)])
    problem += pulp.LpAffineExpression([(x, 2.0)]) >= 3.0
    problem.solve(pulp.HiGHS(msg=False, threads=1))
    solved = problem.sol_status == pulp.LpSolutionOptimal and x.value() == 2
    hint = "" if solved else "Install highspy again: 'remoe plan' needs it."
    return Finding(
        name="solver", ok=solved, value="HiGHS solves" if solved else "HiGHS does not solve a problem of one variable", hint=hint
    )


def _device() -> Finding:
    import torch

    from remoe_cli.runtime.device import choose, describe

    try:
        device = describe(torch.device(choose(True)))
    except RemoeError as error:
        why = error.message.partition(": ")[2].rstrip(".")
        return Finding(name="GPU", ok=True, value=f"none: {why}", hint="A plan with a GPU is not served here.")
    driver = f", driver {device.driver}" if device.driver else ""
    return Finding(name="GPU", ok=device.kind == "cuda", value=f"{device.name}, {size(device.memory_bytes)}{driver}")


def _number_types() -> Finding:
    """Time one product in each number type, in turns, as ratios to float32, by what a main function multiplies with."""
    import torch

    from remoe_cli.model.products import prepare_products

    types = (torch.float32, torch.bfloat16, torch.float16)
    pairs = []
    for kind in types:
        layer = torch.nn.Linear(_PRODUCT[1], _PRODUCT[0], bias=False, dtype=kind).requires_grad_(False)
        prepare_products(layer, [])
        pairs.append((layer, torch.ones(_ROWS, _PRODUCT[1], dtype=kind)))
    seconds: list[list[float]] = [[] for _ in types]
    for _ in range(_ROUNDS):
        for (layer, x), times in zip(pairs, seconds, strict=True):
            start = time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - start)
    base, *others = map(statistics.median, seconds)
    ratios = ", ".join(f"{str(kind).removeprefix('torch.')} {found / base:.1f}" for kind, found in zip(types[1:], others, strict=True))
    slow = others[0] > 1.5 * base
    hint = "A model in bfloat16 computes slowly here: this CPU has no instructions for it." if slow else ""
    return Finding(name="number types", ok=True, value=f"times of a product, float32 1.0: {ratios}", hint=hint)


def _memory() -> Finding:
    from remoe_cli.runtime.free_memory import available_bytes

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    value = f"{size(total)}, {size(available_bytes())} available; {usable_cores()} cores"
    return Finding(name="memory and cores", ok=True, value=value)


def _disk(name: str, folder: Path) -> Finding:
    parent = next(each for each in (folder, *folder.parents) if each.is_dir())
    free = shutil.disk_usage(parent).free
    value = f"{folder}: {size(free)} free"
    if not os.access(parent, os.W_OK):
        variable = "REMOE_CACHE_DIR" if folder == settings.cache_dir() else "REMOE_STATE_DIR"
        return Finding(name=name, ok=False, value=f"{folder} cannot be written", hint=f"Set {variable} to a folder of yours.")
    hint = "" if free >= _LEAST_FREE_BYTES else "The demo takes about 1 GB, a model and its packages as much as its checkpoint twice."
    return Finding(name=name, ok=free >= _LEAST_FREE_BYTES, value=value, hint=hint)


def _limits() -> Finding:
    label = f"remoe-doctor-{secrets.token_hex(4)}"
    mechanism = cages.probe(label)
    for group in mechanism.groups:
        cages.remove(group)
    weak = []
    if mechanism.memory == "rlimit":
        weak.append("memory is limited less exactly than on Lambda")
    if mechanism.cpu == "threads-only":
        weak.append("functions run as fast as this machine, whatever their memory")
    hint = f"On the local twin, {' and '.join(weak)}: no control group can be made here." if weak else ""
    return Finding(name="limits of functions", ok=True, value=f"memory {mechanism.memory}, CPU {mechanism.cpu}", hint=hint)


def _port() -> Finding:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", _PORT))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            value = f"{_PORT} is taken" if taken else f"{_PORT}: {error.strerror}"
            return Finding(name="port", ok=taken, value=value, hint="Give 'remoe serve' another one with --port.")
    return Finding(name="port", ok=True, value=f"{_PORT} on loopback is free")


def _docker() -> Finding:
    found = shutil.which("docker")
    server = found and _docker_server(found)
    if server:
        return Finding(name="docker", ok=True, value=f"{found}, server {server}")
    why = f"{found}, but its server does not answer" if found else "not installed"
    return Finding(name="docker", ok=True, value=why, hint="It is needed only to build a main function's image for AWS.")


def _docker_server(docker: str) -> str:
    """Return the version of the server that builds images; empty where none answers in time."""
    try:
        answer = subprocess.run(
            [docker, "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True, errors="replace", timeout=_DOCKER_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _prices() -> Iterator[Finding]:
    from remoe_cli.plan.catalog.catalog import catalog_names, read_catalog

    for name in catalog_names():
        if name != "local" and name != "paper":
            yield price_age(f"prices of {name}", read_catalog(name).oldest_price, "'remoe catalog update' fetches today's prices.")

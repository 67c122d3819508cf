"""Processes that start with torch and transformers imported: a fresh interpreter takes seconds for that, each time."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

# Forked from a process that has only imported, and so has no threads that a fork would lose.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.preloaded"])


def start(work: Callable[..., object], *arguments: Any, stdout: Path, stderr: Path) -> BaseProcess:
    """`work(*arguments)` in a process of its own, with this process's environment; both must be importable or picklable."""
    process = _CONTEXT.Process(target=_run, args=(work, arguments, dict(os.environ), os.getcwd(), stdout, stderr))
    process.start()
    return process


def _run(work: Callable[..., object], arguments: tuple[Any, ...], environment: dict[str, str], folder: str, *streams: Path) -> None:
    # The descriptors, not sys.stdout: what libraries and children of the process print must be seen too.
    for descriptor, path in enumerate(streams, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    work(*arguments)


def pool(begin: Callable[[], None]) -> ProcessPoolExecutor:
    """One process that calls `begin` and then does what is submitted, one after another."""
    return ProcessPoolExecutor(1, _CONTEXT, begin)


def complete(work: Callable[..., object], *arguments: Any, timeout: float = 280) -> CompletedProcess[str]:
    """Run it to its end, as subprocess.run would with text=True."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        process = start(work, *arguments, stdout=stdout, stderr=stderr)
        process.join(timeout)
        if (code := process.exitcode) is None:
            process.kill()
            process.join()
            raise TimeoutExpired(repr(work), timeout, stdout.read_bytes(), stderr.read_bytes())
        process.close()
        return CompletedProcess(arguments, code, stdout.read_text(), stderr.read_text())


def remoe(*arguments: str, timeout: float = 280, **environment: str) -> CompletedProcess[str]:
    """The command `remoe ARGUMENTS`."""
    return complete(command, arguments, environment, timeout=timeout)


def command(arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    from remoe_cli.cli.app import main

    os.environ.update(environment)
    sys.argv = ["remoe", *arguments]
    main()


def document(*arguments: str, code: int = 0) -> Any:
    """Run the command with --json and return its document, or a list of several; every line of stdout must be JSON."""
    run = remoe(*arguments, "--json")
    assert run.returncode == code, run.stdout + run.stderr
    documents = [json.loads(line) for line in run.stdout.splitlines()]
    assert "Traceback" not in run.stderr
    return documents[0] if len(documents) == 1 else documents

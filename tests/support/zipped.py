"""The zip that AWS would run, unpacked for the twin: nothing of this environment's packages is in reach of what runs there."""

from __future__ import annotations

import os
import platform
import zipfile
from dataclasses import dataclass
from pathlib import Path

from remoe_cli.deploy.local.config import FunctionConfig
from remoe_cli.package.bundle import HANDLER
from remoe_cli.package.dependencies import PACKAGES, PYTHON, Interpreter, fetch, find_interpreter, pack

ARCHITECTURE = {"x86_64": "x86_64", "aarch64": "arm64", "arm64": "arm64"}[platform.machine()]
# What Lambda's own runtime brings.
_RUNTIME = ("awslambdaric", "simplejson", "snapshot-restore-py")


@dataclass(frozen=True)
class Zipped:
    """`root` is the unpacked zip, LAMBDA_TASK_ROOT; `runtime` a folder with nothing but awslambdaric and what it needs."""

    zip: Path
    root: Path
    runtime: Path
    interpreter: Interpreter

    @property
    def python(self) -> str:
        """Its minor version."""
        return self.interpreter.version.rpartition(".")[0]

    def function(self, name: str, environment: dict[str, str], *, memory_mb: int = 1769, handler: str = HANDLER) -> FunctionConfig:
        """Run by its Python without site-packages; `environment` may hold a PYTHONPATH of its own, which comes last."""
        path = os.pathsep.join(filter(None, (str(self.root), str(self.runtime), environment.get("PYTHONPATH"))))
        return FunctionConfig(
            name=name,
            handler=handler,
            code_dir=str(self.root),
            interpreter=(self.interpreter.command, "-S"),
            environment=environment | {"PYTHONPATH": path},
            memory_mb=memory_mb,
            timeout_s=20,
            reserved_concurrency=1,
        )


def make(folder: Path) -> Zipped:
    """Where this machine lacks the Python that functions have on AWS, that of the tests runs them, which Lambda may not have."""
    interpreter = find_interpreter(PYTHON) or find_interpreter(".".join(platform.python_version_tuple()[:2]))
    assert interpreter
    made = Zipped(folder / "function.zip", folder / "task", folder / "runtime", interpreter)
    fetch((*PACKAGES, *_RUNTIME), ARCHITECTURE, made.python, folder / "wheels", "image-cpu.txt")
    wheels = {path: path.name.partition("-")[0] in PACKAGES for path in (folder / "wheels").iterdir()}
    pack(made.zip, (path for path, packed in wheels.items() if packed), interpreter, ARCHITECTURE)
    zipfile.ZipFile(made.zip).extractall(made.root)
    for path in made.root.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for path in (path for path, packed in wheels.items() if not packed):
        zipfile.ZipFile(path).extractall(made.runtime)
    return made

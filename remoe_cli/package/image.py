"""The container image of the main function: a Docker build context, reproducible everywhere.

Dockerfile          a base image by its digest, the requirements, this package; its program is runtime/container.py
torch.txt           torch alone, since its wheels for CPUs are in an index of their own
requirements.txt    everything else that the main function imports
remoe_cli/          this package

Both lists name every file by its sha256 (locks.py), and pip installs nothing else. The image holds no weights; REMOE_MAIN names the main
function's files. SageMaker runs the image as it is. Lambda runs it with another entry point: runtime/lambda_runtime.py.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import remoe_cli
from remoe_cli import owned
from remoe_cli.package import locks

# What the modules of remoe_cli.runtime import, and what they import of other packages of remoe_cli.
ROOTS = (
    *("awslambdaric", "boto3", "fastapi", "httpx", "llguidance", "numkong", "numpy", "packaging", "platformdirs", "pybase64", "pydantic"),
    *("prometheus-client", "safetensors", "torch", "transformers", "uvicorn"),
)
_CPU_INDEX, _GPU_INDEX = "https://download.pytorch.org/whl/cpu", "https://pypi.org/simple"
_TAG_DIGITS = 16


@dataclass(frozen=True)
class BaseImage:
    """An official image of Python, by a digest that covers x86_64 and arm64.

    To update it, ask `docker buildx imagetools inspect TAG` for the digest, and change tag, digest and date together.
    """

    tag: str
    sha256: str
    date: str

    @property
    def python(self) -> str:
        return self.tag.partition(":")[2].partition("-")[0]


BASE = BaseImage(
    tag="python:3.11.16-slim-bookworm",
    sha256="a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b",
    date="2026-09-22",  # when public records last compared the two
)
_USER = "10001"
# SageMaker "expects all containers to run with root users" ("Custom Inference Code with Hosting Services", read 2026-11-29). Lambda runs
# every image as a user of its own that may do little.
_AS_USER = f"USER {_USER}:{_USER}\n"
_DOCKERFILE = """\
# {tag}, {date}
FROM {tag}@sha256:{sha256}

# SageMaker may say in SAGEMAKER_BIND_TO_PORT where the program listens.
LABEL com.amazonaws.sagemaker.capabilities.accept-bind-to-port=true
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \\
    HF_HOME=/tmp/huggingface HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH=/opt/remoe

COPY torch.txt requirements.txt /opt/remoe/
RUN pip install --no-cache-dir --only-binary :all: --no-deps --require-hashes --index-url {index} -r /opt/remoe/torch.txt \\
 && pip install --no-cache-dir --only-binary :all: --no-deps --require-hashes -r /opt/remoe/requirements.txt

COPY remoe_cli /opt/remoe/remoe_cli
RUN python -m compileall -q /opt/remoe/remoe_cli

WORKDIR /opt/remoe
{user}EXPOSE 8080
ENTRYPOINT ["python", "-m", "remoe_cli.runtime.container"]
CMD ["serve"]
"""


@dataclass(frozen=True)
class Image:
    """A build context, and how an image is made of it.

    gpu          whether it has torch for GPUs
    repository   where it is pushed to; None: nowhere
    """

    context: Path
    sha256: str
    gpu: bool
    architecture: str
    repository: str | None

    @property
    def uri(self) -> str:
        """Name the image with the context's digest as tag, so that a tag always means the same image."""
        return f"{self.repository or 'remoe'}:{self.sha256[:_TAG_DIGITS]}"

    @property
    def build(self) -> list[str]:
        """Return the build command. It makes no provenance, which Lambda refuses."""
        return [
            *("docker", "build", "--platform", {"x86_64": "linux/amd64", "arm64": "linux/arm64"}[self.architecture], "--provenance=false"),
            *("--tag", self.uri, str(self.context)),
        ]

    @property
    def registry(self) -> str | None:
        """Return the registry's host if it is Amazon ECR, else None."""
        host = (self.repository or "").partition("/")[0]
        return host if ".dkr.ecr." in host else None

    @property
    def region(self) -> str | None:
        return self.registry.split(".")[3] if self.registry else None

    @property
    def push(self) -> list[str]:
        return ["docker", "push", self.uri]


def write_context(folder: Path, *, gpu: bool = False, as_root: bool = False) -> str:
    """Write the build context into the empty folder `folder`, and return a sha256 of names and contents.

    Raises: UsageError for a folder that is not empty.
    """
    owned.require_empty(folder)
    torch, rest = locks.of_image(gpu)
    base = {"tag": BASE.tag, "date": BASE.date, "sha256": BASE.sha256, "index": _GPU_INDEX if gpu else _CPU_INDEX}
    (folder / "Dockerfile").write_text(_DOCKERFILE.format(**base, user="" if as_root else _AS_USER))
    (folder / "torch.txt").write_text(torch)
    (folder / "requirements.txt").write_text(rest)
    package = Path(remoe_cli.__file__).parent
    shutil.copytree(package, folder / "remoe_cli", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != owned.MARK):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()

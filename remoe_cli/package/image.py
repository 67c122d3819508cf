"""The container image of the main function: a Docker build context, reproducible for one installation.

Dockerfile          Python as it is here, the requirements, this package; its program is runtime/container.py
torch.txt           torch alone, since its wheels for CPUs are in an index of their own
requirements.txt    everything that the main function imports, in the versions that are installed and tested here
remoe_cli/          this package

The image holds no weights; REMOE_MAIN names the main function's files. SageMaker runs the image as it is. Lambda runs it with another entry
point: awslambdaric and runtime/lambda_main.py.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

import remoe_cli
from remoe_cli import owned

# What the modules of remoe_cli.runtime import, and what they import of other packages of remoe_cli.
ROOTS = (
    *("awslambdaric", "boto3", "fastapi", "httpx", "numkong", "numpy", "packaging", "platformdirs", "pybase64", "pydantic"),
    *("safetensors", "torch", "transformers", "uvicorn"),
)
_CPU_INDEX, _GPU_INDEX = "https://download.pytorch.org/whl/cpu", "https://pypi.org/simple"
_LINUX = {"platform_system": "Linux", "sys_platform": "linux", "os_name": "posix", "extra": ""}
_TAG_DIGITS = 16
# SageMaker runs containers as root and says so ("Custom Inference Code with Hosting Services"), so there is no USER.
_DOCKERFILE = """\
FROM python:{python}-slim-bookworm

# SageMaker may say in SAGEMAKER_BIND_TO_PORT where the program listens.
LABEL com.amazonaws.sagemaker.capabilities.accept-bind-to-port=true
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \\
    HF_HOME=/tmp/huggingface HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH=/opt/remoe

ARG TORCH_INDEX={gpu_index}
COPY torch.txt requirements.txt /opt/remoe/
RUN pip install --no-cache-dir --only-binary :all: --no-deps --index-url "$TORCH_INDEX" -r /opt/remoe/torch.txt \\
 && pip install --no-cache-dir --only-binary :all: -r /opt/remoe/requirements.txt

COPY remoe_cli /opt/remoe/remoe_cli
RUN python -m compileall -q /opt/remoe/remoe_cli

WORKDIR /opt/remoe
EXPOSE 8080
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
            *("--build-arg", f"TORCH_INDEX={_GPU_INDEX if self.gpu else _CPU_INDEX}", "--tag", self.uri, str(self.context)),
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


def write_context(folder: Path) -> str:
    """Write the build context into the empty folder `folder`, and return a sha256 of names and contents.

    Raises: UsageError for a folder that is not empty.
    """
    owned.require_empty(folder)
    pins = pinned()
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    (folder / "Dockerfile").write_text(_DOCKERFILE.format(python=platform.python_version(), gpu_index=_GPU_INDEX))
    (folder / "torch.txt").write_text(f"{torch}\n")
    (folder / "requirements.txt").write_text("".join(f"{pin}\n" for pin in pins))
    package = Path(remoe_cli.__file__).parent
    shutil.copytree(package, folder / "remoe_cli", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != owned.MARK):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def pinned() -> tuple[str, ...]:
    """List `name==version` of the main function's requirements and of theirs, as installed here.

    A build of torch for CPUs and one for GPUs have the same public version; the image chooses the build. What Linux needs and this machine
    lacks, such as the CUDA libraries of another torch, pip finds by their requirements.
    """
    versions: dict[str, str] = {}
    todo = [canonicalize_name(name) for name in ROOTS]
    while todo:
        name = todo.pop()
        if name in versions:
            continue
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if name in ROOTS:
                raise
            continue
        versions[name] = found.version.partition("+")[0]
        todo += _required(found)
    return tuple(f"{name}=={versions[name]}" for name in sorted(versions))


def _required(distribution: metadata.Distribution) -> Iterator[NormalizedName]:
    for line in distribution.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(_LINUX):
            yield canonicalize_name(requirement.name)

"""The build context of the main function's image: complete, reproducible, and how it is built."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from remoe_cli.artifacts import write_json
from remoe_cli.deploy import image as building
from remoe_cli.errors import DeployError
from remoe_cli.package import locks
from remoe_cli.package.dependencies import PACKAGES
from remoe_cli.package.image import BASE, ROOTS, Image, write_context
from tests.support import display, forked
from tests.support.synthetic import plan_by_hand

ECR = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/remoe"
PROGRAMS = ("container", "lambda_main")  # what runs in the image


def _imports(package: Path, module: str, seen: set[str]) -> set[str]:
    """Top-level names outside remoe that a module imports, at once or later, itself or by another of remoe's; types do not count."""
    path = package.parent / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if module in seen or not file.is_file():
        return set()
    seen.add(module)
    found = set()
    todo: list[ast.AST] = [ast.parse(file.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = f"{module.rpartition('.')[0]}.{base}".rstrip(".")
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    ours = {name for name in found if name.partition(".")[0] == package.name}
    return {name.partition(".")[0] for name in found - ours}.union(*(_imports(package, name, seen) for name in ours))


def test_what_the_programs_import_is_pinned(tmp_path: Path) -> None:
    write_context(tmp_path)
    seen: set[str] = set()
    imported = set().union(*(_imports(tmp_path / "remoe_cli", f"remoe_cli.runtime.{name}", seen) for name in PROGRAMS))
    assert {"remoe_cli.runtime.engine", "remoe_cli.runtime.fetch", "remoe_cli.model.loader", "remoe_cli.function.codec"} <= seen
    of = metadata.packages_distributions()
    distributions = {canonicalize_name(name) for module in imported - sys.stdlib_module_names for name in of[module]}
    for lock in ("image-cpu.txt", "image-gpu.txt"):
        assert {"torch", "transformers", "boto3", "fastapi"} <= distributions <= {"torch", *locks.versions(lock)}
        assert canonicalize_name("awslambdaric") in locks.versions(lock)  # Lambda's entry point


@pytest.mark.parametrize("name", ["function.txt", "image-cpu.txt", "image-gpu.txt", "torch-cpu.txt"])
def test_locks_are_of_the_tested_versions_and_know_every_file(name: str) -> None:
    """'make locks' writes them anew after a change of constraints.txt."""
    tested = {
        canonicalize_name(r.name): r
        for line in Path("constraints.txt").read_text().splitlines()
        if "==" in line and (r := Requirement(line))
    }
    locked = locks.versions(name)
    assert locked and all(locked[package] in tested[package].specifier for package in locked.keys() & tested.keys())
    lines = [line for line in locks.path(name).read_text().splitlines() if line and not line.startswith("#")]
    assert len(locked) == sum(not line.startswith(" ") for line in lines)  # no package without a digest, and none that is no version
    assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}(?: \\)?", line) for line in lines if line.startswith(" "))
    files = Counter(package for package, _ in re.findall(r"(?m)^([a-z0-9][^=\s]*)==(\S+)", "\n".join(lines)))
    assert set(files.values()) == {1}


def test_what_ships_is_locked() -> None:
    assert set(PACKAGES) == locks.versions("function.txt").keys()
    assert all(locks.versions("function.txt")[name] == metadata.version(name) for name in PACKAGES)
    for gpu in (False, True):
        torch, rest = locks.of_image(gpu)
        assert torch.count("torch==2") == 1 and "\ntorch==" not in rest
        assert all(canonicalize_name(f"{name}") in {**locks.versions("image-gpu.txt")} and f"{name}==" in torch + rest for name in ROOTS)


@pytest.mark.parametrize(("gpu", "as_root"), [(False, False), (True, True)])
def test_an_image_is_made_of_known_files_alone(gpu: bool, as_root: bool, tmp_path: Path) -> None:
    digest = write_context(tmp_path, gpu=gpu, as_root=as_root)
    dockerfile = (tmp_path / "Dockerfile").read_text()
    (base,) = re.findall(r"(?m)^FROM (.*)$", dockerfile)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", base) and f"# {BASE.tag}, {BASE.date}\n" in dockerfile
    assert dockerfile.count("pip install") == dockerfile.count("--no-deps --require-hashes") == 2
    assert ("USER 10001:10001\n" in dockerfile) is not as_root  # SageMaker demands root
    assert f"--index-url {'https://pypi.org/simple' if gpu else 'https://download.pytorch.org/whl/cpu'} " in dockerfile
    torch = (tmp_path / "torch.txt").read_text()
    assert ("torch==2.13.0+cpu " in torch) is not gpu and torch.count("--hash=sha256:") >= 2
    assert write_context(tmp_path / "other", gpu=not gpu, as_root=as_root) != digest  # so a tag names one kind


def test_the_context_is_reproducible(tmp_path: Path) -> None:
    first, second = write_context(tmp_path / "one"), write_context(tmp_path / "two")
    files = {p.relative_to(tmp_path / "one"): p.read_bytes() for p in (tmp_path / "one").rglob("*") if p.is_file()}
    assert first == second
    assert files == {p.relative_to(tmp_path / "two"): p.read_bytes() for p in (tmp_path / "two").rglob("*") if p.is_file()}
    names = {str(name) for name in files}
    assert {"Dockerfile", "requirements.txt", "torch.txt", "remoe_cli/runtime/container.py"} <= names
    assert not any("__pycache__" in name for name in names)
    dockerfile = files[Path("Dockerfile")].decode()
    assert f"FROM {BASE.tag}@sha256:{BASE.sha256}\n" in dockerfile
    assert dockerfile.endswith('ENTRYPOINT ["python", "-m", "remoe_cli.runtime.container"]\nCMD ["serve"]\n')


def image(repository: str | None, gpu: bool = False) -> Image:
    return Image(Path("/c"), "0123456789abcdef" * 4, gpu, "x86_64", repository)


def test_without_docker_the_commands_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert building.build(image(ECR), print) is False
    build, login, push = building.by_hand(image(ECR))
    uri = f"{ECR}:0123456789abcdef"
    assert build.startswith("docker build --platform linux/amd64 --provenance=false ") and build.endswith(f" --tag {uri} /c")
    assert login == (
        "aws ecr get-login-password --region eu-west-1 | "
        "docker login --username AWS --password-stdin 123456789012.dkr.ecr.eu-west-1.amazonaws.com"
    )
    assert push == f"docker push {uri}"
    assert len(building.by_hand(image(None))) == 1 and len(building.by_hand(image("registry.example/remoe"))) == 2


@pytest.mark.parametrize("server", ["true", "false"])
def test_docker_is_asked_to_build_and_push(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A docker that notes what it is told: with a daemon behind it, and without."""
    script = f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n[ "$1" != version ] || exec /bin/{server}\n'
    script += '[ "$1" != push ] || { echo no space left; exit 3; }\n'
    (tmp_path / "docker").write_text(script)
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    built = image("registry.example/remoe")
    if server == "false":
        assert building.build(built, print) is False
        return
    shown = display.Display(lambda done, total: None)
    with pytest.raises(DeployError, match=r"'docker push' failed with status 3\.\nno space left$"):
        building.build(built, lambda text: None, shown)
    assert shown.titles == ["docker build", "docker push"]
    assert [line.split()[0] for line in (tmp_path / "told").read_text().splitlines()] == ["version", "build", "push"]
    assert building.build(image(None), lambda text: None) is True


def test_the_command_writes_it_and_says_how_to_go_on(tmp_path: Path) -> None:
    catalog = plan_by_hand(()).catalog.model_copy(update={"path": "local"})
    write_json(tmp_path / "plan.json", plan_by_hand((), catalog=catalog))
    out = tmp_path / "context"
    document = forked.document("package", str(tmp_path / "plan.json"), "--image", "-o", str(out), "--repository", ECR)
    assert (document["built"], document["pushed"], len(document["commands"])) == (False, False, 3)
    assert document["image"] == f"{ECR}:{document['sha256'][:16]}" and (out / "Dockerfile").is_file()
    error = forked.document("package", str(tmp_path / "plan.json"), "--repository", ECR, code=2)["error"]
    assert "--image" in error["hint"]

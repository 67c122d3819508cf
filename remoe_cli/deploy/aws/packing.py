"""Package a plan's functions and main function as files, and say where in the bucket each goes.

Files are kept in the cache folder by the plan's digest and the deployment's name, so that deploying again, or after an interruption,
packages nothing twice. Kept files are checked against their digests before they are used.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from remoe_cli import artifacts, owned
from remoe_cli.deploy.aws import names
from remoe_cli.deploy.aws.contents import Contents, ExpertFunction
from remoe_cli.deploy.aws.objects import Object
from remoe_cli.deploy.aws.settings import AwsSettings
from remoe_cli.deploy.console import Console
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.deploy.main_files import server_config, write_main_files
from remoe_cli.errors import ArtifactError
from remoe_cli.package import bundle, partial_checkpoint
from remoe_cli.package.dependencies import FunctionPackage, function_package
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import Plan
from remoe_cli.profile.record import Profile
from remoe_cli.runtime.fetch import fetch
from remoe_cli.runtime.server_config import ServerConfig
from remoe_cli.settings import cache_dir


@dataclass(frozen=True)
class Package:
    """The contents of a deployment, and the objects of its bucket besides templates."""

    contents: Contents
    objects: tuple[Object, ...]


def pack(plan: Plan, plan_path: Path, profile: Profile, catalog: Catalog, settings: AwsSettings, console: Console) -> Package:
    """Package a plan.

    Raises: ArtifactError when the model has changed since it was profiled, or when a wheel cannot be fetched, ModelError for a model that
    is missing or incomplete.
    """
    folder = cache_dir() / "deployments" / f"{artifacts.sha256_file(plan_path)[:32]}-{settings.name}"
    with console.progress("Packaging the functions' code"):
        code = function_package(settings.architecture, settings.python)
    made = _functions(plan, plan_path, profile, folder / "functions", console)
    config = server_config(
        plan,
        profile,
        catalog,
        made,
        invoked=lambda entry: names.invoked(names.function(settings.name, entry)),
        stored=lambda entry: settings.key(names.shard_key(entry.name, entry.shard_sha256)),
        speculate=settings.speculate,
        cache_experts=settings.cache_experts,
    )
    main_folder = folder / ("main-config" if settings.endpoint is Endpoint.none else "main")
    main = _main(config, plan_path, settings.endpoint, main_folder, console)
    contents = Contents(
        functions=tuple(map(_part, made.functions)),
        code_bytes=code.zipped_bytes,
        code_unpacked_bytes=code.unpacked_bytes,
        main_bytes=main.bytes,
        code_sha256=code.sha256,
        main_sha256=artifacts.sha256_file(main_folder / partial_checkpoint.MANIFEST),
    )
    return Package(contents, (_code(code), *_shards(made, folder / "functions"), *_files(main, main_folder, contents.main_sha256)))


def _functions(plan: Plan, plan_path: Path, profile: Profile, folder: Path, console: Console) -> bundle.Manifest:
    with console.progress("Checking packaged functions"), suppress(ArtifactError):
        found = bundle.read(folder)
        if found.model == profile.record.model and found.spec == profile.record.spec:
            return found
    with owned.new_folder(folder, "bundle", bundle.files) as fresh, console.progress("Packaging functions") as report:
        return bundle.build(plan, plan_path, profile, fresh, report)


def _main(config: ServerConfig, plan_path: Path, endpoint: Endpoint, folder: Path, console: Console) -> partial_checkpoint.MainManifest:
    """Package the main function's files; where the user runs it, only its configuration."""
    with console.progress("Checking the packaged main function"), suppress(ArtifactError):
        if artifacts.read_json(folder / "server.json", ServerConfig) == config:
            fetch(str(folder / partial_checkpoint.MANIFEST), folder)
            return artifacts.read_json(folder / partial_checkpoint.MANIFEST, partial_checkpoint.MainManifest)
    with owned.new_folder(folder, "main function", partial_checkpoint.files) as fresh:
        if endpoint is Endpoint.none:
            artifacts.write_json(fresh / "server.json", config)
            owned.copy_file(plan_path, fresh / "plan.json")
            return partial_checkpoint.seal(fresh)
        with console.progress("Packaging the main function", of_bytes=True) as report:
            return write_main_files(config, plan_path, fresh, report)


def _part(entry: bundle.FunctionEntry) -> ExpertFunction:
    return ExpertFunction(
        entry=entry.name,
        layer=entry.layer,
        experts=entry.experts,
        memory_mb=entry.memory_mb,
        replicas=entry.replicas,
        timeout_s=entry.timeout_s,
        shard_bytes=entry.shard_bytes,
        shard_sha256=entry.shard_sha256,
        head_bytes=entry.head_bytes,
        head_sha256=entry.head_sha256,
    )


def _code(code: FunctionPackage) -> Object:
    return Object(names.code_key(code.sha256), code.path, code.zipped_bytes, code.sha256)


def _shards(made: bundle.Manifest, folder: Path) -> list[Object]:
    return [Object(names.shard_key(f.name, f.shard_sha256), folder / f.shard, f.shard_bytes, f.shard_sha256) for f in made.functions]


def _files(main: partial_checkpoint.MainManifest, folder: Path, sha256: str) -> list[Object]:
    """List the main function's objects, the manifest last: who finds it finds the files that it names."""
    files = [Object(names.main_file_key(file.sha256, file.name), folder / file.name, file.bytes, file.sha256) for file in main.files]
    manifest = folder / partial_checkpoint.MANIFEST
    return [*files, Object(names.main_manifest_key(sha256), manifest, manifest.stat().st_size, sha256)]

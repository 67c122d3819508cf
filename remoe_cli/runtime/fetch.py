"""Fetch the main function's files before it serves, and check each against its digest in the manifest.

`s3://BUCKET/main/SHA256.json` is a manifest, named by its own digest. Its files are objects `main/SHA256/NAME` of the same bucket; they are
fetched in ranges, many at once. A path names a manifest on this machine, whose files lie beside it and stay there.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remoe_cli import owned
from remoe_cli.artifacts import made_as, parse_document, read_json, sha256_bytes, sha256_file
from remoe_cli.bounded import DOCUMENT, read_stream
from remoe_cli.errors import ArtifactError, DeployError
from remoe_cli.package import partial_checkpoint
from remoe_cli.package.partial_checkpoint import MANIFEST, MainFile, MainManifest
from remoe_cli.units import size

_CONNECTIONS = 16
RANGE_BYTES = 16 << 20
_DIGESTS = 4  # files that are digested at once
_AGAIN = "Deploy the plan again."


@dataclass(frozen=True)
class _Object:
    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    def beside(self, file: MainFile) -> _Object:
        """Return the object that holds a file of this manifest."""
        return _Object(self.bucket, f"{self.key.rpartition('/')[0]}/{file.sha256}/{file.name}")


def scratch_folder() -> Path:
    """Return the folder for the files: /tmp can be written in containers and in Lambda functions."""
    return Path(tempfile.gettempdir()) / "remoe-main"


def fetch(uri: str, folder: Path, on_read: Callable[[], None] = lambda: None, on_file: Callable[[Path], None] = lambda path: None) -> Path:
    """Bring every file of the manifest at `uri` to this machine and return their folder.

    For S3 this is `folder`, which then holds nothing else; for a path it is the manifest's own folder. A file that is there already is not
    fetched again; one that an earlier manifest named is deleted. `on_read` is called for each request to S3, `on_file` with each file that
    is there and has its digest, by several threads.

    Raises: ArtifactError for a file that differs from its digest, DeployError for one that is missing or may not be read, and for a full
    disk, UsageError when `folder` holds other files than those of an earlier manifest.
    """
    if (found := re.fullmatch(r"s3://([^/]+)/(.+)", uri)) is None:
        manifest = read_json(Path(uri), MainManifest)
        here = Path(uri).resolve().parent

        def check(file: MainFile) -> None:
            _check(here / file.name, file, str(here / file.name))
            on_file(here / file.name)

        with ThreadPoolExecutor(_DIGESTS) as pool:
            for _ in pool.map(check, manifest.files):
                pass
        return here
    source = _Object(found[1], found[2])
    with closing(_client()) as client:
        client.meta.events.register("before-send.s3", lambda **_: on_read())  # tries that failed are paid for too
        body, manifest = _manifest(client, source)
        _make_room(folder, {file.name for file in manifest.files})
        with owned.writing(folder / MANIFEST, made_as(MainManifest)) as temporary:
            temporary.write_bytes(body)
        wanted = [file for file in manifest.files if not _is_right(folder / file.name, file)]
        _refuse_full(folder, sum(file.bytes for file in wanted))
        for file in manifest.files:
            if file not in wanted:
                on_file(folder / file.name)
        _download(client, source, wanted, folder, on_file)
    return folder


def _client() -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        max_pool_connections=_CONNECTIONS,
        retries={"mode": "standard", "total_max_attempts": 5},
        connect_timeout=5,
        response_checksum_validation="when_required",  # the manifest's digests say more, and so a transfer needs no HEAD first
    )
    return boto3.client("s3", region_name=os.environ.get("AWS_REGION"), config=config)


def _make_room(folder: Path, names: set[str]) -> None:
    """Delete what is in `folder` of the manifest that was fetched before, but for the files with these names."""
    owned.refuse_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    before = set(partial_checkpoint.files(folder))
    # boto3 gives a file that it has not finished a suffix of eight digits.
    found = {name: name if name in before else re.sub(r"\.[0-9a-fA-F]{8}$", "", name) for name, _ in owned.files_of(folder)}
    owned.refuse_foreign(folder, owned.foreign_files(folder, lambda name: found[name] in before))
    for name, finished in found.items():
        if name != MANIFEST and (name != finished or name not in names):
            (folder / name).unlink()


def _manifest(client: Any, source: _Object) -> tuple[bytes, MainManifest]:
    with _named(source):
        body = read_stream(client.get_object(Bucket=source.bucket, Key=source.key)["Body"], DOCUMENT)
    if sha256_bytes(body) != source.key.rpartition("/")[2].removesuffix(".json"):
        raise ArtifactError(f"{source} is not the manifest that its name says: its sha256 differs.", _AGAIN)
    try:
        return body, parse_document(body, MainManifest, str(source))
    except ArtifactError:
        raise ArtifactError(f"{source} is not a manifest that this version of remoe reads.", _AGAIN) from None


def _download(client: Any, source: _Object, files: list[MainFile], folder: Path, on_file: Callable[[Path], None]) -> None:
    from boto3.s3.transfer import TransferConfig, create_transfer_manager

    config = TransferConfig(
        multipart_threshold=RANGE_BYTES,
        multipart_chunksize=RANGE_BYTES,
        max_concurrency=_CONNECTIONS,
        preferred_transfer_client="classic",
    )
    with ThreadPoolExecutor(_DIGESTS) as pool, create_transfer_manager(client, config) as transfers:  # which cancels all upon an error

        def finish(file: MainFile, transfer: Any) -> None:
            at = source.beside(file)
            with _named(at):
                transfer.result()
            _check(folder / file.name, file, str(at))
            on_file(folder / file.name)

        started = [(f, transfers.download(source.bucket, source.beside(f).key, str(folder / f.name))) for f in files]
        ended = [pool.submit(finish, file, transfer) for file, transfer in started]
        for each in ended:
            each.result()


def _is_right(path: Path, file: MainFile) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes and sha256_file(path) == file.sha256


def _check(path: Path, file: MainFile, name: str) -> None:
    if not path.is_file():
        raise ArtifactError(f"{name} is missing.", _AGAIN)
    if not _is_right(path, file):
        raise ArtifactError(f"{name} is not the file that the manifest names: its size or sha256 differs.", _AGAIN)


def _refuse_full(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise _no_room(folder, f"{size(needed_bytes)} are needed, {size(free)} are free")


def _no_room(folder: Path, why: str) -> DeployError:
    return DeployError(
        f"There is no room in {folder} for the main function's files: {why}.",
        "Give the main function more storage: a larger instance, or on Lambda more ephemeral storage.",
    )


@contextmanager
def _named(at: _Object) -> Iterator[None]:
    """Turn errors of S3 and of the disk into RemoeErrors that name the object."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code in ("404", "NoSuchKey", "NoSuchBucket"):
            raise DeployError(f"{at} is missing.", _AGAIN) from None
        if code in ("403", "AccessDenied"):
            raise DeployError(
                f"{at} may not be read: access denied.",
                "The main function's role needs s3:GetObject on it; a missing object looks the same.",
            ) from None
        raise DeployError(
            f"{at} cannot be fetched: {code}: {error.response['Error'].get('Message', 'no message')}.", "Try again."
        ) from None
    except BotoCoreError as error:
        raise DeployError(f"{at} cannot be fetched: {error}", "Check the credentials, the region and the network.") from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _no_room(Path(error.filename or "/tmp").parent, "the disk is full") from None

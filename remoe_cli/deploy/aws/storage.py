"""A deployment's bucket: create it private, upload what is missing, delete, empty and remove.

An object's key names a digest of its content (names.py), and so does its metadata: an object with the right digest is never sent again.
Large objects are sent in parts, and a part that has arrived is never sent again either, whoever began the upload. S3 gets the digest of
everything that it is sent, and refuses damaged content. This module does not know what the objects are.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from remoe_cli import artifacts, bounded
from remoe_cli.deploy.aws import names
from remoe_cli.deploy.aws.session import Account, code_of
from remoe_cli.errors import DeployError, HeldError
from remoe_cli.progress import Report

PART_BYTES = 16 * 2**20
_AT_ONCE = 8
_ABANDONED_DAYS = 7  # after which S3 drops an upload that nobody has completed, and its parts are billed no more
_GONE = ("404", "NoSuchBucket", "NoSuchKey", "NotFound")


@dataclass(frozen=True)
class Object:
    """An object that the bucket is to hold under `key`: a file, or bytes.

    sha256   digest of its bytes, or of their meaning where other bytes may mean the same (package/dependencies.py)
    """

    key: str
    source: Path | bytes
    size_bytes: int
    sha256: str

    def read(self, start: int, end: int) -> bytes:
        if isinstance(self.source, bytes):
            return self.source[start:end]
        with self.source.open("rb") as file:
            file.seek(start)
            return file.read(end - start)


@dataclass(frozen=True)
class Stored:
    """An object that the bucket holds, and since when."""

    key: str
    size_bytes: int
    since: datetime


def object_of(key: str, source: bytes) -> Object:
    return Object(key, source, len(source), artifacts.sha256_bytes(source))


@dataclass(frozen=True)
class Bucket:
    """The bucket `name`. Every call names its owner, so a bucket of another account is never used."""

    account: Account
    name: str

    @property
    def client(self) -> Any:
        return self.account.client("s3")

    @property
    def _it(self) -> dict[str, str]:
        return {"Bucket": self.name, "ExpectedBucketOwner": self.account.id}

    def url(self, key: str) -> str:
        """Return where CloudFormation finds an object, such as a template."""
        return f"https://{self.name}.s3.{self.account.region}.{self.account.suffix}/{key}"

    def tags(self) -> dict[str, str] | None:
        """Return the bucket's tags; None if there is no such bucket.

        Raises: DeployError for a bucket of another account.
        """
        try:
            return {tag["Key"]: tag["Value"] for tag in self.client.get_bucket_tagging(**self._it)["TagSet"]}
        except ClientError as error:
            if code_of(error) == "NoSuchTagSet":
                return {}
            if code_of(error) in _GONE:
                return None
            if code_of(error) in ("403", "AccessDenied"):
                raise DeployError(
                    f"The bucket {self.name} is not account {self.account.id}'s, or may not be read: {error}.",
                    "Choose another --name, or ask for the permission s3:GetBucketTagging.",
                ) from error
            raise

    def make(self, tags: Mapping[str, str]) -> None:
        """Create the bucket, or finish creating it: nothing public, everything encrypted.

        It is tagged last, so that its tags say that it is complete.
        """
        place = {} if self.account.region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": self.account.region}}
        try:
            self.client.create_bucket(Bucket=self.name, **place)
        except ClientError as error:
            if code_of(error) == "OperationAborted":
                message = f"The bucket {self.name} is being made or deleted by somebody else at this moment."
                raise HeldError(message, "Run the command again in a minute.") from error
            if code_of(error) != "BucketAlreadyOwnedByYou":
                raise
        closed = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
        self.client.put_public_access_block(**self._it, PublicAccessBlockConfiguration=dict.fromkeys(closed, True))
        rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}
        self.client.put_bucket_encryption(**self._it, ServerSideEncryptionConfiguration={"Rules": [rule]})
        if self.client.meta.endpoint_url.startswith("https:"):
            self.client.put_bucket_policy(**self._it, Policy=json.dumps(self._tls_only()))
        dropped = {"ID": "abandoned-uploads", "Status": "Enabled", "Filter": {"Prefix": ""}}
        dropped["AbortIncompleteMultipartUpload"] = {"DaysAfterInitiation": _ABANDONED_DAYS}
        self.client.put_bucket_lifecycle_configuration(**self._it, LifecycleConfiguration={"Rules": [dropped]})
        self.tag(tags)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Replace the bucket's tags."""
        if not tags:
            self.client.delete_bucket_tagging(**self._it)
            return
        self.client.put_bucket_tagging(**self._it, Tagging={"TagSet": [{"Key": key, "Value": value} for key, value in tags.items()]})

    def _tls_only(self) -> dict[str, Any]:
        arn = f"arn:{self.client.meta.partition}:s3:::{self.name}"
        statement = {
            "Sid": "OnlyOverTLS",
            "Effect": "Deny",
            "Principal": "*",
            "Action": "s3:*",
            "Resource": [arn, f"{arn}/*"],
            "Condition": {"Bool": {"aws:SecureTransport": "false"}},
        }
        return {"Version": "2012-10-17", "Statement": [statement]}

    def keys(self, folder: str) -> list[str]:
        """List the keys directly in `folder`, such as main/, the latest first."""
        found = self._listed(Prefix=folder, Delimiter="/")
        return [each.key for each in sorted(found, key=lambda each: each.since, reverse=True)]

    def stored(self) -> list[Stored]:
        """List all objects."""
        return self._listed()

    def _listed(self, **which: str) -> list[Stored]:
        pages = self.client.get_paginator("list_objects_v2").paginate(**self._it, **which)
        return [Stored(each["Key"], each["Size"], each["LastModified"]) for page in pages for each in page.get("Contents", ())]

    def read(self, key: str) -> bytes:
        """Read a small object.

        Raises: LimitError for one that is too large.
        """
        return bounded.read_stream(self.client.get_object(**self._it, Key=key)["Body"], bounded.DOCUMENT)

    def missing(self, objects: Iterable[Object]) -> tuple[Object, ...]:
        """Return the objects that are not there, or have another digest. Changes nothing."""
        objects = tuple(objects)
        with _pool() as pool:
            return tuple(each for each, there in zip(objects, pool.map(self._holds, objects), strict=True) if not there)

    def _holds(self, what: Object) -> bool:
        try:
            head = self.client.head_object(**self._it, Key=what.key)
        except ClientError as error:
            if code_of(error) in _GONE:
                return False
            raise
        # S3 has held every byte against its checksum when it was sent, and whoever puts another object there knows nothing of this one.
        return bool(head["Metadata"].get("sha256") == what.sha256)

    def upload(self, objects: Sequence[Object], report: Report = lambda done, total, what="": None) -> None:
        """Upload objects and report the bytes sent. What an earlier upload sent is not sent again."""
        count = _Counter(sum(each.size_bytes for each in objects), report)
        with _pool() as pool:
            small = [each for each in objects if each.size_bytes <= PART_BYTES]
            list(pool.map(partial(self._put, count), small))
            for each in objects:
                if each.size_bytes > PART_BYTES:
                    self._put_in_parts(count, pool, each)

    def _put(self, count: _Counter, what: Object) -> None:
        body = what.read(0, what.size_bytes)
        self.client.put_object(**self._it, Key=what.key, Body=body, ChecksumSHA256=_checksum(body), Metadata={"sha256": what.sha256})
        count.add(len(body))

    def _put_in_parts(self, count: _Counter, pool: ThreadPoolExecutor, what: Object) -> None:
        upload = {**self._it, "Key": what.key, "UploadId": self._begun(what) or self._begin(what)}
        arrived = {
            part["PartNumber"]: part
            for page in self.client.get_paginator("list_parts").paginate(**upload)
            for part in page.get("Parts", ())
        }

        def send(number: int) -> dict[str, Any]:
            body = what.read((number - 1) * PART_BYTES, min(number * PART_BYTES, what.size_bytes))
            part = {"PartNumber": number, "ChecksumSHA256": _checksum(body)}
            there = arrived.get(number, {})
            if there.get("ChecksumSHA256") != part["ChecksumSHA256"]:
                there = self.client.upload_part(**upload, **part, Body=body)
            count.add(len(body))
            return {**part, "ETag": there["ETag"]}

        parts = list(pool.map(send, range(1, -(-what.size_bytes // PART_BYTES) + 1)))
        try:
            self.client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except ClientError as error:
            # Somebody who deploys the same model at the same time has completed the same upload.
            if code_of(error) != "NoSuchUpload" or not self._holds(what):
                raise

    def _begin(self, what: Object) -> str:
        upload = self.client.create_multipart_upload(**self._it, Key=what.key, ChecksumAlgorithm="SHA256", Metadata={"sha256": what.sha256})
        return str(upload["UploadId"])

    def _begun(self, what: Object) -> str | None:
        """Return the latest unfinished upload of this very object."""
        begun = [upload for upload in self._uploads(Prefix=what.key) if upload["Key"] == what.key]
        return max(begun, key=lambda upload: upload["Initiated"])["UploadId"] if begun else None

    def _uploads(self, **which: str) -> Iterator[dict[str, Any]]:
        for page in self.client.get_paginator("list_multipart_uploads").paginate(**self._it, **which):
            yield from page.get("Uploads", ())

    def delete(self, keys: Sequence[str]) -> None:
        """Delete up to 1,000 objects, which need not be there.

        Raises: DeployError for the first object that S3 keeps.
        """
        _refused(self.client.delete_objects(**self._it, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True}))

    def foreign(self) -> list[str]:
        """List the keys of objects that remoe did not put there."""
        return [each.key for each in self.stored() if not names.is_key(each.key)]

    def remove(self) -> list[str]:
        """Remove the bucket, if there is one, with everything in it that is remoe's.

        That is all objects, versions and unfinished uploads. Where it holds other objects, it stays with them, without the tags of remoe;
        their keys are returned.
        """
        kept: set[str] = set()
        try:
            for upload in self._uploads():
                if names.is_key(upload["Key"]):
                    self.client.abort_multipart_upload(**self._it, Key=upload["Key"], UploadId=upload["UploadId"])
            for page in self.client.get_paginator("list_object_versions").paginate(**self._it):
                found = [{"Key": each["Key"], "VersionId": each["VersionId"]} for kind in _KINDS for each in page.get(kind, ())]
                kept |= {each["Key"] for each in found if not names.is_key(each["Key"])}
                if ours := [each for each in found if each["Key"] not in kept]:
                    _refused(self.client.delete_objects(**self._it, Delete={"Objects": ours, "Quiet": True}))
            if kept:
                own = (names.DEPLOYMENT_TAG, names.DESTROYER_TAG)
                self.tag({key: value for key, value in (self.tags() or {}).items() if key not in own})
            else:
                self.client.delete_bucket(**self._it)
        except ClientError as error:
            if code_of(error) not in _GONE:
                raise
        return sorted(kept)


_KINDS = ("Versions", "DeleteMarkers")


def _refused(answer: Mapping[str, Any]) -> None:
    if errors := answer.get("Errors"):
        first = errors[0]
        message = f"S3 does not delete {first['Key']}: {first.get('Message') or first['Code']}."
        raise DeployError(message, "Fix that, then run the command again.")


def _checksum(body: bytes) -> str:
    return base64.b64encode(hashlib.sha256(body).digest()).decode()


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Make threads that end after their current call when something fails or the user interrupts."""
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class _Counter:
    """Adds up the bytes that all threads have sent, and reports them."""

    def __init__(self, total: int, report: Report) -> None:
        self._done, self._total, self._report, self._lock = 0, total, report, threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._report(self._done, self._total)

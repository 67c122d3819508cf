"""A deployment's bucket: create it private, upload what is missing, delete, empty and remove.

An object's key names a digest of its content (names.py), and so does its metadata: an object with the right digest is never sent again.
Large objects are sent in parts, and a part that has arrived is never sent again either, whoever began the upload. S3 gets the digest of
everything that it is sent, and refuses damaged content. This module does not know what the objects are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from remoe_cli import bounded
from remoe_cli.deploy.account_rules import AccountRules
from remoe_cli.deploy.aws import names
from remoe_cli.deploy.aws.objects import AT_ONCE, Counter, Object, Stored, checksum, pool_of_threads
from remoe_cli.deploy.aws.session import Account, code_of, explained
from remoe_cli.errors import DeployError, HeldError, UsageError
from remoe_cli.progress import Report

PART_BYTES = 16 * 2**20
_AT_ONCE = AT_ONCE
_ABANDONED_DAYS = 7  # after which S3 drops an upload that nobody has completed, and its parts are billed no more
GONE = ("404", "NoSuchBucket", "NoSuchKey", "NotFound")


@dataclass(frozen=True)
class Bucket:
    """The bucket `name`. Every call names its owner, so a bucket of another account is never used.

    prefix    what all keys in it begin with. Callers give and get keys without it.
    kms_key   the key that encrypts its objects; None: S3's own
    is_own    it is the user's: it is never made, tagged, emptied of other things, or deleted
    """

    account: Account
    name: str
    prefix: str = ""
    kms_key: str | None = None
    is_own: bool = False

    @classmethod
    def of(cls, account: Account, name: str, rules: AccountRules) -> Bucket:
        """Return the bucket of the deployment `name`."""
        found = rules.bucket or names.bucket(name, account.id, account.region)
        return cls(account, found, names.prefix(name, rules.bucket), rules.kms_key, rules.bucket is not None)

    @property
    def client(self) -> Any:
        return self.account.client("s3")

    @property
    def _it(self) -> dict[str, str]:
        return {"Bucket": self.name, "ExpectedBucketOwner": self.account.id}

    def url(self, key: str) -> str:
        """Return where CloudFormation finds an object, such as a template."""
        return f"https://{self.name}.s3.{self.account.region}.{self.account.suffix}/{self.prefix}{key}"

    def uri(self, key: str) -> str:
        return f"s3://{self.name}/{self.prefix}{key}"

    def _at(self, key: str) -> dict[str, str]:
        return {**self._it, "Key": self.prefix + key}

    @property
    def _encrypted(self) -> dict[str, str]:
        return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self.kms_key} if self.kms_key else {}

    def check_own(self) -> None:
        """Check that the user's bucket can be used, before anything is sent.

        Raises: UsageError for a bucket that is not there, in another region or of another account.
        """
        hint = "Give another --bucket, or leave it out: remoe then makes one."
        try:
            answer = self.client.head_bucket(**self._it)
            region = answer.get("BucketRegion") or self.client.get_bucket_location(**self._it).get("LocationConstraint") or "us-east-1"
        except ClientError as error:
            if code_of(error) in GONE:
                raise UsageError(f"There is no bucket {self.name}.", hint) from error
            if code_of(error) in ("403", "AccessDenied"):
                why = f"is not account {self.account.id}'s, or these credentials may not use it"
                raise UsageError(f"The bucket {self.name} {why}.", hint) from error
            if code_of(error) not in ("301", "PermanentRedirect", "400"):
                raise
            region = "another region"
        if region != self.account.region:
            message = f"The bucket {self.name} is in {region}, and functions of {self.account.region} cannot be made from there."
            raise UsageError(message, hint)

    def tags(self) -> dict[str, str] | None:
        """Return the bucket's tags; None if there is no such bucket. The user's own has none of remoe's.

        Raises: DeployError for a bucket of another account.
        """
        if self.is_own:
            return {}
        try:
            return {tag["Key"]: tag["Value"] for tag in self.client.get_bucket_tagging(**self._it)["TagSet"]}
        except ClientError as error:
            if code_of(error) == "NoSuchTagSet":
                return {}
            if code_of(error) in GONE:
                return None
            if code_of(error) in ("403", "AccessDenied"):
                raise DeployError(
                    f"The bucket {self.name} is not account {self.account.id}'s, or may not be read: {error}.",
                    "Choose another --name, or ask for the permission s3:GetBucketTagging.",
                ) from error
            raise

    def make(self, tags: Mapping[str, str], before: Mapping[str, str] | None = None) -> None:
        """Create the bucket, or finish creating it: nothing public, everything encrypted.

        It is tagged last, so that its tags say that it is complete. `before` are the tags that it has; None: it is not there. Then it is
        taken back where a setting is refused.

        Raises: DeployError for a refused setting; it says what became of the bucket.
        """
        is_new = self._create() and before is None
        try:
            self._close()
            self.tag(dict(before or {}) | dict(tags))
        except (ClientError, BotoCoreError) as error:
            if not is_new:
                raise
            raise self._taken_back(error) from error

    def _taken_back(self, error: ClientError | BotoCoreError) -> DeployError:
        """Delete the bucket that has just been made, and say why and whether it is gone."""
        what = explained(error, self.account.origin)
        try:
            self.client.delete_bucket(**self._it)
        except (ClientError, BotoCoreError) as second:
            stays = f"The bucket {self.name} had been made, and stays, empty: {explained(second).message}"
            return DeployError(f"{what.message} {stays}", f"{what.hint} 'aws s3 rb s3://{self.name}' deletes the bucket.")
        return DeployError(f"{what.message} The bucket {self.name} had been made, and is gone again.", what.hint)

    def _create(self) -> bool:
        """Create the bucket; return whether it was not there."""
        place = {} if self.account.region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": self.account.region}}
        try:
            self.client.create_bucket(Bucket=self.name, **place)
        except ClientError as error:
            if code_of(error) == "OperationAborted":
                message = f"The bucket {self.name} is being made or deleted by somebody else at this moment."
                raise HeldError(message, "Run the command again in a minute.") from error
            if code_of(error) != "BucketAlreadyOwnedByYou":
                raise
            return False
        return True

    def _close(self) -> None:
        closed = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
        self.client.put_public_access_block(**self._it, PublicAccessBlockConfiguration=dict.fromkeys(closed, True))
        rule: dict[str, Any] = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}
        if self.kms_key:
            default = {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": self.kms_key}
            rule = {"ApplyServerSideEncryptionByDefault": default, "BucketKeyEnabled": True}
        self.client.put_bucket_encryption(**self._it, ServerSideEncryptionConfiguration={"Rules": [rule]})
        if self.client.meta.endpoint_url.startswith("https:"):
            self.client.put_bucket_policy(**self._it, Policy=json.dumps(self._tls_only()))
        dropped = {"ID": "abandoned-uploads", "Status": "Enabled", "Filter": {"Prefix": ""}}
        dropped["AbortIncompleteMultipartUpload"] = {"DaysAfterInitiation": _ABANDONED_DAYS}
        self.client.put_bucket_lifecycle_configuration(**self._it, LifecycleConfiguration={"Rules": [dropped]})

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
        which["Prefix"] = self.prefix + which.get("Prefix", "")
        pages = self.client.get_paginator("list_objects_v2").paginate(**self._it, **which)
        found = [each for page in pages for each in page.get("Contents", ())]
        return [Stored(each["Key"].removeprefix(self.prefix), each["Size"], each["LastModified"]) for each in found]

    def read(self, key: str) -> bytes:
        """Read a small object.

        Raises: LimitError for one that is too large.
        """
        return bounded.read_stream(self.get(key)["Body"], bounded.DOCUMENT)

    def get(self, key: str) -> dict[str, Any]:
        return dict(self.client.get_object(**self._at(key)))

    def put_small(self, key: str, body: bytes, **condition: str) -> None:
        """Put an object, under a condition on what is there."""
        self.client.put_object(**self._at(key), Body=body, **self._encrypted, **condition)

    def missing(self, objects: Iterable[Object]) -> tuple[Object, ...]:
        """Return the objects that are not there, or have another digest. Changes nothing."""
        objects = tuple(objects)
        with pool_of_threads(_AT_ONCE) as pool:
            return tuple(each for each, there in zip(objects, pool.map(self._holds, objects), strict=True) if not there)

    def _holds(self, what: Object) -> bool:
        try:
            head = self.client.head_object(**self._at(what.key))
        except ClientError as error:
            if code_of(error) in GONE:
                return False
            raise
        # S3 has held every byte against its checksum when it was sent, and whoever puts another object there knows nothing of this one.
        return bool(head["Metadata"].get("sha256") == what.sha256)

    def upload(self, objects: Sequence[Object], report: Report = lambda done, total, what="": None) -> None:
        """Upload objects and report the bytes sent. What an earlier upload sent is not sent again."""
        count = Counter(sum(each.size_bytes for each in objects), report)
        with pool_of_threads(_AT_ONCE) as pool:
            small = [each for each in objects if each.size_bytes <= PART_BYTES]
            list(pool.map(partial(self._put, count), small))
            for each in objects:
                if each.size_bytes > PART_BYTES:
                    self._put_in_parts(count, pool, each)

    def _put(self, count: Counter, what: Object) -> None:
        body = what.read(0, what.size_bytes)
        given = {"Body": body, "ChecksumSHA256": checksum(body), "Metadata": {"sha256": what.sha256}}
        self.client.put_object(**self._at(what.key), **given, **self._encrypted)
        count.add(len(body))

    def _put_in_parts(self, count: Counter, pool: ThreadPoolExecutor, what: Object) -> None:
        upload = {**self._at(what.key), "UploadId": self._begun(what) or self._begin(what)}
        arrived = {
            part["PartNumber"]: part
            for page in self.client.get_paginator("list_parts").paginate(**upload)
            for part in page.get("Parts", ())
        }

        def send(number: int) -> dict[str, Any]:
            body = what.read((number - 1) * PART_BYTES, min(number * PART_BYTES, what.size_bytes))
            part = {"PartNumber": number, "ChecksumSHA256": checksum(body)}
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
        given = {"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": what.sha256}}
        upload = self.client.create_multipart_upload(**self._at(what.key), **given, **self._encrypted)
        return str(upload["UploadId"])

    def _begun(self, what: Object) -> str | None:
        """Return the latest unfinished upload of this very object."""
        key = self.prefix + what.key
        begun = [upload for upload in self._uploads(Prefix=key) if upload["Key"] == key]
        return max(begun, key=lambda upload: upload["Initiated"])["UploadId"] if begun else None

    def _uploads(self, **which: str) -> Iterator[dict[str, Any]]:
        for page in self.client.get_paginator("list_multipart_uploads").paginate(**self._it, **which):
            yield from page.get("Uploads", ())

    def delete(self, keys: Sequence[str]) -> None:
        """Delete up to 1,000 objects, which need not be there.

        Raises: DeployError for the first object that S3 keeps.
        """
        _refused(self.client.delete_objects(**self._it, Delete={"Objects": [{"Key": self.prefix + key} for key in keys], "Quiet": True}))

    def drop(self, key: str) -> None:
        """Delete one object, which need not be there."""
        self.client.delete_object(**self._at(key))

    def foreign(self) -> list[str]:
        """List the keys of objects that remoe did not put there."""
        return [each.key for each in self.stored() if not names.is_key(each.key)]

    def remove_empty(self) -> bool:
        """Delete the bucket if it holds nothing, and return whether that is so. The user's own bucket stays."""
        if self.is_own:
            return not self.stored()
        try:
            self.client.delete_bucket(**self._it)
        except ClientError as error:
            if code_of(error) == "BucketNotEmpty":
                return False
            if code_of(error) not in GONE:
                raise
        return True

    def remove(self) -> list[str]:
        """Remove the bucket, if there is one, with everything in it that is remoe's; the lock goes last.

        That is all objects, versions and unfinished uploads. Where it holds other objects, it stays with them, without the tags of remoe;
        their keys are returned. The user's own bucket stays as well.
        """
        kept: set[str] = set()
        locks: list[dict[str, str]] = []
        try:
            for upload in self._uploads(Prefix=self.prefix):
                if names.is_key(upload["Key"].removeprefix(self.prefix)):
                    self.client.abort_multipart_upload(**self._it, Key=upload["Key"], UploadId=upload["UploadId"])
            for page in self.client.get_paginator("list_object_versions").paginate(**self._it, Prefix=self.prefix):
                found = [{"Key": each["Key"], "VersionId": each["VersionId"]} for kind in _KINDS for each in page.get(kind, ())]
                kept |= {each["Key"] for each in found if not names.is_key(each["Key"].removeprefix(self.prefix))}
                ours = [each for each in found if each["Key"] not in kept]
                locks += [each for each in ours if each["Key"] == self.prefix + names.LOCK_KEY]
                self._delete_versions([each for each in ours if each not in locks])
            self._delete_versions(locks)
            if self.is_own:
                return sorted(kept)
            if kept:
                self.tag({key: value for key, value in (self.tags() or {}).items() if key != names.DEPLOYMENT_TAG})
            else:
                self.client.delete_bucket(**self._it)
        except ClientError as error:
            if code_of(error) == "BucketNotEmpty":
                message = f"The bucket {self.name} has got new objects while it was emptied: somebody deploys into it."
                raise HeldError(message, "When that is done, run the command again.") from error
            if code_of(error) not in GONE:
                raise
        return sorted(kept)

    def _delete_versions(self, versions: list[dict[str, str]]) -> None:
        for first in range(0, len(versions), _DELETED_AT_ONCE):
            some = versions[first : first + _DELETED_AT_ONCE]
            _refused(self.client.delete_objects(**self._it, Delete={"Objects": some, "Quiet": True}))


_DELETED_AT_ONCE = 1000
_KINDS = ("Versions", "DeleteMarkers")


def _refused(answer: Mapping[str, Any]) -> None:
    if errors := answer.get("Errors"):
        first = errors[0]
        message = f"S3 does not delete {first['Key']}: {first.get('Message') or first['Code']}."
        raise DeployError(message, "Fix that, then run the command again.")

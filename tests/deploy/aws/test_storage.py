"""The bucket: private, filled once, whole or not at all, and gone without remains."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.stub import ANY, Stubber

from remoe_cli.deploy.aws import names, storage
from remoe_cli.deploy.aws.objects import Object, object_of
from remoe_cli.deploy.aws.session import Account, plain_errors
from remoe_cli.deploy.aws.storage import Bucket
from remoe_cli.errors import DeployError
from tests.support import aws_account as aws

PART_BYTES = 5 * 2**20  # S3 takes none that is smaller, but for the last
TAGS = {"remoe:deployment": "d", "remoe:plan": "p"}


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def account(moto_url: str) -> Iterator[Account]:
    with pytest.MonkeyPatch.context() as patch:
        aws.use(patch, moto_url)
        patch.setattr(storage, "PART_BYTES", PART_BYTES)
        yield aws.connect(lambda name: on_call(name))


calls: list[str] = []
interrupt_at: list[str] = []


def on_call(name: str) -> None:
    calls.append(name)
    if name in interrupt_at and calls.count(name) >= 2:
        raise Interrupted


@pytest.fixture
def bucket(account: Account, request: pytest.FixtureRequest) -> Iterator[Bucket]:
    bucket = Bucket(account, f"remoe-{abs(hash(request.node.name))}")
    bucket.make(TAGS)
    calls.clear()
    yield bucket
    interrupt_at.clear()
    if bucket.tags() is not None:
        _delete_all(bucket)


def _delete_all(bucket: Bucket) -> None:
    """Also what remoe did not put there."""
    for upload in bucket._uploads():
        bucket.client.abort_multipart_upload(Bucket=bucket.name, Key=upload["Key"], UploadId=upload["UploadId"])
    found = bucket.client.list_object_versions(Bucket=bucket.name)
    for each in (*found.get("Versions", ()), *found.get("DeleteMarkers", ())):
        bucket.client.delete_object(Bucket=bucket.name, Key=each["Key"], VersionId=each["VersionId"])
    bucket.client.delete_bucket(Bucket=bucket.name)


def test_a_new_bucket_is_closed_encrypted_and_tagged(bucket: Bucket) -> None:
    assert bucket.tags() == TAGS
    client = bucket.client
    assert set(client.get_public_access_block(Bucket=bucket.name)["PublicAccessBlockConfiguration"].values()) == {True}
    rule = client.get_bucket_encryption(Bucket=bucket.name)["ServerSideEncryptionConfiguration"]["Rules"][0]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    (rule,) = client.get_bucket_lifecycle_configuration(Bucket=bucket.name)["Rules"]
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}
    assert (rule["Status"], rule["Filter"]) == ("Enabled", {"Prefix": ""})
    assert not {"Expiration", "Transitions"} & rule.keys()  # what is complete stays
    bucket.make({**TAGS, "remoe:plan": "q"})  # again, as after an interruption
    assert bucket.tags() == {**TAGS, "remoe:plan": "q"}


def test_only_what_is_missing_is_uploaded(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1000)
    file = replace(object_of("in/a/folder", b"x" * 1000), source=tmp_path / "file")
    objects = [object_of("a", b"1"), object_of("empty", b""), file]
    assert bucket.missing(objects) == tuple(objects)
    bucket.upload(objects)
    assert bucket.missing(objects) == ()
    # Other bytes that mean the same, as those of a zip that was made on another machine.
    assert bucket.missing([replace(objects[0], source=b"one", size_bytes=3)]) == ()
    # Another size, or the same size of something else.
    changed = [object_of("a", b"22"), object_of("in/a/folder", b"y" * 1000)]
    assert bucket.missing(changed) == tuple(changed)
    assert bucket.client.get_object(Bucket=bucket.name, Key="in/a/folder")["Body"].read() == b"x" * 1000


def large() -> Object:
    return object_of("large", b"".join(bytes([n]) * PART_BYTES for n in range(2)) + b"the rest")


def test_a_large_object_goes_on_where_it_was_interrupted(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_AT_ONCE", 1)
    what, reported = large(), []
    interrupt_at.append("UploadPart")
    with pytest.raises(Interrupted):
        bucket.upload([what])
    assert bucket.missing([what]) == (what,)
    interrupt_at.clear()
    calls.clear()
    bucket.upload([what], lambda done, total: reported.append((done, total)))
    assert (calls.count("CreateMultipartUpload"), calls.count("UploadPart")) == (0, 2)
    assert reported == [(PART_BYTES, what.size_bytes), (2 * PART_BYTES, what.size_bytes), (what.size_bytes, what.size_bytes)]
    assert bucket.missing([what]) == ()
    assert bucket.client.get_object(Bucket=bucket.name, Key="large")["Body"].read() == what.source
    # Of another large object that had the same key, nothing is taken.
    interrupt_at.append("UploadPart")
    calls.clear()
    other = object_of("large", bytes(2 * PART_BYTES + 1))
    with pytest.raises(Interrupted):
        bucket.upload([replace(other, source=b"z" * other.size_bytes)])
    interrupt_at.clear()
    calls.clear()
    bucket.upload([other])
    assert calls.count("UploadPart") == 3
    assert bucket.client.get_object(Bucket=bucket.name, Key="large")["Body"].read() == other.source


@pytest.mark.parametrize("operation", ["PutObject", "UploadPart"])
def test_s3_refuses_what_arrives_damaged(operation: str, bucket: Bucket) -> None:
    def damage(request: Any, **_: Any) -> None:
        request.body = b"X" + request.body.read()[1:]

    event = f"before-send.s3.{operation}"
    bucket.client.meta.events.register(event, damage)
    what = large() if operation == "UploadPart" else object_of("a", b"small")
    try:
        with pytest.raises(DeployError, match=f"refused {operation}: .*did not match the calculated checksum"), plain_errors():
            bucket.upload([what])
    finally:
        bucket.client.meta.events.unregister(event, damage)
    assert bucket.missing([what]) == (what,)


def test_a_bucket_is_removed_with_versions_and_unfinished_uploads(bucket: Bucket) -> None:
    bucket.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
    key = names.code_key("0" * 64)
    bucket.upload([object_of(key, b"1")])
    bucket.upload([object_of(key, b"2")])
    bucket.client.delete_object(Bucket=bucket.name, Key=key)
    bucket.client.create_multipart_upload(Bucket=bucket.name, Key=names.shard_key("layer-000", "0" * 64))
    assert bucket.remove() == []
    assert bucket.tags() is None
    assert calls.count("AbortMultipartUpload") == 1
    assert bucket.remove() == []  # there need not be one


def test_what_remoe_did_not_put_there_keeps_the_bucket(bucket: Bucket) -> None:
    bucket.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
    bucket.upload([object_of(names.code_key("0" * 64), b"1")])
    others = ("thesis.tex", "main/thesis.tex", "code/mine.zip", f"functions/{'0' * 64}.safetensors")
    for key in others:
        for content in (b"first", b"years of work"):
            bucket.client.put_object(Bucket=bucket.name, Key=key, Body=content)
    bucket.client.create_multipart_upload(Bucket=bucket.name, Key="mine")
    bucket.tag({names.DEPLOYMENT_TAG: "x", "team": "ours"})
    assert bucket.remove() == sorted(others) == sorted(bucket.foreign())
    assert [each.key for each in bucket.stored()] == sorted(others) and bucket.read("thesis.tex") == b"years of work"
    assert len(bucket.client.list_object_versions(Bucket=bucket.name)["Versions"]) == 2 * len(others)
    assert [upload["Key"] for upload in bucket._uploads()] == ["mine"]
    assert bucket.tags() == {"team": "ours"}
    bucket.tag({})
    assert bucket.tags() == {}


def stubbed(endpoint: str | None = None, region: str = "us-east-1") -> tuple[Bucket, Stubber]:
    session = boto3.Session(aws_access_key_id="key", aws_secret_access_key="secret", region_name=region)
    client = session.client("s3", endpoint_url=endpoint)
    return Bucket(Account(session, region, "123456789012", "arn:aws:iam::123456789012:user/me", {"s3": client}), "b"), Stubber(client)


OURS = {"Bucket": "b", "ExpectedBucketOwner": "123456789012"}


def test_over_https_only_https_is_allowed() -> None:
    bucket, stub = stubbed("https://s3.eu-west-1.amazonaws.com", "eu-west-1")
    stub.add_client_error("create_bucket", "BucketAlreadyOwnedByYou")
    settings = {
        "put_public_access_block": "PublicAccessBlockConfiguration",
        "put_bucket_encryption": "ServerSideEncryptionConfiguration",
        "put_bucket_policy": "Policy",
        "put_bucket_lifecycle_configuration": "LifecycleConfiguration",
        "put_bucket_tagging": "Tagging",
    }
    for call, given in settings.items():
        stub.add_response(call, {}, {**OURS, given: ANY})
    policies: list[Any] = []
    bucket.client.meta.events.register("provide-client-params.s3.PutBucketPolicy", lambda params, **_: policies.append(params["Policy"]))
    with stub:
        bucket.make(TAGS)
    stub.assert_no_pending_responses()
    (statement,) = json.loads(policies[0])["Statement"]
    assert (statement["Effect"], statement["Condition"]) == ("Deny", {"Bool": {"aws:SecureTransport": "false"}})
    assert statement["Resource"] == ["arn:aws:s3:::b", "arn:aws:s3:::b/*"]


def test_the_bucket_of_another_account_is_not_used() -> None:
    bucket, stub = stubbed()
    stub.add_client_error("get_bucket_tagging", "AccessDenied", http_status_code=403, expected_params=OURS)
    with stub, pytest.raises(DeployError, match="bucket b is not account 123456789012's"):
        bucket.tags()


def test_an_upload_that_somebody_else_completes_is_complete() -> None:
    bucket, stub = stubbed()
    what = replace(object_of("k", b"12345"), size_bytes=storage.PART_BYTES + 1)
    upload = {**OURS, "Key": "k", "UploadId": "u"}
    found = {
        "Uploads": [{"Key": "k", "UploadId": "u", "Initiated": "2026-05-01"}, {"Key": "k2", "UploadId": "v", "Initiated": "2026-05-02"}]
    }
    stub.add_response("list_multipart_uploads", found, {**OURS, "Prefix": "k"})
    stub.add_response("list_parts", {}, upload)
    for number in (1, 2):
        part = {"PartNumber": number, "ChecksumSHA256": ANY, "Body": ANY}
        stub.add_response("upload_part", {"ETag": f"e{number}"}, {**upload, **part})
    stub.add_client_error("complete_multipart_upload", "NoSuchUpload")
    head = {"ContentLength": what.size_bytes, "Metadata": {"sha256": what.sha256}}
    stub.add_response("head_object", head, {**OURS, "Key": "k"})
    with stub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_AT_ONCE", 1)
        bucket.upload([what])
    stub.assert_no_pending_responses()

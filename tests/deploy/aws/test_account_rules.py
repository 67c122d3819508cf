"""What companies demand of everything in their accounts: boundaries, tags, paths, keys, buckets and networks of their own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.artifacts import write_json
from remoe_cli.cli import app
from remoe_cli.deploy.account_rules import AccountRules, account_rules, recorded_in
from remoe_cli.deploy.aws import checks, deployment, names, template
from remoe_cli.deploy.aws.session import Account
from remoe_cli.deploy.aws.settings import AwsSettings
from remoe_cli.deploy.aws.stack import Stack
from remoe_cli.deploy.aws.storage import Bucket
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.errors import DeployError, UsageError
from remoe_cli.plan.catalog.catalog import read_catalog
from tests.support import aws
from tests.support import aws_account as at_moto
from tests.support.aws_deployments import GPU, a_plan, deploy, destroy, stands
from tests.support.linted import complaints
from tests.support.synthetic import plan_by_hand

BOUNDARY = "arn:aws:iam::123456789012:policy/bound/ary"
KEY = "arn:aws:kms:us-east-1:123456789012:key/0123abcd-0123-0123-0123-0123456789ab"
VPC = {"subnets": ("subnet-0123456789abcdef0", "subnet-0123456789abcdef1"), "security_groups": ("sg-0123456789abcdef0",)}
RULES = AccountRules(BOUNDARY, "/teams/ml/", KEY, "our-bucket", (("cost center", "12/34"), ("team", "ml")), **VPC)

WRONG = (
    (("--permissions-boundary", "boundary"), "--permissions-boundary 'boundary' is no ARN of an IAM policy."),
    (("--permissions-boundary", "arn:aws:iam::1:role/x"), "is no ARN of an IAM policy."),
    (("--permissions-boundary", ""), "is no ARN of an IAM policy."),
    (("--role-path", "teams"), "--role-path 'teams' is no path of IAM."),
    (("--role-path", "/teams"), "is no path of IAM."),
    (("--role-path", "/" + "x" * 512 + "/"), "is no path of IAM."),
    (("--kms-key", "alias/mine"), "--kms-key 'alias/mine' is no ARN of a KMS key."),
    (("--kms-key", "arn:aws:kms:us-east-1:123456789012:alias/mine"), "is no ARN of a KMS key."),
    (("--bucket", "s3://mine"), "--bucket 's3://mine' is no name of a bucket that can be used here."),
    (("--bucket", "Mine"), "is no name of a bucket"),
    (("--bucket", "a.b"), "is no name of a bucket"),
    (("--tag", "team"), "--tag 'team' is not KEY=VALUE."),
    (("--tag", "=ml"), "is not KEY=VALUE."),
    (("--tag", "a=1", "--tag", "a=2"), "--tag gives 'a' twice."),
    (("--tag", "aws:a=1"), "tags that begin with aws: and remoe: are not yours to give."),
    (("--tag", "Remoe:deployment=x"), "are not yours to give."),
    (("--tag", "a=1;2"), "has characters or a length that no tag can have."),
    (("--tag", f"{'k' * 129}=1"), "has characters or a length that no tag can have."),
    (("--tag", f"k={'v' * 257}"), "has characters or a length that no tag can have."),
    (tuple(word for i in range(46) for word in ("--tag", f"k{i}=")), "There are 46 tags"),
    (("--subnet", "subnet-0123456789abcdef0"), "--subnet needs --security-group too"),
    (("--security-group", "sg-0123456789abcdef0"), "--security-group needs --subnet too"),
    (("--subnet", "mine", "--security-group", "sg-0123456789abcdef0"), "--subnet 'mine' is no id of a subnet."),
    (("--subnet", "subnet-0123456789abcdef0", "--security-group", "default"), "--security-group 'default' is no id of a security group."),
    (("--subnet", "subnet-01234567", "--subnet", "subnet-01234567", "--security-group", "sg-01234567"), "--subnet names one twice."),
    (("--kms-key", KEY, "--region", "eu-west-1"), f"The key {KEY} is not in eu-west-1"),
    (("--endpoint-image", "docker.io/remoe:1", "--region", "eu-west-1"), "is not in Amazon ECR"),
    (
        ("--endpoint-image", "123456789012.dkr.ecr.eu-west-1.amazonaws.com/remoe:1", "--region", "us-east-1"),
        "is in eu-west-1, and AWS runs it in its own region only; the deployment is in us-east-1.",
    ),
)


Remoe = Callable[..., dict[str, str]]


@pytest.fixture
def remoe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Remoe:
    """The command in this process: what is wrong with its usage."""

    def run(*arguments: str) -> dict[str, str]:
        monkeypatch.setattr(sys, "argv", ["remoe", *arguments, "--json"])
        assert app.run() == 2
        error: dict[str, str] = json.loads(capsys.readouterr().out)["error"]
        return error

    return run


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "")
def test_a_wrong_value_is_one_sentence_before_anything(options: tuple[str, ...], message: str, tmp_path: Path, remoe: Remoe) -> None:
    catalog = read_catalog("aws-us-east-1").file
    write_json(tmp_path / "p.json", plan_by_hand((), catalog=catalog, main=GPU))
    error = remoe("deploy", str(tmp_path / "p.json"), "--target", "aws", "--dry-run", *options)
    assert message in error["message"] and error["hint"] and "\n" not in error["message"]


@pytest.mark.parametrize("option", ["permissions-boundary", "role-path", "kms-key", "bucket", "tag", "subnet", "security-group"])
def test_they_go_with_aws(option: str, tmp_path: Path, remoe: Remoe) -> None:
    write_json(tmp_path / "p.json", plan_by_hand(()))
    error = remoe("deploy", str(tmp_path / "p.json"), f"--{option}", "x")
    assert error["message"] == f"--{option} goes with --target aws."


def with_rules(endpoint: Endpoint, rules: AccountRules) -> Any:
    plan = aws.plan(endpoint)
    return template.templates(plan, aws.contents(plan), replace(aws.settings(endpoint), rules=rules))


TAGGED = ("Lambda::Function", "Logs::LogGroup", "IAM::Role", "SageMaker::Model", "SageMaker::EndpointConfig", "SageMaker::Endpoint")


@pytest.mark.parametrize("endpoint", Endpoint)
def test_they_are_in_the_template(endpoint: Endpoint) -> None:
    made = with_rules(endpoint, RULES)
    assert complaints(made.root) == [] and recorded_in(made.root) == RULES
    tags = [{"Key": "cost center", "Value": "12/34"}, {"Key": "team", "Value": "ml"}]
    for kind in TAGGED:
        for resource in aws.of_type(made, kind).values():
            assert resource["Properties"]["Tags"][:2] == tags
    for role in aws.of_type(made, "IAM::Role").values():
        assert (role["Properties"]["Path"], role["Properties"]["PermissionsBoundary"]) == ("/teams/ml/", BOUNDARY)
    for policy in aws.of_type(made, "IAM::ManagedPolicy").values():
        assert policy["Properties"]["Path"] == "/teams/ml/"
    for group in aws.of_type(made, "Logs::LogGroup").values():
        assert group["Properties"]["KmsKeyId"] == KEY
    network = {"SubnetIds": list(RULES.subnets), "SecurityGroupIds": list(RULES.security_groups)}
    for function in aws.of_type(made, "Lambda::Function").values():
        own = None if "AcceleratorConfig" in function["Properties"] else network  # test_managed_instance.py has that of instances
        assert (function["Properties"].get("VpcConfig"), function["Properties"]["KmsKeyArn"]) == (own, KEY)
    for model in aws.of_type(made, "SageMaker::Model").values():
        assert model["Properties"]["VpcConfig"] == {"Subnets": network["SubnetIds"], "SecurityGroupIds": network["SecurityGroupIds"]}
    text = json.dumps(made.root)
    assert "remoe-tiny-" not in text and f"s3://our-bucket/remoe/tiny/{'functions'}/" in text
    for statement in aws.statements(made):
        match statement["Sid"]:
            case "ReadModel":
                assert all(arn["Fn::Sub"].startswith("arn:${AWS::Partition}:s3:::our-bucket/remoe/tiny/") for arn in statement["Resource"])
            case "ReadWithKey":
                assert (statement["Action"], statement["Resource"]) == (["kms:Decrypt"], [KEY])
            case "JoinNetwork":
                assert all(action.startswith("ec2:") and "*" not in action for action in statement["Action"])
    sids = [statement["Sid"] for statement in aws.statements(made)]
    not_joining = 2 * (endpoint is Endpoint.lambda_gpu)  # the main function's roles
    assert {"ReadModel", "ReadWithKey"} <= set(sids) and sids.count("JoinNetwork") == len(aws.of_type(made, "IAM::Role")) - not_joining


def test_nested_stacks_are_read_from_the_users_bucket() -> None:
    plan, contents, settings = aws.many_functions()
    made = template.templates(plan, contents, replace(settings, rules=RULES))
    urls = [stack["Properties"]["TemplateURL"]["Fn::Sub"] for stack in aws.of_type(made, "CloudFormation::Stack").values()]
    assert urls and all(url.startswith("https://our-bucket.s3.${AWS::Region}.${AWS::URLSuffix}/remoe/tiny/templates/") for url in urls)


@pytest.mark.parametrize("name", ["permissions_boundary", "role_path", "kms_key", "tags"])
def test_each_alone(name: str) -> None:
    rules = AccountRules(**{name: getattr(RULES, name)})
    made = with_rules(Endpoint.sagemaker, rules)
    assert complaints(made.root) == [] and recorded_in(made.root) == rules


def test_what_is_not_given_is_kept_and_none_takes_it_away() -> None:
    assert AccountRules().over(RULES) == RULES
    assert account_rules(role_path="/other/", tags=["a=b"]).over(RULES) == replace(RULES, role_path="/other/", tags=(("a", "b"),))
    away = account_rules("none", "none", "none", "none", ["none"], ["none"], ["none"])
    assert away.over(RULES) == AccountRules()
    assert account_rules(tags=["none="]).over(RULES).tags == (("none", ""),)  # a tag as others are
    with pytest.raises(UsageError, match="--security-group needs --subnet too"):
        account_rules(subnets=["none"]).over(RULES)
    assert recorded_in({"Resources": {}}) == AccountRules()  # of a deployment before there were rules


# In an account


@pytest.fixture(scope="module")
def ours(account: Account) -> AccountRules:
    """A policy, a key, a bucket with things in it, and a network."""
    policy = account.client("iam").create_policy(PolicyName="bound", PolicyDocument=json.dumps(POLICY))
    key = account.client("kms").create_key()["KeyMetadata"]["Arn"]
    account.client("s3").create_bucket(Bucket="our-bucket")
    ec2 = account.client("ec2")
    subnet = ec2.describe_subnets()["Subnets"][0]
    group = ec2.describe_security_groups(Filters=[{"Name": "vpc-id", "Values": [subnet["VpcId"]]}])["SecurityGroups"][0]
    return AccountRules(
        policy["Policy"]["Arn"], "/teams/ml/", key, "our-bucket", (("team", "ml"),), (subnet["SubnetId"],), (group["GroupId"],)
    )


POLICY = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
FOREIGN = ("thesis.tex", "remoe/other/code/" + "0" * 64 + ".zip", "code/" + "1" * 64 + ".zip", "remoe/rules/thesis.tex")


def objects(account: Account) -> set[str]:
    return {each["Key"] for each in account.client("s3").list_objects_v2(Bucket="our-bucket").get("Contents", ())}


def test_a_deployment_keeps_them_and_destroy_needs_none(account: Account, ours: AccountRules, calls: list[str]) -> None:
    for key in FOREIGN:
        account.client("s3").put_object(Bucket="our-bucket", Key=key, Body=b"years of work")
    tags = {"TagSet": [{"Key": "owner", "Value": "us"}]}
    account.client("s3").put_bucket_tagging(Bucket="our-bucket", Tagging=tags)
    calls.clear()
    deploy(account, "rules", a_plan(), rules=ours)
    assert not {"CreateBucket", "PutBucketTagging", "PutBucketPolicy", "PutBucketEncryption"} & set(calls)
    mine = objects(account) - set(FOREIGN)
    assert mine and all(key.startswith("remoe/rules/") and names.is_key(key.removeprefix("remoe/rules/")) for key in mine)
    head = account.client("s3").head_object(Bucket="our-bucket", Key=min(mine))
    assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", ours.kms_key)
    roles = [role for role in at_moto.pages(account.client("iam"), "list_roles", "Roles") if "rules" in role["RoleName"]]
    assert roles and {role["Path"] for role in roles} == {"/teams/ml/"}
    # Another plan without any option: everything stays as it was demanded.
    changed = deploy(account, "rules", a_plan(1024))
    assert deployment.recorded_rules(account, "rules") == ours and changed["functions"][1]["memory_mb"] == 1024
    assert deploy(account, "rules", a_plan(1024))["changes"] == []
    # A new tag is an update, another bucket is not.
    deploy(account, "rules", a_plan(1024), rules=account_rules(tags=["team=research"]))
    assert deployment.recorded_rules(account, "rules") == replace(ours, tags=(("team", "research"),))
    with pytest.raises(UsageError, match="objects are in our-bucket, and cannot move"):
        deploy(account, "rules", a_plan(1024), rules=account_rules(bucket="none"))
    calls.clear()
    document = destroy(account, "rules")
    assert document["state"] == "destroyed" and document["kept"] == ["s3://our-bucket/remoe/rules/thesis.tex"]
    assert objects(account) == set(FOREIGN) and "DeleteBucket" not in calls and "DeleteBucketTagging" not in calls
    assert account.client("s3").get_bucket_tagging(Bucket="our-bucket")["TagSet"] == tags["TagSet"]
    assert stands(account, "rules") == {} and destroy(account, "rules")["state"] in ("absent", "destroyed")
    for key in FOREIGN:
        account.client("s3").delete_object(Bucket="our-bucket", Key=key)
    assert destroy(account, "rules")["state"] == "absent"


def test_a_destroy_that_ended_between_stack_and_bucket_goes_on(
    account: Account, ours: AccountRules, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy(account, "halfway", a_plan(), rules=ours)
    monkeypatch.setattr(Bucket, "remove", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        destroy(account, "halfway")
    monkeypatch.undo()
    assert Stack(account, "halfway").describe() is None and objects(account)
    assert destroy(account, "halfway")["state"] == "destroyed" and objects(account) == set()


def test_our_own_bucket_has_the_users_tags_and_key(account: Account, ours: AccountRules) -> None:
    rules = replace(ours, bucket=None)
    deploy(account, "own", a_plan(), rules=rules)
    bucket = Bucket.of(account, "own", rules)
    assert bucket.tags() == {"team": "ml", names.DEPLOYMENT_TAG: "own"}
    rule = bucket.client.get_bucket_encryption(Bucket=bucket.name)["ServerSideEncryptionConfiguration"]["Rules"][0]
    assert rule["ApplyServerSideEncryptionByDefault"] == {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": ours.kms_key}
    bucket.tag({**(bucket.tags() or {}), "CreatedBy": "the company's robot"})
    assert deploy(account, "own", a_plan())["changes"] == []
    deploy(account, "own", a_plan(), rules=account_rules(tags=["unit=7"]))
    assert bucket.tags() == {"CreatedBy": "the company's robot", "unit": "7", names.DEPLOYMENT_TAG: "own"}
    destroy(account, "own")
    assert stands(account, "own") == {}


def settings_of(rules: AccountRules, image: str | None = None) -> AwsSettings:
    return AwsSettings("x", "x86_64", "3.13", Endpoint.none, image, rules=rules)


MISSING = (
    ({"permissions_boundary": BOUNDARY}, f"There is no policy {BOUNDARY}."),
    ({"kms_key": KEY}, f"There is no key {KEY}."),
    ({"bucket": "a-bucket-that-nobody-has"}, "There is no bucket a-bucket-that-nobody-has."),
    ({"subnets": VPC["subnets"]}, "Not all subnets are in us-east-1"),
    ({"security_groups": VPC["security_groups"]}, "Not all security groups are in us-east-1"),
)


@pytest.mark.parametrize(("given", "message"), MISSING, ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_what_is_not_there_is_told(given: dict[str, Any], message: str, account: Account, ours: AccountRules) -> None:
    with pytest.raises(UsageError) as error:
        checks.check(account, settings_of(replace(ours, **given)))
    assert error.value.message.startswith(message)


def test_what_is_there_needs_no_word(account: Account, ours: AccountRules) -> None:
    assert checks.check(account, settings_of(ours)) == ()
    (said,) = checks.remarks(settings_of(ours))
    assert "gateway endpoint for S3" in said and checks.remarks(settings_of(replace(ours, subnets=(), security_groups=()))) == ()


def test_a_bucket_elsewhere_and_a_network_of_two(account: Account, ours: AccountRules) -> None:
    account.client("s3").create_bucket(Bucket="our-bucket-west", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    with pytest.raises(UsageError, match="our-bucket-west is in eu-west-1"):
        checks.check(account, settings_of(replace(ours, bucket="our-bucket-west")))
    ec2 = account.client("ec2")
    group = ec2.create_security_group(GroupName="g", Description="g", VpcId=ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"])
    with pytest.raises(UsageError, match="are of several VPCs"):
        checks.check(account, settings_of(replace(ours, security_groups=(group["GroupId"],))))


def image(repository: str, end: str = ":1", account: str = "123456789012", region: str = "us-east-1") -> str:
    return f"{account}.dkr.ecr.{region}.amazonaws.com/{repository}{end}"


def test_an_image_is_looked_up(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    ecr = account.client("ecr")
    ecr.create_repository(repositoryName="looked-up")
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json", "layers": []}
    put = ecr.put_image(repositoryName="looked-up", imageManifest=json.dumps(manifest), imageTag="1")["image"]["imageId"]
    for there in (":1", f"@{put['imageDigest']}"):
        assert checks.check(account, settings_of(AccountRules(), image("looked-up", there))) == ()
    for missing, message in (
        (image("looked-up", ":2"), "The repository looked-up has no image 2."),
        (image("looked-up", ""), "The repository looked-up has no image latest."),
        (image("looked-up", "@sha256:" + "0" * 64), "The repository looked-up has no image sha256:000"),
        (image("other"), "Account 123456789012 has no repository other in us-east-1."),
        (image("looked-up", region="eu-west-1"), "is in eu-west-1, and AWS runs it in its own region only"),
    ):
        with pytest.raises(UsageError) as error:
            checks.check(account, settings_of(AccountRules(), missing))
        assert message in error.value.message and "\n" not in error.value.message and error.value.hint

    def refuse(**_: Any) -> None:
        raise ecr.exceptions.ClientError({"Error": {"Code": "AccessDeniedException", "Message": "No"}}, "DescribeImages")

    monkeypatch.setattr(ecr, "describe_images", refuse)
    theirs, unknown = checks.check(account, settings_of(AccountRules(), image("looked-up", account="210987654321")))
    assert "account 210987654321" in theirs and "may not call ecr:DescribeImages" in unknown


# A company's account refuses one of the bucket's settings


SETTINGS = ("PutPublicAccessBlock", "PutBucketEncryption", "PutBucketLifecycleConfiguration", "PutBucketTagging")


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("refused", SETTINGS)
def test_a_bucket_with_a_refused_setting_is_taken_back_or_named(refused: str, stays: bool, account: Account) -> None:
    name = f"refused{SETTINGS.index(refused)}{int(stays)}"
    client, events = account.client("s3"), account.client("s3").meta.events

    def refuse(**_: Any) -> None:
        raise client.exceptions.ClientError({"Error": {"Code": "AccessDenied", "Message": "An SCP denies it."}}, refused)

    denied = [f"before-call.s3.{refused}", *(["before-call.s3.DeleteBucket"] if stays else [])]
    for event in denied:
        events.register(event, refuse)
    try:
        with pytest.raises(
            DeployError, match=rf"may not call {refused}: An SCP denies it\..* The bucket remoe-{name}-\S+ had been made"
        ) as error:
            deploy(account, name, a_plan())
    finally:
        for event in denied:
            events.unregister(event, refuse)
    bucket = Bucket.of(account, name, AccountRules())
    assert ("and is gone again" in error.value.message) is not stays and (bucket.tags() is not None) is stays
    assert ("aws s3 rb s3://" in error.value.hint) is stays
    if stays:  # without a tag, and where none may be given
        events.register("before-call.s3.PutBucketTagging", refuse)
        try:
            assert destroy(account, name)["state"] == "destroyed"
        finally:
            events.unregister("before-call.s3.PutBucketTagging", refuse)
    assert stands(account, name) == {}


def test_a_bucket_that_was_there_is_not_taken_back(account: Account) -> None:
    bucket = Bucket.of(account, "was-there", AccountRules())
    bucket.client.create_bucket(Bucket=bucket.name)

    def refuse(**_: Any) -> None:
        raise bucket.client.exceptions.ClientError({"Error": {"Code": "AccessDenied", "Message": "No"}}, "PutBucketTagging")

    bucket.client.meta.events.register("before-call.s3.PutBucketTagging", refuse)
    try:
        with pytest.raises(DeployError, match="may not call PutBucketTagging"):
            deploy(account, "was-there", a_plan())
        assert bucket.tags() is not None
        assert destroy(account, "was-there")["state"] == "destroyed" and bucket.tags() is None
    finally:
        bucket.client.meta.events.unregister("before-call.s3.PutBucketTagging", refuse)


def test_a_dry_run_shows_them_and_looks_them_up(
    account: Account, ours: AccountRules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = read_catalog("aws-us-east-1").file
    write_json(tmp_path / "p.json", a_plan(catalog=catalog))
    options = ["--tag", "team=ml", "--role-path", "/x/", "--subnet", *ours.subnets, "--security-group", *ours.security_groups]
    command = ["remoe", "deploy", str(tmp_path / "p.json"), "--target", "aws", "--dry-run", "--endpoint", "none", *options]
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    assert app.run() == 0
    document = json.loads(capsys.readouterr().out)
    assert document["template"]["Metadata"]["remoe"]["tags"] == [["team", "ml"]]
    assert any("gateway endpoint for S3" in one for one in document["remarks"])
    monkeypatch.setattr(sys, "argv", command)
    assert app.run() == 0
    shown = capsys.readouterr().out
    assert "What the account demands" in shown and "team=ml" in shown and "gateway endpoint" in shown
    for wrong, message in ((("--kms-key", KEY), "There is no key"), (("--bucket", "nobodys-bucket"), "There is no bucket nobodys-bucket")):
        monkeypatch.setattr(sys, "argv", [*command, *wrong])
        assert app.run() == 2 and message in capsys.readouterr().err
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    assert app.run() == 0
    assert "was not looked up, as there is no account" in json.loads(capsys.readouterr().out)["remarks"][-1]

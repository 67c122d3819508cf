"""What goes from a deployment's bucket and when, and who may not touch it meanwhile; against moto's server."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from remoe_cli.deploy.aws import deployment, lock, names, status, storage, template
from remoe_cli.deploy.aws.objects import object_of
from remoe_cli.deploy.aws.session import Account
from remoe_cli.deploy.aws.stack import DesiredStack, Proposal, Stack
from remoe_cli.deploy.aws.storage import Bucket
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.deploy.local.processes import start_time
from remoe_cli.errors import DeployError, HeldError
from remoe_cli.plan.document import Plan
from tests.support import aws_account as aws
from tests.support.aws_deployments import NOT_AT_MOTO, a_plan, deploy, destroy, keys, made, needed, stands

OLD = object_of(names.code_key("d" * 64), bytes(3 * 10**6))


def bucket_of(account: Account, name: str) -> Bucket:
    return Bucket(account, names.bucket(name, account.id, account.region))


def propose(account: Account, name: str, plan: Plan) -> Proposal:
    """As far as somebody else has come who is being asked whether to go on."""
    root, bucket, stack = made(name, plan)[0].root, bucket_of(account, name), Stack(account, name)
    bucket.upload([object_of(template.key(root), template.body(root))])
    wanted = DesiredStack(root, bucket.url(template.key(root)), False, {names.DEPLOYMENT_TAG: name})
    proposal = stack.propose(wanted, stack.describe())
    assert proposal
    return proposal


def test_what_earlier_plans_left_goes_when_nothing_needs_it(account: Account, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    deploy(account, "tidy", a_plan(), Endpoint.none, OLD)
    calls.clear()
    done = deploy(account, "tidy", a_plan(1024), say=messages.append)
    assert done["freed_bytes"] == OLD.size_bytes + sum(map(len, made("tidy", a_plan())[0].bodies.values()))
    assert messages == ["Deleted from the bucket what earlier plans left there: 3.01 MB."]
    assert keys(account, "tidy") == needed("tidy", a_plan(1024))
    lock_calls = ("PutObject", "DeleteObject")
    assert aws.changing(calls) == ["PutObject", "CreateChangeSet", lock_calls[0], "ExecuteChangeSet", lock_calls[1], "DeleteObjects"]
    # Interrupted before that, the same command mends it.
    monkeypatch.setattr(deployment, "tidy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        deploy(account, "tidy", a_plan())
    monkeypatch.undo()
    assert keys(account, "tidy") == needed("tidy", a_plan()) | needed("tidy", a_plan(1024))
    calls.clear()
    assert deploy(account, "tidy", a_plan())["freed_bytes"] > 0 and aws.changing(calls) == ["DeleteObjects"]
    assert keys(account, "tidy") == needed("tidy", a_plan())
    calls.clear()
    assert deploy(account, "tidy", a_plan())["freed_bytes"] == 0 and aws.changing(calls) == []
    destroy(account, "tidy")


def test_what_others_may_need_stays(account: Account, calls: list[str]) -> None:
    """While an update may be rolled back, while somebody has proposed another, and what is newer than the stack."""
    messages: list[str] = []
    deploy(account, "keep", a_plan(), Endpoint.none, OLD)
    with pytest.raises(DeployError, match="is what it was before"):
        deploy(account, "keep", a_plan(main=NOT_AT_MOTO), Endpoint.sagemaker)
    assert OLD.key in keys(account, "keep")
    time.sleep(1)  # S3 tells the time in seconds
    proposal = propose(account, "keep", a_plan(1024))
    calls.clear()
    assert deploy(account, "keep", a_plan(), say=messages.append)["freed_bytes"] == 0
    assert aws.changing(calls) == [] and messages[0].startswith("3.01 MB of other plans stay") and "somebody has proposed" in messages[0]
    Stack(account, "keep").withdraw(proposal)
    assert deploy(account, "keep", a_plan())["freed_bytes"] > OLD.size_bytes
    assert keys(account, "keep") == needed("keep", a_plan()) | set(made("keep", a_plan(1024))[0].bodies)
    destroy(account, "keep")


def test_objects_that_cannot_be_deleted_do_not_fail_a_deployment(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    deploy(account, "kept", a_plan(), Endpoint.none, OLD)
    refusal = {"Errors": [{"Key": OLD.key, "Code": "AccessDenied", "Message": "No"}]}
    monkeypatch.setattr(Bucket, "delete", lambda self, keys: storage._refused(refusal))
    done = deploy(account, "kept", a_plan(1024), say=messages.append)
    assert done["state"] == "running" and done["freed_bytes"] == 0
    assert messages == [f"3.01 MB of other plans stay in the bucket: S3 does not delete {OLD.key}: No."]
    destroy(account, "kept")


def test_what_goes_before_the_change_set_is_there_is_sent_again(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    proposed = Stack.propose

    def after_another_tidied(*given: Any) -> Any:
        bucket_of(account, "sent").delete([OLD.key])
        return proposed(*given)

    deploy(account, "sent", a_plan(), Endpoint.none, OLD)
    monkeypatch.setattr(Stack, "propose", after_another_tidied)
    deploy(account, "sent", a_plan(1024), Endpoint.none, OLD)
    assert OLD.key in keys(account, "sent")
    destroy(account, "sent")


def test_who_deploys_what_is_being_destroyed_is_told_by_whom(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    remove, held = Bucket.remove, f"held by {account.caller} on .*, who destroys the deployment 'gone'"

    def while_another_deploys(bucket: Bucket) -> list[str]:
        with pytest.raises(HeldError, match=held) as error:
            deploy(account, "gone", a_plan())
        assert error.value.exit_code == 5 and "remoe destroy gone --target aws" in error.value.hint
        return remove(bucket)

    deploy(account, "gone", a_plan())
    monkeypatch.setattr(Bucket, "remove", while_another_deploys)
    destroy(account, "gone")
    assert stands(account, "gone") == {}


def test_who_proposes_what_is_being_destroyed_withdraws_it(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    proposed, bucket = Stack.propose, bucket_of(account, "late")

    def while_another_destroys(*given: Any) -> Any:
        proposal = proposed(*given)
        bucket.put_small(names.LOCK_KEY, json.dumps(ELSEWHERE).encode())
        return proposal

    monkeypatch.setattr(Stack, "propose", while_another_destroys)
    with pytest.raises(HeldError, match="by ann on pc, who destroys the deployment 'late' since yesterday") as error:
        deploy(account, "late", a_plan())
    assert f"aws s3 rm s3://{bucket.name}/remoe-lock.json" in error.value.hint and "on another-host" in error.value.hint
    assert set(stands(account, "late")) == {"buckets", "tagged"}  # which the other removes
    bucket.drop(names.LOCK_KEY)
    destroy(account, "late")
    assert stands(account, "late") == {}


def test_what_is_destroyed_before_it_is_changed_is_told(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = Bucket.upload

    def after_another_destroyed(*given: Any) -> Any:
        monkeypatch.undo()
        destroy(account, "lost")
        return upload(*given)

    deploy(account, "lost", a_plan())
    monkeypatch.setattr(Bucket, "upload", after_another_destroyed)
    with pytest.raises(HeldError, match=r"somebody.* who destroys"):
        deploy(account, "lost", a_plan(1024))
    assert stands(account, "lost") == {}


def test_what_is_being_changed_is_not_destroyed(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = Stack.execute

    def while_another_destroys(*given: Any) -> Any:
        with pytest.raises(HeldError, match="who deploys the deployment 'busy'"):
            destroy(account, "busy")
        with pytest.raises(HeldError, match="who deploys the deployment 'busy'"):
            deploy(account, "busy", a_plan(2048))
        return execute(*given)

    deploy(account, "busy", a_plan())
    monkeypatch.setattr(Stack, "execute", while_another_destroys)
    assert deploy(account, "busy", a_plan(1024))["state"] == "running"
    monkeypatch.undo()
    assert destroy(account, "busy")["left"] == [] and stands(account, "busy") == {}


def test_a_bucket_that_a_change_set_counts_on_is_not_emptied(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = Stack.remove

    def before_another_proposes(*given: Any) -> Any:
        removed = remove(*given)
        propose(account, "won", a_plan())
        return removed

    deploy(account, "won", a_plan())
    monkeypatch.setattr(Stack, "remove", before_another_proposes)
    with pytest.raises(HeldError, match="REVIEW_IN_PROGRESS"):
        destroy(account, "won")
    monkeypatch.undo()
    assert keys(account, "won") == needed("won", a_plan()) and bucket_of(account, "won").tags() == {names.DEPLOYMENT_TAG: "won"}
    assert deploy(account, "won", a_plan())["state"] == "running"
    destroy(account, "won")


# Locks as others leave them


ELSEWHERE = {"id": "1", "who": "ann on pc", "work": "destroys", "host": "another-host", "process": 1, "started": "1", "since": "yesterday"}


def here(process: int, started: str) -> dict[str, Any]:
    return ELSEWHERE | {"host": socket.gethostname(), "process": process, "started": started}


@pytest.mark.parametrize(
    "left", [here(os.getpid(), "of another process"), here(2**22 + 1, "1"), here(1, "never")], ids=["pid again", "no process", "other"]
)
def test_the_lock_of_a_killed_command_is_taken_over_on_its_machine(left: dict[str, Any], account: Account) -> None:
    deploy(account, "stale", a_plan())
    actions: tuple[Callable[[], Any], ...] = (
        lambda: deploy(account, "stale", a_plan()),
        lambda: deploy(account, "stale", a_plan(1024)),
        lambda: destroy(account, "stale"),
    )
    for work in actions:
        bucket_of(account, "stale").put_small(names.LOCK_KEY, json.dumps(left).encode())
        work()
        assert not (bucket_of(account, "stale").tags() and lock.owner(bucket_of(account, "stale")))
    assert stands(account, "stale") == {}


@pytest.mark.sweep
@pytest.mark.parametrize("body", [json.dumps(ELSEWHERE), json.dumps(here(os.getpid(), "NOW")), "{}", "[]", "[" * 5000, "not JSON", ""])
def test_any_other_lock_is_respected(body: str, account: Account) -> None:
    deploy(account, "taken", a_plan())
    bucket = bucket_of(account, "taken")
    bucket.put_small(names.LOCK_KEY, body.replace("NOW", start_time(os.getpid()) or "").encode())
    actions: tuple[Callable[[], Any], ...] = (
        lambda: deploy(account, "taken", a_plan(1024)),
        lambda: deploy(account, "taken", a_plan()),
        lambda: destroy(account, "taken"),
    )
    for action in actions:
        with pytest.raises(HeldError, match="is held by"):
            action()
    assert status.read(account, "taken")["functions"][1]["memory_mb"] == 512
    bucket.drop(names.LOCK_KEY)
    destroy(account, "taken")


def test_of_many_at_once_one_holds_the_lock(account: Account) -> None:
    bucket = bucket_of(account, "many")
    bucket.make({names.DEPLOYMENT_TAG: "many"})
    everybody, held = threading.Barrier(6), []

    def take(number: int) -> bool:
        everybody.wait()
        try:
            with lock.held(bucket, "many", "deploys"):
                held.append(number)
                everybody.wait()
        except HeldError:
            everybody.wait()
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(take, range(6))) == 1 == len(held)
    with lock.held(bucket, "many", "destroys"):
        pass
    assert lock.owner(bucket) is None and destroy(account, "many")["state"] == "destroyed"

"""What stack.py does about each state that CloudFormation can leave a stack in: the very calls, held against botocore's models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import count
from typing import Any

import boto3
import pytest
from botocore.stub import ANY, Stubber

from remoe_cli.deploy.aws import events
from remoe_cli.deploy.aws.session import Account
from remoe_cli.deploy.aws.stack import DesiredStack, Stack, StackState
from remoe_cli.deploy.console import SILENT
from remoe_cli.errors import DeployError, HeldError, PartialDeployError, RemoeError
from remoe_cli.progress import Report

ID = "arn:aws:cloudformation:us-east-1:123456789012:stack/remoe-d/1"
NESTED = "arn:aws:cloudformation:us-east-1:123456789012:stack/remoe-d-Layers/2"
BEGAN = datetime(2026, 5, 1, 12, 30, tzinfo=UTC)
TEMPLATE = {"Resources": {"A": {"Type": "AWS::SNS::Topic"}}}
WANTED = DesiredStack(
    TEMPLATE, "https://bucket.s3.us-east-1.amazonaws.com/templates/1.json", False, {"remoe:deployment": "d", "remoe:plan": "p"}
)
CHANGE_SET = f"arn:aws:cloudformation:us-east-1:123456789012:changeSet/{WANTED.prefix}0123abcd/3"
OTHERS = "arn:aws:cloudformation:us-east-1:123456789012:changeSet/remoe-other-0123abcd/4"


@cache
def _account() -> Account:
    session = boto3.Session(aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1")
    return Account(session, "us-east-1", "123456789012", "arn:aws:iam::123456789012:user/me")


class Calls:
    """The calls that are expected of a stack, and their answers, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        account = _account()
        self.stub = Stubber(account.client("cloudformation"))
        self.said: list[str] = []
        self.reported: list[tuple[int, int | None, str]] = []
        self.stack = Stack(account, "d", replace(SILENT, say=self.said.append, progress=self.progress))
        self._events: dict[str, list[dict[str, Any]]] = {ID: [], NESTED: []}
        self._number = count()
        patch.setattr(events, "pauses", lambda: iter([0.0] * 9))

    def progress(self, title: str, *, of_bytes: bool = False) -> AbstractContextManager[Report]:
        return nullcontext(self.report)

    def report(self, done: int, total: int | None, what: str = "") -> None:
        self.reported.append((done, total, what))

    def describe(self, status: str, change_set: str = CHANGE_SET, tags: dict[str, str] | None = None, **more: Any) -> None:
        tagged = [{"Key": key, "Value": value} for key, value in (tags or {}).items()]
        found = {
            "StackName": "remoe-d",
            "StackId": ID,
            "StackStatus": status,
            "CreationTime": BEGAN,
            "ChangeSetId": change_set,
            "Tags": tagged,
        }
        self.stub.add_response("describe_stacks", {"Stacks": [found | more]}, {"StackName": ANY})

    def gone(self) -> None:
        self.stub.add_client_error("describe_stacks", "ValidationError", "Stack with id remoe-d does not exist")

    def happens(self, *outcomes: tuple[str, str, str] | tuple[str, str], stack_id: str = ID) -> None:
        """Events of resources, by name and status; the stack's own are named as the stack."""
        for name, status, *reason in outcomes:
            number = next(self._number)
            kind = events.STACK if name in ("remoe-d", "Layers") else "AWS::Lambda::Function"
            self._events[stack_id].insert(
                0,
                {
                    "StackId": stack_id,
                    "EventId": f"event-{number}",
                    "StackName": "remoe-d",
                    "Timestamp": BEGAN + timedelta(seconds=number),
                    "LogicalResourceId": name,
                    "PhysicalResourceId": {"remoe-d": stack_id, "Layers": NESTED}.get(name, f"id-of-{name}"),
                    "ResourceType": kind,
                    "ResourceStatus": status,
                    "ResourceStatusReason": "".join(reason),
                },
            )

    def read_events(self, stack_id: str = ID) -> None:
        self.stub.add_response("describe_stack_events", {"StackEvents": list(self._events[stack_id])}, {"StackName": stack_id})

    def delete(self, *outcomes: tuple[str, ...], stack_id: str = ID, **expected: Any) -> None:
        self.read_events(stack_id)
        self.stub.add_response("delete_stack", {}, {"StackName": stack_id, **expected})
        self.happens(*outcomes, stack_id=stack_id)  # type: ignore[arg-type]
        self.read_events(stack_id)

    def deploy(self) -> StackState:
        proposal = self.stack.propose(WANTED, state_of("UPDATE_COMPLETE"))
        assert proposal
        return self.stack.execute(proposal)

    def last_actor(self, who: str) -> None:
        answer = {"Status": "CREATE_COMPLETE", "Description": who}
        self.stub.add_response("describe_change_set", answer, {"ChangeSetName": ANY})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    calls = Calls(monkeypatch)
    with calls.stub:
        yield calls
        calls.stub.assert_no_pending_responses()


@pytest.mark.parametrize("status", ["ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "CREATE_FAILED", "DELETE_FAILED"])
def test_what_never_stood_is_removed_first(status: str, calls: Calls) -> None:
    calls.describe(status)
    calls.happens(("remoe-d", status))
    calls.delete(("remoe-d", "DELETE_IN_PROGRESS"), ("remoe-d", "DELETE_COMPLETE"))
    calls.gone()
    assert calls.stack.recover(WANTED) is None


def test_a_rollback_that_failed_is_continued(calls: Calls) -> None:
    calls.describe("UPDATE_ROLLBACK_FAILED")
    calls.happens(("remoe-d", "UPDATE_ROLLBACK_FAILED"))
    calls.read_events()
    calls.stub.add_response("continue_update_rollback", {}, {"StackName": "remoe-d", "ClientRequestToken": ANY})
    calls.happens(("remoe-d", "UPDATE_ROLLBACK_IN_PROGRESS"), ("A", "UPDATE_COMPLETE"), ("remoe-d", "UPDATE_ROLLBACK_COMPLETE"))
    calls.read_events()
    calls.describe("UPDATE_ROLLBACK_COMPLETE")
    assert (state := calls.stack.recover(WANTED)) and state.stands


def test_a_rollback_that_fails_again_says_why(calls: Calls) -> None:
    calls.describe("UPDATE_ROLLBACK_FAILED")
    calls.happens(("remoe-d", "UPDATE_ROLLBACK_FAILED"))
    calls.read_events()
    calls.stub.add_response("continue_update_rollback", {}, {"StackName": "remoe-d", "ClientRequestToken": ANY})
    calls.happens(
        ("remoe-d", "UPDATE_ROLLBACK_IN_PROGRESS"), ("A", "UPDATE_FAILED", "No such role."), ("remoe-d", "UPDATE_ROLLBACK_FAILED")
    )
    calls.read_events()
    with pytest.raises(PartialDeployError, match=r"A \(AWS::Lambda::Function\) failed: No such role\.") as error:
        calls.stack.recover(WANTED)
    assert error.value.exit_code == 6 and "remoe destroy d --target aws" in error.value.hint


def test_a_stack_in_review_is_taken_up(calls: Calls) -> None:
    calls.describe("REVIEW_IN_PROGRESS")
    state = calls.stack.recover(WANTED)
    assert state and not state.stands
    propose(calls, "CREATE")
    proposal = calls.stack.propose(WANTED, state)
    assert proposal and proposal.creates and [change.name for change in proposal.changes] == ["A"]


def propose(calls: Calls, kind: str, **found: Any) -> None:
    expected = {
        "StackName": "remoe-d",
        "ChangeSetName": ANY,
        "ChangeSetType": kind,
        "Description": ANY,
        "TemplateURL": WANTED.url,
        "Capabilities": ["CAPABILITY_IAM"],
        "IncludeNestedStacks": False,
        "Tags": [{"Key": "remoe:deployment", "Value": "d"}, {"Key": "remoe:plan", "Value": "p"}],
    }
    calls.stub.add_response("create_change_set", {"Id": CHANGE_SET, "StackId": ID}, expected)
    calls.stub.add_response("describe_change_set", {"Status": "CREATE_IN_PROGRESS"}, {"ChangeSetName": CHANGE_SET})
    calls.stub.add_response("describe_change_set", {"Status": "CREATE_COMPLETE"} | found, {"ChangeSetName": CHANGE_SET})
    if not found:
        change = {"Action": "Add", "LogicalResourceId": "A", "ResourceType": "AWS::SNS::Topic"}
        answer = {"Status": "CREATE_COMPLETE", "Changes": [{"Type": "Resource", "ResourceChange": change}]}
        calls.stub.add_response("describe_change_set", answer, {"ChangeSetName": CHANGE_SET})


def test_no_changes_are_no_proposal(calls: Calls) -> None:
    propose(
        calls, "UPDATE", Status="FAILED", StatusReason="The submitted information didn't contain changes. Submit different information."
    )
    calls.stub.add_response("delete_change_set", {}, {"ChangeSetName": CHANGE_SET})
    assert calls.stack.propose(WANTED, state_of("UPDATE_COMPLETE")) is None


def test_changes_that_cannot_be_made_leave_nothing(calls: Calls) -> None:
    propose(calls, "CREATE", Status="FAILED", StatusReason="Template error: no resource B")
    calls.stub.add_response("delete_change_set", {}, {"ChangeSetName": CHANGE_SET})
    calls.stub.add_response("list_change_sets", {"Summaries": []}, {"StackName": ID})
    calls.stub.add_response("delete_stack", {}, {"StackName": ID})
    with pytest.raises(DeployError, match="no resource B"):
        calls.stack.propose(WANTED, None)


def state_of(status: str) -> StackState:
    return StackState(ID, status, "", BEGAN, {}, {}, CHANGE_SET)


@pytest.mark.parametrize(
    ("code", "operation"),
    [
        ("ValidationError", "create_change_set"),
        ("AlreadyExistsException", "create_change_set"),
        ("InvalidChangeSetStatus", "execute_change_set"),
        ("ChangeSetNotFound", "execute_change_set"),
    ],
)
@pytest.mark.parametrize("now", ["UPDATE_IN_PROGRESS", "UPDATE_COMPLETE"])
def test_who_comes_second_is_told_who_was_first(code: str, operation: str, now: str, calls: Calls) -> None:
    if operation == "execute_change_set":
        propose(calls, "UPDATE")
        calls.read_events()
    calls.stub.add_client_error(operation, code, "Stack is in UPDATE_IN_PROGRESS state and can not be updated.")
    calls.describe(now, OTHERS, LastUpdatedTime=BEGAN)
    calls.last_actor("arn:aws:iam::1:user/ann on workstation")
    with pytest.raises(HeldError, match="held by arn:aws:iam::1:user/ann on workstation, since 2026-05-01 12:30:00 UTC") as error:
        calls.deploy()
    assert error.value.exit_code == 5


def test_who_comes_after_a_deletion_is_told(calls: Calls) -> None:
    propose(calls, "UPDATE")
    calls.read_events()
    calls.stub.add_client_error("execute_change_set", "ChangeSetNotFound", "ChangeSet does not exist")
    calls.gone()
    with pytest.raises(HeldError, match="remoe-d has been deleted meanwhile by somebody who destroys it"):
        calls.deploy()


def test_a_repeated_call_of_which_the_answer_was_lost_goes_on(calls: Calls) -> None:
    propose(calls, "UPDATE")
    calls.read_events()
    calls.stub.add_client_error("execute_change_set", "InvalidChangeSetStatus", "An operation on this ChangeSet is currently in progress.")
    calls.describe("UPDATE_IN_PROGRESS")
    calls.happens(("remoe-d", "UPDATE_IN_PROGRESS"), ("A", "UPDATE_COMPLETE"), ("remoe-d", "UPDATE_COMPLETE"))
    calls.read_events()
    calls.describe("UPDATE_IN_PROGRESS")  # as it was before
    calls.describe("UPDATE_COMPLETE")
    proposal = calls.stack.propose(WANTED, state_of("CREATE_COMPLETE"))
    assert proposal and calls.stack.execute(proposal).stands
    assert calls.reported == [(1, 1, "A (AWS::Lambda::Function): UPDATE_COMPLETE")]


@pytest.mark.parametrize(
    ("outcomes", "error", "said"),
    [
        ((("A", "CREATE_FAILED", "Too big."), ("B", "CREATE_FAILED", "Resource creation cancelled"), ("remoe-d", "ROLLBACK_COMPLETE")),
         DeployError, r"^A \(AWS::Lambda::Function\) failed: Too big\. Everything that was created"),
        ((("B", "UPDATE_FAILED", "Resource update cancelled"), ("A", "UPDATE_FAILED", "No"), ("remoe-d", "UPDATE_ROLLBACK_COMPLETE")),
         DeployError, r"^A \(AWS::Lambda::Function\) failed: No\. The deployment is what it was before"),
        ((("A", "UPDATE_FAILED", "No"), ("remoe-d", "UPDATE_ROLLBACK_FAILED", "Cannot")),
         PartialDeployError, r"^A .* failed: No\. .* failed too"),
        ((("remoe-d", "DELETE_COMPLETE"),), DeployError, "deleted meanwhile"),
    ],
)  # fmt: skip
def test_a_failure_is_told_by_its_first_cause(outcomes: Any, error: type[RemoeError], said: str, calls: Calls) -> None:
    propose(calls, "CREATE")
    calls.read_events()
    calls.stub.add_response("execute_change_set", {}, {"ChangeSetName": CHANGE_SET, "ClientRequestToken": ANY})
    calls.happens(*outcomes)
    calls.read_events()
    proposal = calls.stack.propose(WANTED, None)
    assert proposal
    with pytest.raises(error, match=said) as raised:
        calls.stack.execute(proposal)
    assert type(raised.value) is error and raised.value.hint


def test_the_cause_is_looked_for_in_nested_stacks(calls: Calls) -> None:
    propose(calls, "CREATE")
    calls.happens(("Old", "CREATE_FAILED", "of a former operation"), stack_id=NESTED)
    calls.read_events()
    calls.stub.add_response("execute_change_set", {}, {"ChangeSetName": CHANGE_SET, "ClientRequestToken": ANY})
    calls.happens(("remoe-d", "CREATE_IN_PROGRESS"), ("Layers", "CREATE_IN_PROGRESS"))
    calls.happens(("A", "CREATE_FAILED", "Too big."), stack_id=NESTED)
    calls.read_events()
    calls.read_events(NESTED)
    calls.happens(("Layers", "CREATE_FAILED", "Embedded stack was not created"), ("remoe-d", "ROLLBACK_COMPLETE"))
    calls.read_events()
    calls.read_events(NESTED)
    proposal = calls.stack.propose(WANTED, None)
    assert proposal
    with pytest.raises(DeployError, match="Too big"):
        calls.stack.execute(proposal)


def test_an_operation_of_somebody_else_holds_the_stack(calls: Calls) -> None:
    calls.describe("UPDATE_IN_PROGRESS", OTHERS, LastUpdatedTime=BEGAN)
    calls.last_actor("arn:aws:iam::1:user/bob on laptop")
    with pytest.raises(HeldError, match="bob on laptop, since 2026-05-01 12:30:00 UTC"):
        calls.stack.recover(WANTED)


@pytest.mark.parametrize(("before", "held"), [("ROLLBACK_COMPLETE", False), ("UPDATE_COMPLETE", True)])
def test_a_deletion_under_way_holds_the_stack_unless_it_never_stood(before: str, held: bool, calls: Calls) -> None:
    calls.describe("DELETE_IN_PROGRESS", OTHERS)
    calls.happens(("remoe-d", before), ("remoe-d", "DELETE_IN_PROGRESS"))
    calls.read_events()
    if held:
        with pytest.raises(HeldError, match="held by somebody who deletes it"):
            calls.stack.recover(WANTED)
        return
    calls.happens(("remoe-d", "DELETE_COMPLETE"))  # before anybody follows it
    calls.read_events()
    calls.read_events()
    calls.gone()
    assert calls.stack.recover(WANTED) is None


def test_what_cannot_be_deleted_is_left_and_told(calls: Calls) -> None:
    """Twice as it is, then without what failed."""
    begun, failed = ("remoe-d", "DELETE_IN_PROGRESS"), ("remoe-d", "DELETE_FAILED")
    stuck = ("B", "DELETE_FAILED", "It is in use.")
    calls.delete(begun, ("A", "DELETE_COMPLETE"), stuck, failed)
    calls.delete(begun, stuck, failed)
    calls.delete(begun, ("remoe-d", "DELETE_COMPLETE"), RetainResources=["B"])
    removed = calls.stack.remove(state_of("CREATE_COMPLETE"))
    assert [event.name for event in removed if event.failed] == ["B"]
    assert [event.id for event in removed if event.status == "DELETE_COMPLETE"] == ["id-of-A", ID]


def test_what_a_nested_stack_cannot_delete_is_left_in_it(calls: Calls) -> None:
    begun, failed = ("remoe-d", "DELETE_IN_PROGRESS"), ("remoe-d", "DELETE_FAILED")
    nested, stuck = ("Layers", "DELETE_FAILED", "Embedded stack was not deleted"), ("B", "DELETE_FAILED", "It is in use.")
    for _ in range(2):
        calls.delete(begun, nested, failed)
        calls.read_events(NESTED)
    for _ in range(2):
        calls.delete(begun, stuck, failed, stack_id=NESTED)
    calls.delete(begun, ("remoe-d", "DELETE_COMPLETE"), stack_id=NESTED, RetainResources=["B"])
    calls.delete(begun, ("Layers", "DELETE_COMPLETE"), ("remoe-d", "DELETE_COMPLETE"))
    calls.read_events(NESTED)
    removed = calls.stack.remove(state_of("CREATE_COMPLETE"))
    assert [(event.name, event.stack_id) for event in removed if event.failed] == [("B", NESTED)]


def test_what_still_cannot_be_deleted_is_partly_deployed(calls: Calls) -> None:
    begun, stuck, failed = ("remoe-d", "DELETE_IN_PROGRESS"), ("B", "DELETE_FAILED", "In use"), ("remoe-d", "DELETE_FAILED")
    calls.delete(begun, stuck, failed)
    calls.delete(begun, stuck, failed)
    calls.delete(begun, ("remoe-d", "DELETE_FAILED", "Denied."), RetainResources=["B"])
    with pytest.raises(PartialDeployError, match=r"cannot be deleted: .*Denied\."):
        calls.stack.remove(state_of("DELETE_FAILED"))


def test_destroy_while_an_update_runs_is_held(calls: Calls) -> None:
    calls.read_events()
    calls.stub.add_client_error("delete_stack", "ValidationError", "Stack cannot be deleted while in status UPDATE_IN_PROGRESS")
    calls.describe("UPDATE_IN_PROGRESS", OTHERS)
    calls.last_actor("ann")
    with pytest.raises(HeldError, match="held by ann"):
        calls.stack.remove(state_of("UPDATE_COMPLETE"))

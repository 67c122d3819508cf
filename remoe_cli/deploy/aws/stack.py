"""Describe, change and remove a deployment's CloudFormation stack.

CloudFormation keeps the state, the lock and the history. Nothing of it is kept here, so the same command can continue after any
interruption. `recover` knows a way on from every state that a stack can be in. This module does not know what the resources are.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from botocore.exceptions import ClientError

from remoe_cli import artifacts
from remoe_cli.deploy.aws import events, names
from remoe_cli.deploy.aws.events import Event
from remoe_cli.deploy.aws.session import Account, code_of
from remoe_cli.deploy.console import SILENT, Console
from remoe_cli.errors import DeployError, HeldError, PartialDeployError
from remoe_cli.runtime.failures import ACCESS_DENIED

_REVIEW = "REVIEW_IN_PROGRESS"
_STANDS = ("CREATE_COMPLETE", "UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE", "IMPORT_COMPLETE", "IMPORT_ROLLBACK_COMPLETE")
_NEVER_STOOD = ("CREATE_FAILED", "ROLLBACK_COMPLETE", "ROLLBACK_FAILED")
_MAY_BE_EXECUTED = ("AVAILABLE", "UNAVAILABLE")  # now, or when it is made
_NO_CHANGES = ("didn't contain changes", "No updates are to be performed")
_LOST = ("ValidationError", "AlreadyExistsException", "InvalidChangeSetStatus", "ChangeSetNotFound", "OperationInProgress")


@dataclass(frozen=True)
class StackState:
    """A stack as it is.

    since        when its last operation began
    change_set   the ARN of the change set that its last operation executed
    """

    id: str
    status: str
    reason: str
    since: datetime
    tags: Mapping[str, str]
    outputs: Mapping[str, str]
    change_set: str

    @property
    def busy(self) -> bool:
        return self.status.endswith("_IN_PROGRESS") and self.status != _REVIEW

    @property
    def stands(self) -> bool:
        return self.status in _STANDS

    @property
    def empty(self) -> bool:
        """Whether it never had a resource."""
        return self.status == _REVIEW


@dataclass(frozen=True)
class DesiredStack:
    """A stack as it is to be.

    url    where CloudFormation finds the template
    tags   every resource gets them too, so they must not change from one deployment to the next: that would change every resource
    """

    template: Mapping[str, Any]
    url: str
    nested: bool
    tags: Mapping[str, str]

    @property
    def prefix(self) -> str:
        """Return the prefix of the names of this stack's change sets, whoever makes them."""
        return f"remoe-{artifacts.sha256_bytes(json.dumps([self.template, self.tags], sort_keys=True).encode())}-"


@dataclass(frozen=True)
class Change:
    """One row of a diff. `action` is CloudFormation's, such as Add; `what` are the properties that change."""

    action: str
    name: str
    kind: str
    replaced: bool
    what: tuple[str, ...]


@dataclass(frozen=True)
class Proposal:
    """A change set that waits to be executed."""

    id: str
    stack_id: str
    creates: bool
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Stack:
    """The CloudFormation stack of one deployment."""

    account: Account
    deployment: str
    console: Console = SILENT

    @property
    def name(self) -> str:
        return names.stack(self.deployment)

    @property
    def _client(self) -> Any:
        return self.account.client("cloudformation")

    def describe(self, stack_id: str | None = None) -> StackState | None:
        """Return the stack as it is; None if there is none."""
        try:
            found = self._client.describe_stacks(StackName=stack_id or self.name)["Stacks"][0]
        except ClientError as error:
            if code_of(error) == "ValidationError" and "does not exist" in str(error):
                return None
            raise
        return StackState(
            id=found["StackId"],
            status=found["StackStatus"],
            reason=found.get("StackStatusReason", ""),
            since=found.get("DeletionTime") or found.get("LastUpdatedTime") or found["CreationTime"],
            tags={tag["Key"]: tag["Value"] for tag in found.get("Tags", ())},
            outputs={output["OutputKey"]: output["OutputValue"] for output in found.get("Outputs", ())},
            change_set=found.get("ChangeSetId", ""),
        )

    def last_deleted(self) -> StackState | None:
        """Return the latest deleted stack of this name, known for 90 days; None if it may not be asked."""
        try:
            pages = self._client.get_paginator("list_stacks").paginate(StackStatusFilter=["DELETE_COMPLETE"])
            found = [each for page in pages for each in page["StackSummaries"] if each["StackName"] == self.name]
        except ClientError as error:
            if code_of(error) in ACCESS_DENIED:
                return None
            raise
        found.sort(key=lambda each: each.get("DeletionTime") or each["CreationTime"])
        return self.describe(found[-1]["StackId"]) if found else None

    def template(self, state: StackState) -> dict[str, Any]:
        """Return the template that was deployed, as it was given."""
        body = self._client.get_template(StackName=state.id, TemplateStage="Original")["TemplateBody"]
        return dict(json.loads(body) if isinstance(body, str) else body)

    def matches(self, wanted: DesiredStack, state: StackState) -> bool:
        """Return whether there is nothing to change. Changes nothing."""
        return state.stands and wanted.tags.items() <= state.tags.items() and self.template(state) == wanted.template

    def last_actor(self, state: StackState) -> str:
        """Name who began the last operation: a change set says so, a deletion does not."""
        if state.status.startswith("DELETE_"):
            return "somebody who deletes it"
        actor = ""
        with suppress(ClientError):
            actor = self._client.describe_change_set(ChangeSetName=state.change_set).get("Description", "") if state.change_set else ""
        return actor or "somebody else"

    def held(self, state: StackState) -> HeldError:
        return HeldError(
            f"The stack {self.name} is held by {self.last_actor(state)}, since {state.since:%Y-%m-%d %H:%M:%S} UTC ({state.status}).",
            f"Follow it with 'remoe status {self.deployment} --target aws'; when it is done, run the command again.",
        )

    def recover(self, wanted: DesiredStack) -> StackState | None:
        """Bring the stack to a state in which a change set can be made; return None if there is no stack then.

        It handles whatever an interrupted or failed deployment has left.

        Raises: HeldError while somebody else is at work, PartialDeployError for what the user has to repair.
        """
        while state := self.describe():
            if state.busy:
                if not self._goes_on(state, wanted):
                    raise self.held(state)
                self.console.say(
                    f"An earlier run of this command is at work since {state.since:%H:%M:%S} UTC ({state.status}): waiting for it to end."
                )
                happened = self._follow_latest(state)
                if happened[-1].status not in _STANDS and (failure := events.cause(happened)):
                    self.console.say(f"That failed: {_why(failure)}")
            elif state.status in _NEVER_STOOD or state.status == "DELETE_FAILED":
                self.console.say(f"The stack {self.name} is left from a failed operation ({state.status}): removing it first.")
                for event in self.remove(state):
                    if event.failed:
                        self.console.say(f"It stays, outside the deployment: {_why(event)}")
            elif state.status == "UPDATE_ROLLBACK_FAILED":
                self.console.say(f"The rollback of {self.name}'s last update did not finish: continuing it first.")
                self._continue_rollback(state)
            else:
                return state
        return None

    def _goes_on(self, state: StackState, wanted: DesiredStack) -> bool:
        """Return whether the running operation is this very deployment, or removes one that failed."""
        if state.status == "DELETE_IN_PROGRESS":
            end = events.before(self._client, state.id)
            return end is not None and end.status in _NEVER_STOOD
        return f"/{wanted.prefix}" in state.change_set

    def propose(self, wanted: DesiredStack, state: StackState | None) -> Proposal | None:
        """Make a change set for what differs; return None if nothing does.

        Raises: HeldError when somebody else was quicker.
        """
        creates = state is None or state.status == _REVIEW
        with self._sole(state):
            made = self._client.create_change_set(
                StackName=self.name,
                ChangeSetName=f"{wanted.prefix}{uuid.uuid4().hex[:8]}",
                ChangeSetType="CREATE" if creates else "UPDATE",
                Description=self.account.who[:1024],
                TemplateURL=wanted.url,
                Capabilities=["CAPABILITY_IAM"],
                IncludeNestedStacks=wanted.nested,
                Tags=[{"Key": key, "Value": value} for key, value in wanted.tags.items()],
            )
        with self.console.progress("Working out the changes"):
            for pause_s in events.pauses():
                found = self._client.describe_change_set(ChangeSetName=made["Id"])
                if found["Status"] not in ("CREATE_PENDING", "CREATE_IN_PROGRESS"):
                    break
                time.sleep(pause_s)
        proposal = Proposal(made["Id"], made["StackId"], creates, ())
        if found["Status"] == "FAILED":
            self.withdraw(proposal)
            reason = found.get("StatusReason", "")
            if any(phrase in reason for phrase in _NO_CHANGES):
                return None
            raise DeployError(f"CloudFormation cannot make the changes: {reason}", "Fix what it names, then run the command again.")
        return Proposal(made["Id"], made["StackId"], creates, tuple(self._changes(made["Id"])))

    def _changes(self, change_set: str) -> Iterator[Change]:
        for page in self._client.get_paginator("describe_change_set").paginate(ChangeSetName=change_set):
            for each in page.get("Changes", ()):
                change = each["ResourceChange"]
                targets = [detail.get("Target", {}) for detail in change.get("Details", ())]
                what = {target.get("Name") or target.get("Attribute", "") for target in targets} or set(change.get("Scope", ()))
                replaced = change.get("Replacement") == "True"
                yield Change(change["Action"], change["LogicalResourceId"], change["ResourceType"], replaced, tuple(sorted(what)))
                if nested := change.get("ChangeSetId"):
                    yield from self._changes(nested)

    def withdraw(self, proposal: Proposal) -> None:
        """Delete a proposal, and its stack if the stack is nothing but this proposal."""
        self._client.delete_change_set(ChangeSetName=proposal.id)
        if proposal.creates and not self._proposed(proposal.stack_id) - {proposal.id}:
            self._client.delete_stack(StackName=proposal.stack_id)

    def _proposed(self, stack_id: str) -> set[str]:
        """Return the ARNs of the change sets that can still be executed."""
        pages = self._client.get_paginator("list_change_sets").paginate(StackName=stack_id)
        found = [each for page in pages for each in page["Summaries"] if each["StackId"] == stack_id]
        return {each["ChangeSetId"] for each in found if each["ExecutionStatus"] in _MAY_BE_EXECUTED and each["Status"] != "FAILED"}

    def is_unchanged(self, state: StackState) -> bool:
        """Return whether the stack is still as in `state`, and no change is proposed. Changes nothing."""
        now = self.describe(state.id)
        same = now is not None and (now.status, now.change_set, now.since) == (state.status, state.change_set, state.since)
        return same and state.stands and not self._proposed(state.id)

    def execute(self, proposal: Proposal) -> StackState:
        """Execute a proposal and wait for its end, reporting each resource.

        An interrupt leaves the operation to CloudFormation.

        Raises: HeldError when somebody else was quicker, DeployError when everything was rolled back, PartialDeployError when the rollback
        failed.
        """
        after = events.newest(self._client, proposal.stack_id)
        try:
            with self._sole(None, proposal):
                self._client.execute_change_set(ChangeSetName=proposal.id, ClientRequestToken=uuid.uuid4().hex)
            happened = self._follow(proposal.stack_id, after, len(proposal.changes))
        except KeyboardInterrupt:
            cancel = f"remoe destroy {self.deployment} --target aws"
            if not proposal.creates:
                cancel = f"aws cloudformation cancel-update-stack --stack-name {self.name} --region {self.account.region}"
            follow = f"'remoe status {self.deployment} --target aws', or by deploying again"
            self.console.say(f"CloudFormation continues without this command. Follow it with {follow}; cancel it with '{cancel}'.")
            raise
        if happened[-1].status not in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
            raise self._failure(happened)
        pauses = events.pauses()
        while (state := self.describe(proposal.stack_id)) is None or state.status != happened[-1].status:  # read as it was before
            time.sleep(next(pauses))
        return state

    def _failure(self, happened: list[Event]) -> DeployError | PartialDeployError:
        failure, end = events.cause(happened), happened[-1]
        why = _why(failure or end)
        again = f"Fix that and run the command again; 'remoe destroy {self.deployment} --target aws' removes what is left."
        match end.status:
            case "ROLLBACK_COMPLETE":
                return DeployError(f"{why} Everything that was created before it has been rolled back.", again)
            case "UPDATE_ROLLBACK_COMPLETE":
                return DeployError(f"{why} The deployment is what it was before.", again)
            case "DELETE_COMPLETE":
                return DeployError(f"The stack {self.name} has been deleted meanwhile.", "Deploy again, if that is what you want.")
            case _:
                return PartialDeployError(f"{why} The rollback failed too ({end.status}).", again)

    def _continue_rollback(self, state: StackState) -> None:
        after = events.newest(self._client, state.id)
        with self._sole(state):
            self._client.continue_update_rollback(StackName=self.name, ClientRequestToken=uuid.uuid4().hex)
        happened = self._follow(state.id, after)
        if happened[-1].status != "UPDATE_ROLLBACK_COMPLETE":
            failure = events.cause(happened)
            raise PartialDeployError(
                f"{_why(failure or happened[-1])} So the last update cannot be rolled back.",
                f"Fix that and run the command again, or start again: 'remoe destroy {self.deployment} --target aws'.",
            )

    def remove(self, state: StackState) -> tuple[Event, ...]:
        """Delete the stack; return what was deleted, and failures of what stays, outside any stack."""
        try:
            if state.status == "DELETE_IN_PROGRESS" and (happened := self._follow_latest(state))[-1].status == "DELETE_COMPLETE":
                return tuple(happened)
            return self._remove(state.id, state)
        except KeyboardInterrupt:
            self.console.say(
                f"CloudFormation continues to delete. 'remoe destroy {self.deployment} --target aws' follows it and does the rest."
            )
            raise

    def _remove(self, stack_id: str, state: StackState | None = None) -> tuple[Event, ...]:
        """Delete twice, as some resources only need time; then without the resources that fail."""
        removed: tuple[Event, ...] = ()
        retain: list[str] = []
        for attempt in range(3):
            after = events.newest(self._client, stack_id)
            with self._sole(state):
                self._client.delete_stack(StackName=stack_id, **({"RetainResources": retain} if retain else {}))
            happened = self._follow(stack_id, after)
            removed += tuple(event for event in happened if event.status == "DELETE_COMPLETE")
            if happened[-1].status == "DELETE_COMPLETE":
                return removed
            failed = {event.name: event for event in happened if event.failed and event.stack_id == stack_id and not event.of_stack}
            if attempt:
                for event in failed.values():
                    removed += self._remove(event.id) if event.kind == events.STACK else (event,)
                retain = sorted(event.name for event in failed.values() if event.kind != events.STACK)
        raise PartialDeployError(
            f"The stack {self.name} cannot be deleted: {_why(events.cause(happened) or happened[-1])}",
            f"Fix that, then run 'remoe destroy {self.deployment} --target aws' again.",
        )

    def _follow_latest(self, state: StackState) -> list[Event]:
        end = events.before(self._client, state.id)
        return self._follow(state.id, end.key if end else None)

    def _follow(self, stack_id: str, after: str | None, total: int | None = None) -> list[Event]:
        """Follow an operation to its end, report each resource, and return all events."""
        happened: list[Event] = []
        done = 0
        with self.console.progress(f"Stack {self.name}") as report:
            for event in events.follow(self._client, stack_id, after):
                happened.append(event)
                if event.failed:
                    self.console.say(_why(event))
                if event.ended and not event.of_stack:
                    done += 1
                    report(done, total and max(done, total), f"{event.name} ({event.kind}): {event.status}")
        return happened

    @contextmanager
    def _sole(self, before: StackState | None, proposal: Proposal | None = None) -> Iterator[None]:
        """Make a call that only one of several can win. Raises: HeldError when somebody else has won."""
        try:
            yield
        except ClientError as error:
            if code_of(error).removesuffix("Exception") not in {code.removesuffix("Exception") for code in _LOST}:
                raise
            now = self.describe()
            if now is None and (proposal or before):
                message = f"The stack {self.name} has been deleted meanwhile by somebody who destroys it."
                raise HeldError(message, "When that is done, run the command again.") from error
            if now and proposal and now.busy and now.change_set == proposal.id:
                return  # a call that was repeated because its answer was lost
            if now and (now.busy or proposal or (now.stands and now.change_set != (before.change_set if before else ""))):
                raise self.held(now) from error
            raise


def _why(event: Event) -> str:
    reason = event.reason or event.status
    return f"{event.name} ({event.kind}) failed: {reason}{'' if reason.endswith('.') else '.'}"

"""moto's server in a process of its own, with CloudFormation and S3 mended where they differ from AWS's.

What moto 5.2 lacks, and what is put in its place here:

- A change set is executed at once, without events of resources, rollback or a lock. Here it takes its time in a thread, tells of every
  resource, is refused while another operation goes on, and takes back what it did when a resource fails.
- A second change set of a stack in review makes a second stack of that name; executing one changes neither the stack's tags, nor its
  outputs, nor does it name the change set or drop the others.
- A stack that cannot be deleted is an error of the call, and does not fail; RetainResources are not known.
- A function runs in Docker. Here the local twin runs it (moto_functions.py).
- AWS::Lambda::Alias and AWS::Lambda::CapacityProvider are not known, a version has no number and is never deleted, an endpoint has not its
  name, and a nested stack's physical id is not its ARN.
- S3 does not hold what it is sent against its checksum, nor list the checksums of parts.

Run as `python -m tests.support.moto_server`: prints the address once it serves, and serves until its stdin closes.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from moto.awslambda.exceptions import UnknownFunctionException
from moto.awslambda.models import LambdaFunction, LambdaVersion, lambda_backends
from moto.cloudformation import models as cloudformation
from moto.cloudformation.exceptions import AlreadyExistsException, CloudFormationError, ValidationError
from moto.cloudformation.models import ChangeSet, CloudFormationBackend, Stack
from moto.cloudformation.parsing import parse_and_update_resource
from moto.cloudformation.responses import CloudFormationResponse
from moto.cloudformation.utils import generate_changeset_id
from moto.core.responses import EmptyResult
from moto.core.utils import utcnow
from moto.s3.exceptions import S3ClientError
from moto.s3.models import s3_backends
from moto.s3.responses import S3Response
from moto.sagemaker.models import FakeEndpoint
from moto.server import ThreadedMotoServer

from tests.support import (
    moto_functions,
    moto_resources,  # noqa: F401 - moto finds models by their class
)

PAUSE_S = 0.002  # before each resource
# A stack of this name makes one resource, then waits until there is a bucket of the other.
SLOW_STACK, GO_BUCKET = "remoe-slow", "go-on"


class InvalidChangeSetStatus(CloudFormationError):
    code = "InvalidChangeSetStatus"


class ChangeSetNotFound(CloudFormationError):
    code = "ChangeSetNotFound"


def delete_version(self: LambdaVersion, account_id: str, region: str) -> None:
    with suppress(UnknownFunctionException):
        lambda_backends[account_id][region].delete_function(self.function, str(self.version))  # type: ignore[attr-defined]


_make_version = LambdaVersion.create_from_cloudformation_json.__func__  # type: ignore[attr-defined]


def make_version(cls: type[LambdaVersion], resource_name: str, cloudformation_json: Any, *given: Any, **named: Any) -> LambdaVersion:
    made: LambdaVersion = _make_version(cls, resource_name, cloudformation_json, *given, **named)
    made.function = cloudformation_json["Properties"]["FunctionName"]  # type: ignore[attr-defined]
    return made


_lock = threading.RLock()
_make_review = CloudFormationBackend.create_change_set


def _busy(stack: Stack) -> bool:
    return stack.status.endswith("_IN_PROGRESS") and stack.status != "REVIEW_IN_PROGRESS"


def create_change_set(self: CloudFormationBackend, stack_name: str, change_set_name: str, template: str, **given: Any) -> tuple[str, str]:
    with _lock:
        stack = next((each for each in self.stacks.values() if each.name == stack_name), None)
        kind = given["change_set_type"]
        if stack and (_busy(stack) or (kind == "UPDATE" and stack.status in ("ROLLBACK_COMPLETE", "REVIEW_IN_PROGRESS"))):
            raise ValidationError(message=f"Stack:{stack.stack_id} is in {stack.status} state and can not be updated.")
        if kind == "CREATE" and stack and stack.status != "REVIEW_IN_PROGRESS":
            raise AlreadyExistsException(f"Stack {stack_name} already exists and cannot be created with the changeSet.")
        if kind == "CREATE" and stack:
            change_set = ChangeSet(
                change_set_id=generate_changeset_id(change_set_name, self.region_name, self.account_id),
                change_set_name=change_set_name,
                stack=stack,
                template=template,
                **given,
            )
            change_set.status, change_set.execution_status = "CREATE_COMPLETE", "AVAILABLE"
            self.change_sets[change_set.change_set_id] = change_set
            return change_set.change_set_id, stack.stack_id
        return _make_review(self, stack_name, change_set_name, template, **given)


def delete_change_set(self: CloudFormationBackend, change_set_name: str) -> None:
    self.change_sets.pop(change_set_name, None)


def describe_change_set(self: CloudFormationBackend, change_set_name: str) -> ChangeSet:
    if change_set_name not in self.change_sets:
        raise ChangeSetNotFound(f"ChangeSet [{change_set_name}] does not exist")
    return self.change_sets[change_set_name]


def execute_change_set(self: CloudFormationBackend, change_set_name: str, stack_name: str | None = None) -> None:
    with _lock:
        change_set = describe_change_set(self, change_set_name)
        stack = change_set.stack
        if change_set.execution_status != "AVAILABLE" or _busy(stack):
            raise InvalidChangeSetStatus(f"ChangeSet [{change_set_name}] cannot be executed in its current status.")
        for other in [each.change_set_id for each in self.change_sets.values() if each.stack is stack and each is not change_set]:
            del self.change_sets[other]
        change_set.execution_status = "EXECUTE_IN_PROGRESS"
        stack.change_set_id, stack.last_updated_time, stack.cancelled = change_set_name, utcnow(), False  # type: ignore[attr-defined]
        operation = _Operation(stack, change_set)
        stack.thread = threading.Thread(target=operation.run, daemon=True)  # type: ignore[attr-defined]
        operation.tell(f"{operation.kind}_IN_PROGRESS", "User Initiated")
        stack.thread.start()  # type: ignore[attr-defined]


def delete_stack(self: CloudFormationBackend, name_or_stack_id: str, retain: Sequence[str] = ()) -> None:
    stack = next((each for each in self.stacks.values() if name_or_stack_id in (each.name, each.stack_id)), None)
    if stack is None:
        return
    if stack.status.startswith("UPDATE") and _busy(stack):
        raise ValidationError(message=f"Stack [{stack.name}] cannot be deleted while in status {stack.status}")
    if retain and stack.status != "DELETE_FAILED":
        raise ValidationError(message="Invalid operation on stack. RetainResources is for stacks in DELETE_FAILED.")
    if _busy(stack):
        stack.cancelled = True  # type: ignore[attr-defined]
        stack.thread.join()  # type: ignore[attr-defined]
    for change_set in [each.change_set_id for each in self.change_sets.values() if each.stack is stack]:
        del self.change_sets[change_set]
    tell(stack, "DELETE_IN_PROGRESS", "User Initiated")
    resources, failed = stack.resource_map._resource_json_map, False
    for name in reversed([name for name in resources if name in stack.resource_map._parsed_resources and name not in retain]):
        try:
            delete_resource(stack, name, resources)
        except Exception as error:
            tell(stack, "DELETE_FAILED", reply(error), name, resources)
            failed = True
    if failed:
        tell(stack, "DELETE_FAILED", "Some resources failed to delete")
    else:
        self.deleted_stacks[stack.stack_id] = self.stacks.pop(stack.stack_id)
        tell(stack, "DELETE_COMPLETE")


def respond_to_delete_stack(self: CloudFormationResponse) -> EmptyResult:
    delete_stack(self.cloudformation_backend, self._get_param("StackName"), self._get_param("RetainResources", []))
    return EmptyResult()


def delete_resource(stack: Stack, name: str, resources: Any) -> None:
    tell(stack, "DELETE_IN_PROGRESS", None, name, resources)
    if (made := stack.resource_map._parsed_resources.get(name)) is not None:
        try:
            stack.resource_map._delete_resource(made, resources[name])
        except Exception as error:
            if not any(phrase in reply(error).lower() for phrase in ("not found", "could not find")):  # what is gone is deleted
                raise
    tell(stack, "DELETE_COMPLETE", None, name, resources)
    stack.resource_map._parsed_resources.pop(name, None)


def tell(stack: Stack, status: str, reason: str | None = None, name: str | None = None, resources: Any = None) -> None:
    """Add an event of the stack, which sets its status, or of the resource `name`."""
    if name is None:
        stack.status = status
        stack._add_stack_event(status, reason)
        return
    made = stack.resource_map._parsed_resources.get(name)
    where = (stack.stack_id, stack.name, name, getattr(made, "physical_resource_id", None) or "", resources[name]["Type"])
    stack.events.append(cloudformation.Event(*where, status, reason, None))


def reply(error: Exception) -> str:
    return str(getattr(error, "description", None) or getattr(error, "message", None) or error)


def _may_go() -> bool:
    return any(GO_BUCKET in backend.buckets for account in s3_backends.values() for backend in account.values())


class _Operation:
    """Executing one change set."""

    def __init__(self, stack: Stack, change_set: ChangeSet) -> None:
        self.stack, self.change_set, self.map = stack, change_set, stack.resource_map
        self.kind = change_set.change_set_type
        self.old, self.new = self.map._resource_json_map, change_set.template_dict["Resources"]
        self.changed: list[tuple[str, str]] = []

    def tell(self, status: str, reason: str | None = None, name: str | None = None) -> None:
        tell(self.stack, status, reason, name, self.new)

    def run(self) -> None:
        try:
            self._forward()
        except Exception as error:
            self._back(reply(error))
            self.change_set.execution_status = "EXECUTE_FAILED"
        else:
            self.change_set.execution_status = "EXECUTE_COMPLETE"

    def _forward(self) -> None:
        diff = self.map.build_resource_diff(self.change_set.template_dict)
        self._load(self.new)
        for name in self.new:
            action = next((action for action in ("Add", "Modify") if name in diff[action]), None)
            if action is None:
                continue
            verb = "CREATE" if action == "Add" else "UPDATE"
            time.sleep(PAUSE_S)
            while self.changed and self.stack.name == SLOW_STACK and not self.stack.cancelled and not _may_go():  # type: ignore[attr-defined]
                time.sleep(PAUSE_S)
            self.tell(f"{verb}_IN_PROGRESS", name=name)
            try:
                if self.stack.cancelled:  # type: ignore[attr-defined]
                    raise RuntimeError("Resource creation cancelled")
                self._change(action, name, self.new)
            except Exception as error:
                self.tell(f"{verb}_FAILED", reply(error), name)
                raise
            self.changed.append((action, name))
            self.tell(f"{verb}_COMPLETE", name=name)
        for name in diff["Remove"]:
            delete_resource(self.stack, name, self.old)
        self.stack.template, self.stack.template_dict = self.change_set.template, self.change_set.template_dict
        self.stack.tags = dict(self.change_set.tags or {})
        self.stack.output_map = self.stack._create_output_map()
        self.tell(f"{self.kind}_COMPLETE")

    def _back(self, reason: str) -> None:
        prefix = "" if self.kind == "CREATE" else "UPDATE_"
        self.tell(f"{prefix}ROLLBACK_IN_PROGRESS", f"The following resource(s) failed: {reason}")
        for action, name in reversed(self.changed):
            if action == "Add":
                delete_resource(self.stack, name, self.new)
            else:
                self._change("Modify", name, self.old)
        self._load(self.old)
        self.tell(f"{prefix}ROLLBACK_COMPLETE")

    def _load(self, resources: Any) -> None:
        self.map._template, self.map._resource_json_map = self.change_set.template_dict, resources
        self.map.load_mapping()
        self.map.load_parameters()
        self.map.load_conditions()

    def _change(self, action: str, name: str, resources: Any) -> None:
        if action == "Add":
            _ = self.map[name]
        elif name in self.map._parsed_resources:
            where = {"account_id": self.stack.account_id, "region_name": self.stack.region_name}
            changed = parse_and_update_resource(name, resources[name], self.map, **where)
            if changed is not None:
                self.map._parsed_resources[name] = changed


class BadDigest(S3ClientError):
    code = 400

    def __init__(self) -> None:
        super().__init__("BadDigest", "The SHA256 you specified did not match the calculated checksum.")


_checksum = S3Response._get_checksum
_serialized = S3Response.serialized


def _get_checksum(self: S3Response, response_headers: dict[str, Any]) -> Any:
    given = self.headers.get("x-amz-checksum-sha256")
    if given and given != base64.b64encode(hashlib.sha256(self.body).digest()).decode():
        raise BadDigest()
    return _checksum(self, response_headers)


def serialized(self: S3Response, answer: Any) -> Any:
    if self.data["Action"] == "ListParts":
        stored = self.backend.get_bucket(self.bucket_name).multiparts[answer.result["UploadId"]].parts
        for part in answer.result["Parts"]:
            part["ChecksumSHA256"] = base64.b64encode(hashlib.sha256(stored[part["PartNumber"]].value).digest()).decode()
    return _serialized(self, answer)


def main() -> None:
    CloudFormationResponse.delete_stack = respond_to_delete_stack  # type: ignore[method-assign]
    FakeEndpoint.cloudformation_name_type = staticmethod(lambda: "EndpointName")  # type: ignore[method-assign]
    for mended in (create_change_set, delete_change_set, describe_change_set, execute_change_set, delete_stack):
        setattr(CloudFormationBackend, mended.__name__, mended)
    for mended in (_get_checksum, serialized):
        setattr(S3Response, mended.__name__, mended)
    LambdaVersion.create_from_cloudformation_json = classmethod(make_version)  # type: ignore[assignment]
    LambdaVersion.delete = delete_version  # type: ignore[attr-defined]
    LambdaVersion.get_cfn_attribute = lambda self, attribute: self.version
    Stack.physical_resource_id = property(lambda self: self.stack_id)  # type: ignore[assignment]
    warnings.simplefilter("ignore")
    logging.disable()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    moto_functions.serve(f"http://{host}:{port}")
    LambdaFunction.invoke = moto_functions.invoke  # type: ignore[method-assign]
    print(f"http://{host}:{port}", flush=True)
    sys.stdin.read()
    moto_functions.close()
    os._exit(0)


if __name__ == "__main__":
    main()

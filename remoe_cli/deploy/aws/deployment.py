"""Create, update and destroy one AWS deployment (bucket and stack).

After an interruption the same command continues where it was: objects in the bucket are known by their digests, and CloudFormation knows
what it has done. This module does not know plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

from botocore.exceptions import ClientError

from remoe_cli.deploy.account_rules import AccountRules, recorded_in
from remoe_cli.deploy.aws import lock, names, status, template
from remoe_cli.deploy.aws.events import STACK, Event
from remoe_cli.deploy.aws.objects import Object, object_of
from remoe_cli.deploy.aws.session import Account, plain_errors
from remoe_cli.deploy.aws.stack import Change, DesiredStack, Proposal, Stack, StackState
from remoe_cli.deploy.aws.storage import Bucket
from remoe_cli.deploy.aws.template import Templates
from remoe_cli.deploy.aws.tidy import tidy
from remoe_cli.deploy.console import Console, Overview
from remoe_cli.errors import DeployError, PartialDeployError, UsageError
from remoe_cli.units import size


def recorded_rules(account: Account, name: str, *, of_deleted: bool = False) -> AccountRules:
    """Return the rules of an earlier deployment of this name, which its stack's template keeps.

    There are none without a stack, and with `of_deleted` the bucket of the last one: CloudFormation knows a deleted stack's template for 90
    days. So a destroy that ended between stack and bucket finds a bucket of the user's again.
    """
    names.check_name(name)
    with plain_errors(account.origin):
        stack = Stack(account, name)
        state = stack.describe()
        if state and not state.empty:
            return recorded_in(stack.template(state))
        deleted = stack.last_deleted() if of_deleted and not state else None
        return AccountRules(bucket=recorded_in(stack.template(deleted)).bucket) if deleted else AccountRules()


def apply(
    account: Account,
    name: str,
    made: Templates,
    objects: Sequence[Object],
    console: Console,
    explain: Callable[[Sequence[Change]], Overview] = lambda changes: Overview(),
) -> dict[str, Any]:
    """Make a deployment what these templates say, with these objects in its bucket.

    It does nothing if the deployment is so already. `explain` gives the overview of the changes that the user is asked to agree to. Returns
    the status document with the `changes` made.

    Raises: HeldError while somebody else works on it, DeployError when it fails and all is as before, PartialDeployError when it is neither
    as before nor as it should be.
    """
    with plain_errors(account.origin):
        rules = recorded_in(made.root)
        stack, bucket = Stack(account, name, console), Bucket.of(account, name, rules)
        _refuse_foreign(stack, bucket, stack.describe(), bucket.tags())
        tags = dict(rules.tags) | {names.DEPLOYMENT_TAG: name}
        wanted = DesiredStack(made.root, bucket.url(template.key(made.root)), bool(made.nested), tags)
        state = stack.recover(wanted)
        as_wanted = state is not None and stack.matches(wanted, state)
        deployed = stack.template(state) if state and state.stands and not as_wanted else None
        before = rules if deployed is None else recorded_in(deployed)
        if before.bucket != rules.bucket:
            raise UsageError(
                f"The deployment's objects are in {Bucket.of(account, name, before).name}, and cannot move to another bucket.",
                f"Leave --bucket out, or run 'remoe destroy {name} --target aws' first.",
            )
        templates = tuple(object_of(key, body) for key, body in made.bodies.items())
        needed = {each.key for each in (*templates, *objects)}
        with console.progress("Comparing with the bucket"):
            bucket_tags = bucket.tags()
            missing = bucket.missing((*templates, *objects))
        lock.refuse_held(bucket, name)
        old_tags = {key: value for key, value in (bucket_tags or {}).items() if key not in dict(before.tags)}
        complete = bucket.is_own or (bucket_tags is not None and old_tags | tags == bucket_tags)
        if state and as_wanted and not missing and complete:
            if not (freed_bytes := tidy(stack, bucket, state, needed, console)):
                console.say("Nothing to do: the deployment is as the plan says.")
            return _document(account, name, console, (), freed_bytes)
        if deployed is not None and _is_nested(deployed) != wanted.nested:
            needs, has = ("several stacks", "one") if wanted.nested else ("one stack", "several")
            raise DeployError(
                f"The plan needs {needs}, the deployment has {has}, and functions cannot move between stacks.",
                f"Deploy it under another --name, or run 'remoe destroy {name} --target aws' first.",
            )
        if not complete:
            bucket.make(tags, None if bucket_tags is None else old_tags)
        with _unless_destroyed(name, bucket):
            with _as_it_was(stack, bucket, proposals := [], bucket_tags is None):
                bucket.upload([each for each in templates if each in missing])
                if not as_wanted and (proposal := stack.propose(wanted, state)):
                    proposals.append(proposal)
                # While a change set waits nobody tidies the bucket: what is there now will be.
                there = {each.key for each in bucket.stored()}
                rest = [each for each in objects if each in missing or each.key not in there]
                changes = proposals[0].changes if proposals else ()
                upload = size(sum(each.size_bytes for each in rest))
                where = f"account {account.id}, {account.region}"
                if not console.agree(f"Deploy '{name}' to {where}, uploading {upload}?", explain(changes)):
                    raise DeployError("Nothing was deployed, as you did not agree.", "")
                holding = ExitStack()
                holding.enter_context(lock.held(bucket, name, "deploys"))
            with holding:
                try:
                    with console.progress("Uploading", of_bytes=True) as report:
                        bucket.upload(rest, report)
                except KeyboardInterrupt:
                    console.say(f"Uploaded files stay. The same command continues; 'remoe destroy {name} --target aws' removes it.")
                    raise
                if proposals:
                    state = stack.execute(proposals[0])
        freed_bytes = tidy(stack, bucket, state, needed, console) if state else 0
        return _document(account, name, console, changes, freed_bytes)


def _refuse_foreign(stack: Stack, bucket: Bucket, state: StackState | None, tags: Mapping[str, str] | None) -> None:
    """Refuse a stack or a bucket that has the name of a deployment's and that remoe did not make.

    A bucket without a tag may be one whose making was interrupted: then it holds nothing.

    Raises: UsageError for such a stack or bucket.
    """
    hint = "Choose another --name."
    if state and not state.empty and names.DEPLOYMENT_TAG not in state.tags:
        raise UsageError(f"The stack {stack.name} has no tag {names.DEPLOYMENT_TAG}: remoe did not make it.", hint)
    if bucket.is_own:
        return
    if tags is not None and names.DEPLOYMENT_TAG not in tags and (foreign := bucket.foreign()):
        raise UsageError(f"The bucket {bucket.name} holds objects that remoe did not make, such as {foreign[0]}.", hint)


def _document(account: Account, name: str, console: Console, changes: Sequence[Change], freed_bytes: int) -> dict[str, Any]:
    with console.progress("Reading the status"):
        return {**status.read(account, name), "changes": [asdict(change) for change in changes], "freed_bytes": freed_bytes}


def _is_nested(deployed: Mapping[str, Any]) -> bool:
    return any(resource["Type"] == STACK for resource in deployed["Resources"].values())


@contextmanager
def _as_it_was(stack: Stack, bucket: Bucket, proposals: Sequence[Proposal], is_new: bool) -> Iterator[None]:
    """Withdraw the proposal when the block raises, and remove the bucket if it `is_new`."""
    try:
        yield
    except BaseException:
        for proposal in proposals:
            stack.withdraw(proposal)
        if is_new and not lock.owner(bucket):  # else it is another's by now
            bucket.remove()
        raise


@contextmanager
def _unless_destroyed(name: str, bucket: Bucket) -> Iterator[None]:
    """Explain a refusal of AWS that comes from somebody who destroys the deployment at this moment."""
    try:
        yield
    except ClientError as error:
        if (holder := lock.owner(bucket)) and holder.work == "destroys":
            raise lock.held_by(bucket, name, holder) from error
        if bucket.tags() is None:
            raise lock.destroyed(bucket, name) from error
        raise


def destroy(account: Account, name: str, console: Console) -> dict[str, Any]:
    """Delete the stack, then the bucket with all its objects.

    `left` of the returned document lists what still has the deployment's tag, `kept` the objects that remoe did not put into the bucket;
    these stay, and the bucket with them. Where there is nothing of this name, the document's `state` is absent.

    Raises: HeldError while somebody else changes it, PartialDeployError for what cannot be deleted.
    """
    rules = recorded_rules(account, name, of_deleted=True)
    with plain_errors(account.origin):
        stack, bucket = Stack(account, name, console), Bucket.of(account, name, rules)
        state, bucket_tags = stack.describe(), bucket.tags()
        gone: dict[str, Any] = {"name": name, "target": "aws", "state": "destroyed", "left": [], "kept": []}
        if state is None and (bucket_tags is None or (bucket.is_own and not bucket.stored())):
            return gone | {"state": "absent", "account": account.id, "region": account.region}
        _refuse_foreign(stack, bucket, state, bucket_tags)
        described = f"the stack {stack.name} ({state.status})" if state else "no stack"
        emptied = f"remoe's objects in the bucket {bucket.name}" if bucket.is_own else f"the bucket {bucket.name} and all in it"
        if not console.agree(f"Destroy '{name}' in account {account.id}, {account.region}: {described}, {emptied}?"):
            raise DeployError("Nothing was destroyed, as you did not agree.", "")
        if state is None and bucket.remove_empty():  # without a lock, which could not be put where little is allowed
            return gone
        if bucket_tags is None:
            return gone | _end(account, name, stack, bucket, state, console)
        with lock.held(bucket, name, "destroys"):
            if state is None and (now := stack.describe()):
                raise stack.held(now)  # somebody has proposed it meanwhile
            return gone | _end(account, name, stack, bucket, state, console)


def _end(account: Account, name: str, stack: Stack, bucket: Bucket, state: StackState | None, console: Console) -> dict[str, Any]:
    """Delete stack and bucket; return what is left and what was kept."""
    removed = stack.remove(state) if state else ()
    if now := stack.describe():
        raise stack.held(now)
    with console.progress(f"Emptying and deleting the bucket {bucket.name}"):
        kept = bucket.remove()
    gone = [event.id for event in removed if event.status == "DELETE_COMPLETE"]
    left = status.tagged(account, name, gone=[*gone, bucket.name])
    if stuck := [event for event in removed if event.failed]:
        raise PartialDeployError(
            f"{len(stuck)} resources could not be deleted, and are in no stack any more: {'; '.join(map(_stuck, stuck))}",
            "Fix what it names, then delete them by hand.",
        )
    return {"left": left, "kept": [f"s3://{bucket.name}/{key}" for key in kept]}


def _stuck(event: Event) -> str:
    return f"{event.kind} {event.id or event.name}: {event.reason}"

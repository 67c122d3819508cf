"""Create, update and destroy one AWS deployment (bucket and stack).

After an interruption the same command continues where it was: objects in the bucket are known by their digests, and CloudFormation knows
what it has done. This module does not know plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from botocore.exceptions import ClientError

from remoe_cli.deploy.aws import names, status, template
from remoe_cli.deploy.aws.events import STACK, Event
from remoe_cli.deploy.aws.session import Account, plain_errors
from remoe_cli.deploy.aws.stack import Change, DesiredStack, Proposal, Stack
from remoe_cli.deploy.aws.storage import Bucket, Object, object_of
from remoe_cli.deploy.aws.template import Templates
from remoe_cli.deploy.aws.tidy import tidy
from remoe_cli.deploy.console import Console, Overview
from remoe_cli.errors import DeployError, HeldError, PartialDeployError, UsageError


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
        stack, bucket = Stack(account, name, console), Bucket(account, names.bucket(name, account.id, account.region))
        _refuse_foreign(stack, bucket)
        tags = {names.DEPLOYMENT_TAG: name}
        wanted = DesiredStack(made.root, bucket.url(template.key(made.root)), bool(made.nested), tags)
        state = stack.recover(wanted)
        as_wanted = state is not None and stack.matches(wanted, state)
        templates = tuple(object_of(key, body) for key, body in made.bodies.items())
        needed = {each.key for each in (*templates, *objects)}
        with console.progress("Comparing with the bucket"):
            missing, bucket_tags = bucket.missing((*templates, *objects)), bucket.tags()
        if bucket_tags and names.DESTROYER_TAG in bucket_tags:
            raise _destroyed(name, bucket, bucket_tags)
        if state and as_wanted and not missing and bucket_tags == tags:
            if not (freed_bytes := tidy(stack, bucket, state, needed, console)):
                console.say("Nothing to do: the deployment is as the plan says.")
            return _document(account, name, console, (), freed_bytes)
        if state and state.stands and _is_nested(stack.template(state)) != wanted.nested:
            needs, has = ("several stacks", "one") if wanted.nested else ("one stack", "several")
            raise DeployError(
                f"The plan needs {needs}, the deployment has {has}, and functions cannot move between stacks.",
                f"Deploy it under another --name, or run 'remoe destroy {name} --target aws' first.",
            )
        if bucket_tags != tags:
            bucket.make(tags)
        with _unless_destroyed(name, bucket):
            bucket.upload([each for each in templates if each in missing])
            proposal = None if as_wanted else stack.propose(wanted, state)
            with _as_it_was(stack, bucket, proposal, bucket_tags is None):
                # While a change set waits nobody tidies, or begins to empty, the bucket: what is there now will be.
                there = {each.key for each in bucket.stored()}
                if names.DESTROYER_TAG in (now := bucket.tags() or {}):
                    raise _destroyed(name, bucket, now)
                rest = [each for each in objects if each in missing or each.key not in there]
                changes = proposal.changes if proposal else ()
                upload_mb = sum(each.size_bytes for each in rest) / 1e6
                where = f"account {account.id}, {account.region}"
                if not console.agree(f"Deploy '{name}' to {where}, uploading {upload_mb:,.1f} MB?", explain(changes)):
                    raise DeployError("Nothing was deployed, as you did not agree.", "")
            try:
                with console.progress("Uploading", of_bytes=True) as report:
                    bucket.upload(rest, report)
            except KeyboardInterrupt:
                console.say(f"Uploaded files stay. The same command continues; 'remoe destroy {name} --target aws' removes it.")
                raise
            if proposal:
                state = stack.execute(proposal)
        freed_bytes = tidy(stack, bucket, state, needed, console) if state else 0
        return _document(account, name, console, changes, freed_bytes)


def _refuse_foreign(stack: Stack, bucket: Bucket) -> None:
    """Refuse a stack or a bucket that has the name of a deployment's and that remoe did not make.

    A bucket without a tag may be one whose making was interrupted: then it holds nothing.

    Raises: UsageError for such a stack or bucket.
    """
    state, tags, hint = stack.describe(), bucket.tags(), "Choose another --name."
    if state and not state.empty and names.DEPLOYMENT_TAG not in state.tags:
        raise UsageError(f"The stack {stack.name} has no tag {names.DEPLOYMENT_TAG}: remoe did not make it.", hint)
    if tags is not None and names.DEPLOYMENT_TAG not in tags and (foreign := bucket.foreign()):
        raise UsageError(f"The bucket {bucket.name} holds objects that remoe did not make, such as {foreign[0]}.", hint)


def _document(account: Account, name: str, console: Console, changes: Sequence[Change], freed_bytes: int) -> dict[str, Any]:
    with console.progress("Reading the status"):
        return {**status.read(account, name), "changes": [asdict(change) for change in changes], "freed_bytes": freed_bytes}


def _is_nested(deployed: Mapping[str, Any]) -> bool:
    return any(resource["Type"] == STACK for resource in deployed["Resources"].values())


@contextmanager
def _as_it_was(stack: Stack, bucket: Bucket, proposal: Proposal | None, is_new: bool) -> Iterator[None]:
    """Withdraw the proposal when the block raises, and remove the bucket if it `is_new`."""
    try:
        yield
    except BaseException:
        if proposal:
            stack.withdraw(proposal)
        if is_new:
            bucket.remove()
        raise


@contextmanager
def _unless_destroyed(name: str, bucket: Bucket) -> Iterator[None]:
    """Explain a refusal of AWS that comes from somebody who destroys the deployment at this moment."""
    try:
        yield
    except ClientError as error:
        tags = bucket.tags()
        if tags is None or names.DESTROYER_TAG in tags:
            raise _destroyed(name, bucket, tags or {}) from error
        raise


def _destroyed(name: str, bucket: Bucket, tags: Mapping[str, str]) -> HeldError:
    return HeldError(
        f"The bucket {bucket.name} is held by {tags.get(names.DESTROYER_TAG, 'somebody')}, who destroys the deployment '{name}'.",
        f"When that is done, run the command again. If it was interrupted, 'remoe destroy {name} --target aws' continues it.",
    )


def destroy(account: Account, name: str, console: Console) -> dict[str, Any]:
    """Delete the stack, then the bucket with all its objects.

    `left` of the returned document lists what still has the deployment's tag, `kept` the objects that remoe did not put into the bucket;
    these stay, and the bucket with them.

    Raises: DeployError for an unknown name, HeldError while somebody else changes it, PartialDeployError for what cannot be deleted.
    """
    names.check_name(name)
    with plain_errors(account.origin):
        stack, bucket = Stack(account, name, console), Bucket(account, names.bucket(name, account.id, account.region))
        state, bucket_tags = stack.describe(), bucket.tags()
        if state is None and bucket_tags is None:
            raise status.unknown(account, name)
        _refuse_foreign(stack, bucket)
        described = f"the stack {stack.name} ({state.status})" if state else "no stack"
        if not console.agree(
            f"Destroy '{name}' in account {account.id}, {account.region}: {described}, the bucket {bucket.name} and all in it?"
        ):
            raise DeployError("Nothing was destroyed, as you did not agree.", "")
        removed = stack.remove(state) if state else ()
        _claim(account, stack, bucket)
        with console.progress(f"Emptying and deleting the bucket {bucket.name}"):
            kept = bucket.remove()
        gone = [event.id for event in removed if event.status == "DELETE_COMPLETE"]
        left = status.tagged(account, name, gone=[*gone, bucket.name])
        if stuck := [event for event in removed if event.failed]:
            raise PartialDeployError(
                f"{len(stuck)} resources could not be deleted, and are in no stack any more: {'; '.join(map(_stuck, stuck))}",
                "Fix what it names, then delete them by hand.",
            )
        return {"name": name, "target": "aws", "state": "destroyed", "left": left, "kept": [f"s3://{bucket.name}/{key}" for key in kept]}


def _claim(account: Account, stack: Stack, bucket: Bucket) -> None:
    """Mark the bucket as being emptied, for those who deploy.

    Who deploys proposes a stack and then looks for this mark. Here the mark is set before looking for a stack, so one of the two sees the
    other.

    Raises: HeldError when there is a stack.
    """
    if (tags := bucket.tags()) is None:
        return
    bucket.tag({**tags, names.DESTROYER_TAG: names.tag_value(account.who)})
    if state := stack.describe():
        bucket.tag({key: value for key, value in tags.items() if key != names.DESTROYER_TAG})
        raise stack.held(state)


def _stuck(event: Event) -> str:
    return f"{event.kind} {event.id or event.name}: {event.reason}"

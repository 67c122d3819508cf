"""Read CloudFormation's events of one operation on a stack, nested stacks included.

Events decide when an operation has ended, and how. The stack's status cannot: it may still be read as it was before.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import islice, takewhile
from typing import Any

from botocore.exceptions import ClientError

STACK = "AWS::CloudFormation::Stack"
_LONGEST_PAUSE_S = 3.0


@dataclass(frozen=True)
class Event:
    """One event: `name` is the resource's logical id, `id` its physical id, `kind` its type."""

    key: str
    time: datetime
    stack_id: str
    name: str
    id: str
    kind: str
    status: str
    reason: str

    @property
    def ended(self) -> bool:
        return not self.status.endswith("_IN_PROGRESS")

    @property
    def failed(self) -> bool:
        return self.status.endswith("_FAILED")

    @property
    def of_stack(self) -> bool:
        """Return whether the event is about its stack itself, not about a resource of it."""
        return self.id == self.stack_id


def newest(client: Any, stack_id: str) -> str | None:
    """Return the key of the latest event; `follow` starts after it, for an operation that begins now."""
    return next((event.key for event in _events(client, stack_id)), None)


def before(client: Any, stack_id: str) -> Event | None:
    """Return the event that ended the operation before the latest one.

    The latest operation may have ended since somebody saw it running.
    """
    of_stack = (event for event in _events(client, stack_id) if event.of_stack)
    return next((event for event in islice(of_stack, 1, None) if event.ended), None)


def follow(client: Any, stack_id: str, after: str | None) -> Iterator[Event]:
    """Yield the events after `after`, oldest first, as they come; the last one ends the operation."""
    seen = {after}
    nested: list[str] = []
    began: datetime | None = None
    for pause_s in pauses():
        fresh = _fresh(client, stack_id, seen, None)
        began = began or (fresh[-1].time if fresh else None)
        _note(nested, fresh)
        for each in nested:  # which may grow
            with suppress(ClientError):  # there may be nothing to read yet
                news = _fresh(client, each, seen, began)
                _note(nested, news)
                fresh += news
        fresh.sort(key=lambda event: event.time)
        seen |= {event.key for event in fresh}
        yield from fresh
        if any(event.stack_id == stack_id and event.of_stack and event.ended for event in fresh):
            return
        time.sleep(pause_s)


def _fresh(client: Any, stack_id: str, seen: Set[str | None], began: datetime | None) -> list[Event]:
    """List new events, newest first, until one that was seen or is older than the operation."""
    return list(takewhile(lambda event: event.key not in seen and (began is None or event.time >= began), _events(client, stack_id)))


def _note(nested: list[str], fresh: Iterable[Event]) -> None:
    """Add the nested stacks that the events are about."""
    for event in fresh:
        if event.kind == STACK and event.id and not event.of_stack and event.id not in nested:
            nested.append(event.id)


def pauses() -> Iterator[float]:
    """Yield the seconds to wait between two looks: short at first, for what is quick."""
    pause_s = 0.05
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def cause(events: Iterable[Event]) -> Event | None:
    """Find the failure that caused the others: the first one of a resource that was not only cancelled."""
    failures = [event for event in events if event.failed and "cancelled" not in event.reason.lower()]
    return next((event for event in failures if event.kind != STACK), failures[0] if failures else None)


def _events(client: Any, stack_id: str) -> Iterator[Event]:
    """Yield all events, newest first."""
    for page in client.get_paginator("describe_stack_events").paginate(StackName=stack_id):
        for each in page["StackEvents"]:
            yield Event(
                key=each["EventId"],
                time=each["Timestamp"],
                stack_id=each["StackId"],
                name=each.get("LogicalResourceId", ""),
                id=each.get("PhysicalResourceId", ""),
                kind=each.get("ResourceType", ""),
                status=each.get("ResourceStatus", ""),
                reason=each.get("ResourceStatusReason", ""),
            )

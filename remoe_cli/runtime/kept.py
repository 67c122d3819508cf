"""The receipts of a deployment that are kept on this machine, as JSON lines.

No prompt, no answer and no token is among them.

Whoever answers on this machine keeps them: a main server of the local twin, and `remoe serve`, which does so for deployments on AWS too.
Of a main function on Lambda or SageMaker the client that gets the answer keeps the receipt: `remoe infer`, `remoe chat` and
`remoe profile measure`. So each request is kept once. They are in $REMOE_STATE_DIR/receipts, not in the folder of the deployment: what was
paid is history, and stays when the deployment goes.

    receipts.jsonl       a KeptReceipt for each request and for each loading of a main server: about 1 kB, and 0.3 kB a function.
                         16 files of 64 MiB are kept
    observations.jsonl   a KeptObservation for each answer: at most 20 kB, and about 4 bytes for each expert of the model.
                         2 files of 32 MiB are kept, as the last requests tell best how things are
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import AwareDatetime, Field, ValidationError

from remoe_cli import bounded, journal
from remoe_cli.artifacts import Document, is_none
from remoe_cli.errors import RemoeError
from remoe_cli.journal import Journal
from remoe_cli.redaction import redacted
from remoe_cli.runtime.observed import Observed
from remoe_cli.runtime.receipt import Receipt
from remoe_cli.settings import state_dir

# loading: a main server was loaded, for no request. cancelled: the client left, or the server ended, before the answer was whole.
Kind = Literal["answered", "failed", "cancelled", "loading"]
LONGEST_USER = 512
_log = logging.getLogger(__name__)  # without a handler, its lines go to stderr: the log of a main function


class KeptReceipt(Document):
    """One line of receipts.jsonl.

    ended   when the request was answered or given up
    user    the user that the request named, as it named him
    """

    schema_version: str = "remoe.kept-receipt/1"
    id: str
    ended: AwareDatetime
    kind: Kind
    user: str | None = Field(default=None, max_length=LONGEST_USER, exclude_if=is_none)
    receipt: Receipt


class KeptObservation(Document):
    """One line of observations.jsonl. `id` is that of the request's receipt."""

    schema_version: str = "remoe.kept-observation/1"
    id: str
    ended: AwareDatetime
    observed: Observed


@dataclass(frozen=True)
class Ended:
    """What is known of a request that has ended, or of a loading."""

    kind: Kind
    receipt: Receipt
    user: str | None = None
    observed: Observed | None = None


Keep = Callable[[Ended], None]
D = TypeVar("D", bound=Document)


@dataclass
class Unreadable:
    """The lines that could not be read: those whose writer died, and those that are of another version."""

    places: list[str] = field(default_factory=list)

    @property
    def warning(self) -> str | None:
        """Say how many lines are left out; None for none."""
        if not self.places:
            return None
        count, where = len(self.places), self.places[0]
        if count == 1:
            return f"One line is left out, as it is no whole line of this version of remoe: {where}."
        return f"{count} lines are left out, as they are no whole lines of this version of remoe, the first at {where}."


@dataclass(frozen=True)
class Book:
    """The receipts that are kept of one deployment."""

    folder: Path

    @property
    def _receipts(self) -> Journal:
        return Journal(self.folder, "receipts")

    @property
    def _observations(self) -> Journal:
        return Journal(self.folder, "observations", most_bytes=32 * bounded.MIB, files=2)

    def keep(self, request: Ended) -> None:
        """Keep what is known of a request.

        An answer is not lost because its receipt cannot be kept: then a line of the log says so.
        """
        number, now = secrets.token_hex(8), datetime.now(UTC)
        try:
            kept = KeptReceipt(id=number, ended=now, kind=request.kind, user=request.user, receipt=request.receipt)
            journal.append(self._receipts, kept.model_dump_json())
            if request.observed is not None:
                journal.append(self._observations, KeptObservation(id=number, ended=now, observed=request.observed).model_dump_json())
        except (OSError, RemoeError) as error:
            _log.warning("The receipt of a request could not be kept in %s: %s", self.folder, redacted(str(error)))

    @property
    def exists(self) -> bool:
        """Whether any receipt was kept."""
        return os.path.lexists(self._receipts.path)

    def receipts(self, since: datetime | None = None, unreadable: Unreadable | None = None) -> Iterator[KeptReceipt]:
        """Yield the receipts that ended since then, in the order in which they were kept."""
        return _read(self._receipts, KeptReceipt, since, unreadable)

    def observations(self, since: datetime | None = None, unreadable: Unreadable | None = None) -> Iterator[KeptObservation]:
        """Yield the same of observations."""
        return _read(self._observations, KeptObservation, since, unreadable)


def _read(of: Journal, kind: type[D], since: datetime | None, unreadable: Unreadable | None) -> Iterator[D]:
    places = (unreadable or Unreadable()).places
    for where, line in journal.lines(of, places.append):
        try:
            made = kind.model_validate(line)
            if made.schema_version != kind.model_fields["schema_version"].default:
                raise ValueError("another version")
        except (ValidationError, ValueError):
            places.append(where)
            continue
        if since is None or made.ended >= since:  # type: ignore[attr-defined]
            yield made


def book_of(target: str, *names: str) -> Book:
    """Return the book of a deployment: of the twin by its name, on AWS by account, region and name."""
    return Book(state_dir().joinpath("receipts", target, *names))

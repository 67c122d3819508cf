"""What a report is made from: a profile, a plan, and files of receipts, told apart by what is in them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from remoe_cli import bounded, journal, owned
from remoe_cli.artifacts import NonNegative, Tokens, first_mistake
from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.plan.document import Plan, read_plan
from remoe_cli.plan.problem.trace_requests import TimedRequests, read_requests
from remoe_cli.profile.record import Profile, read_profile
from remoe_cli.runtime.kept import Book, Unreadable, book_of

_HINT = "Give a profile's folder, a plan, the JSON lines that 'remoe infer --json' prints, or the folder of a deployment's receipts."
_KEPT = b'"remoe.kept-receipt/'  # in a file of kept receipts
_MOST = 100_000  # requests; a page draws each of them as a mark


class _Figures(BaseModel):
    """A part of a receipt. Other fields are of no concern here, so that receipts of other versions can be read."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class CostFigures(_Figures):
    total_usd: NonNegative


class PredictedFigures(_Figures):
    cost_usd_per_request: NonNegative
    ttft_s: NonNegative
    tpot_s: NonNegative


class ReceiptFigures(_Figures):
    """The figures of a receipt that a report shows."""

    prompt_tokens: Tokens
    generated_tokens: Tokens
    answered: bool = True
    ttft_s: NonNegative | None
    tpot_s: NonNegative | None
    total_s: NonNegative
    main_load_s: NonNegative = 0.0
    cold_starts: Tokens = 0
    cost: CostFigures | None = None
    predicted: PredictedFigures | None = None

    @property
    def is_cold(self) -> bool:
        """Whether the request waited for something to start."""
        return self.cold_starts > 0 or self.main_load_s > 0

    @property
    def usd(self) -> float | None:
        """The whole cost."""
        return None if self.cost is None else self.cost.total_usd


@dataclass(frozen=True)
class Receipts:
    """Receipts of all files.

    without    counts documents without a receipt, such as errors, and lines that cannot be read
    warnings   say what is left out, with its place
    """

    paths: tuple[Path, ...]
    figures: tuple[ReceiptFigures, ...]
    without: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """What was given."""

    profile: Profile | None
    plan: Plan | None
    plan_path: Path | None
    receipts: Receipts | None
    trace: TimedRequests | None = None


def read_inputs(paths: Sequence[Path], trace: Path | None = None) -> Inputs:
    """Read everything that was given.

    Raises: UsageError for what is none of these, for two of a kind that a report has one of, and for a trace without a plan; what the
    readers raise.
    """
    if not paths:
        raise UsageError("There is nothing to report on.", _HINT)
    profile, plan, plan_path = None, None, None
    read: list[Receipts] = []
    for path in paths:
        if _is_book(path):
            read.append(_kept(path))
        elif path.is_dir():
            if profile is not None:
                raise UsageError(f"{path} is a second profile, and a report is about one.", "Give one profile.")
            profile = read_profile(path)
        elif b'"remoe.plan/' in (content := _read(path)):
            if plan is not None:
                raise UsageError(f"{path} is a second plan, and a report is about one.", "Make a report of each plan.")
            plan, plan_path = read_plan(path), path
        else:
            read.append(_receipts(path, content))
    if trace is not None and plan is None:
        raise UsageError(f"{trace} says when requests come to a plan, and there is no plan.", "Give a plan too, or leave --trace out.")
    return Inputs(profile, plan, plan_path, _together(read) if read else None, None if trace is None else read_requests(trace))


def _together(read: Sequence[Receipts]) -> Receipts:
    paths, figures, warnings = (tuple(one for each in read for one in getattr(each, name)) for name in ("paths", "figures", "warnings"))
    return Receipts(paths, figures, sum(each.without for each in read), warnings)


def _is_book(path: Path) -> bool:
    """Tell whether this is the folder of the receipts that are kept of a deployment."""
    mark = owned.read_mark(path) if path.is_dir() else None
    return path.is_dir() and (Book(path).exists or (mark is not None and mark.kind == journal.KIND))


def _kept(path: Path) -> Receipts:
    """Read the last receipts of such a folder. A loading of a main server is no request."""
    unreadable, found, count = Unreadable(), deque[ReceiptFigures](maxlen=_MOST), 0
    for line in Book(path).receipts(unreadable=unreadable):
        if line.kind != "loading":
            count += 1
            found.append(ReceiptFigures.model_validate(line.receipt, from_attributes=True))
    if not found:
        raise UsageError(f"{path} holds no receipt of a request.", _HINT)
    more = f"Only the last {_MOST:,} of {count:,} receipts in {path} are shown." if count > _MOST else None
    return Receipts((path,), tuple(found), len(unreadable.places), tuple(one for one in (more, unreadable.warning) if one))


def _read(path: Path) -> bytes:
    try:
        return bounded.read_bytes(path, bounded.RESPONSE)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"There is no file or folder {path}.", _hint_of_name(path)) from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.", _HINT) from None


def _hint_of_name(path: Path) -> str:
    """Say where the receipts of a deployment are, where its name was given instead of their folder."""
    if path != Path(path.name) or path.suffix:
        return _HINT
    book = book_of("local", path.name)
    return f"The receipts of the deployment '{path}' are in {book.folder}: give that folder." if book.exists else _HINT


def _receipts(path: Path, content: bytes) -> Receipts:
    """Read the receipts of a file.

    Of kept receipts, which may have lines whose writer died, what is no whole line is left out; other files are refused for one.
    """
    found: list[ReceiptFigures] = []
    without, unreadable = 0, Unreadable()
    for row, document in _documents(path, content, unreadable if _KEPT in content else None):
        if _is_loading(document):
            continue
        receipt = document.get("receipt", document)
        if "error" in document and isinstance(document["error"], Mapping) and "receipt" not in document:
            receipt = document["error"].get("receipt")
        if not isinstance(receipt, Mapping) or "total_s" not in receipt:
            without += 1
            continue
        try:
            found.append(ReceiptFigures.model_validate(receipt))
        except ValidationError as error:
            raise ArtifactError(f"{path}: the receipt in row {row} is damaged {first_mistake(error)}.", _HINT) from None
    if not found:
        raise UsageError(f"{path} holds no receipt.", _HINT)
    if len(found) > _MOST:
        raise UsageError(f"{path} holds {len(found):,} receipts, and {_MOST:,} is the most for a report.", "Give a part of them.")
    warnings = (unreadable.warning,) if unreadable.warning else ()
    return Receipts((path,), tuple(found), without + len(unreadable.places), warnings)


def _is_loading(document: Mapping[str, Any]) -> bool:
    """Tell whether this is a kept receipt of loading a main server, which is no request."""
    return str(document.get("schema_version")).startswith("remoe.kept-receipt/") and document.get("kind") == "loading"


def _documents(path: Path, content: bytes, unreadable: Unreadable | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the JSON objects of a file: one a line, or one document, or a list of them.

    Lines that are none go to `unreadable`, if it is given.
    """
    try:
        text = content.decode("utf-8", "strict" if unreadable is None else "replace")  # a line may end within a character
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a file of receipts (it is not UTF-8).", _HINT) from None
    lines = [(row, line) for row, line in enumerate(text.split("\n"), 1) if line.strip()]
    whole = len(lines) == 1 or (bool(lines) and lines[0][1].strip() in ("{", "["))
    for row, line in [(1, text)] if whole else lines:
        try:
            parsed = bounded.parse_json(line, bounded.RESPONSE, finite=True)
        except ValueError as error:
            if unreadable is not None:
                unreadable.places.append(f"{path}:{row}")
                continue
            raise UsageError(f"{path}: row {row} is not a JSON document: {error}.", _HINT) from None
        for document in parsed if isinstance(parsed, list) else [parsed]:
            if not isinstance(document, Mapping):
                raise UsageError(f"{path}: row {row} is not a JSON object.", _HINT)
            yield row, document

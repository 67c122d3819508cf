"""What a report is made from: a profile, a plan, and files of receipts, told apart by what is in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from remoe_cli import bounded
from remoe_cli.artifacts import NonNegative, Tokens, first_mistake
from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.plan.document import Plan, read_plan
from remoe_cli.profile.record import Profile, read_profile

_HINT = "Give a profile's folder, a plan, or the JSON lines that 'remoe infer --json' prints."
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
    """Receipts of all files. `without` counts documents without a receipt, such as errors."""

    paths: tuple[Path, ...]
    figures: tuple[ReceiptFigures, ...]
    without: int


@dataclass(frozen=True)
class Inputs:
    """What was given."""

    profile: Profile | None
    plan: Plan | None
    plan_path: Path | None
    receipts: Receipts | None


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """Read everything that was given.

    Raises: UsageError for what is none of these, and for two of a kind that a report has one of; what the readers raise.
    """
    if not paths:
        raise UsageError("There is nothing to report on.", _HINT)
    profile, plan, plan_path = None, None, None
    read: list[ReceiptFigures] = []
    files: list[Path] = []
    without = 0
    for path in paths:
        if path.is_dir():
            if profile is not None:
                raise UsageError(f"{path} is a second profile, and a report is about one.", "Give one profile.")
            profile = read_profile(path)
        elif b'"remoe.plan/' in (content := _read(path)):
            if plan is not None:
                raise UsageError(f"{path} is a second plan, and a report is about one.", "Make a report of each plan.")
            plan, plan_path = read_plan(path), path
        else:
            found, missing = _receipts(path, content)
            read, without = [*read, *found], without + missing
            files.append(path)
    return Inputs(profile, plan, plan_path, Receipts(tuple(files), tuple(read), without) if files else None)


def _read(path: Path) -> bytes:
    try:
        return bounded.read_bytes(path, bounded.RESPONSE)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"There is no file or folder {path}.", _HINT) from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.", _HINT) from None


def _receipts(path: Path, content: bytes) -> tuple[list[ReceiptFigures], int]:
    """Read the receipts of a file, and count the documents that have none."""
    found: list[ReceiptFigures] = []
    without = 0
    for row, document in _documents(path, content):
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
    return found, without


def _documents(path: Path, content: bytes) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the JSON objects of a file: one a line, or one document, or a list of them."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a file of receipts (it is not UTF-8).", _HINT) from None
    lines = [(row, line) for row, line in enumerate(text.splitlines(), 1) if line.strip()]
    whole = len(lines) == 1 or (bool(lines) and lines[0][1].strip() in ("{", "["))
    for row, line in [(1, text)] if whole else lines:
        try:
            parsed = bounded.parse_json(line, bounded.RESPONSE, finite=True)
        except ValueError as error:
            raise UsageError(f"{path}: row {row} is not a JSON document: {error}.", _HINT) from None
        for document in parsed if isinstance(parsed, list) else [parsed]:
            if not isinstance(document, Mapping):
                raise UsageError(f"{path}: row {row} is not a JSON object.", _HINT)
            yield row, document

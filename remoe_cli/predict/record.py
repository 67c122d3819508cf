"""The document predictor.json of a profile. It needs no torch, so a report is made without it."""

from __future__ import annotations

from pathlib import Path

from remoe_cli import artifacts


class PredictorRecord(artifacts.Document):
    """The file predictor.json.

    default           the best candidate
    validation_bits   by candidate the mean divergence on `validation_prompts` held-out prompts; empty if there were too few
    prompts           prompts that the predictor is fitted to
    """

    schema_version: str = "remoe.predictor/1"
    profile_sha256: str
    arrays_sha256: str
    default: str
    validation_bits: dict[str, float]
    validation_prompts: int
    prompts: int


def files(path: Path) -> tuple[Path, Path]:
    """Name the two files of a predictor in a profile's folder: the document and the arrays."""
    return path / "predictor.json", path / "predictor.safetensors"


def read_record(path: Path, profile_sha256: str) -> PredictorRecord | None:
    """Read the document of the predictor that belongs to a profile, if there is one.

    Raises: ArtifactError for a document that is damaged.
    """
    document, _ = files(path)
    if not document.is_file():
        return None
    record = artifacts.read_json(document, PredictorRecord)
    return record if record.profile_sha256 == profile_sha256 else None

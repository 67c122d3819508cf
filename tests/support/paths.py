"""Where this repository's files are."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PLANS = tuple(sorted((ROOT / "plans").glob("*.json")))

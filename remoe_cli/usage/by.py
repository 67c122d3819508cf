"""What the rows of a cost report stand for. Imports nothing, for the command line's help."""

from __future__ import annotations

from enum import StrEnum


class By(StrEnum):
    """What receipts are added up by."""

    day = "day"
    user = "user"
    function = "function"

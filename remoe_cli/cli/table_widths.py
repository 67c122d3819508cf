"""How wide the columns of a table are, so that a narrow terminal cuts no figure. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len

_UNWRAPPED = 20  # columns of a figure or a name, which a narrow terminal does not break
_BETWEEN = 2  # columns between two columns of a table, and as many around all


def fitted(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, spare: Sequence[str]) -> dict[int, int] | None:
    """Leave out as few of the spare columns as must be; return the widths of the others by their index.

    None where even without all of them something would be cut.
    """
    for left_out in range(len(spare) + 1):
        kept = [i for i, column in enumerate(columns) if column not in spare[:left_out]]
        widths = column_widths([columns[i] for i in kept], [[row[i] for i in kept] for row in rows], width)
        if widths is not None:
            return dict(zip(kept, widths, strict=True))
    return None


def column_widths(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """Share out the width of a terminal; None where the table needs more to cut nothing.

    A column is never narrower than its longest word. The widest one gives way first.

    >>> column_widths(("", "cost"), [("the whole model on a GPU", "$1.50")], 40)
    [24, 5]
    >>> column_widths(("", "cost"), [("the whole model on a GPU", "$1.50")], 20)
    [11, 5]
    >>> column_widths(("", "cost"), [("2026-11-30", "$1,086,000.00")], 20) is None
    True
    """
    cells = [[column, *(row[i] for row in rows)] for i, column in enumerate(columns)]
    found = [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in cells]
    least = [max(_longest_word(column[0]), *map(_least if i else _longest_word, column[1:]), 0) for i, column in enumerate(cells)]
    room = width - _BETWEEN * len(columns)
    if sum(least) > room:
        return None
    while sum(found) > room:
        widest = max(range(len(found)), key=lambda i: (found[i] > least[i], found[i]))
        found[widest] -= 1
    return found


def _least(cell: str) -> int:
    return cell_len(cell) if cell_len(cell) <= _UNWRAPPED else _longest_word(cell)


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)

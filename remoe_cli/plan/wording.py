"""Money and ids as text for people."""

from __future__ import annotations


def per_million(usd: float) -> str:
    """Money that people can read: a request costs millionths of a dollar."""
    return f"${usd * 1e6:,.4g} per million"


def id_ranges(ids: tuple[int, ...]) -> str:
    """Ascending ids with runs of three or more as `first-last`."""
    runs: list[list[int]] = []
    for expert in ids:
        if runs and expert == runs[-1][-1] + 1:
            runs[-1].append(expert)
        else:
            runs.append([expert])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)

"""Money and ids as text for people."""

from __future__ import annotations

from remoe_cli.plan.document import GPU_BY_USE


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


def bought(spec: str, instances: int = 1) -> str:
    """Write what a main function or a baseline runs on, with the number of instances where there are several."""
    name = "GPU memory by the GB-second" if spec == GPU_BY_USE else spec
    return name if instances == 1 else f"{instances} x {name}"


def capitalized(text: str) -> str:
    """Write a sentence's first letter large, and leave the rest as it is."""
    return text[:1].upper() + text[1:]

"""Money, ids, names and verdicts as text for people."""

from __future__ import annotations

from remoe_cli.plan.document import GPU_BY_USE, BaselineName, Verdict

VERDICT_WORDS: dict[Verdict, str] = {
    "recommended": "moving experts out: worth it",
    "not-recommended": "moving experts out: not worth it",
    "insufficient-evidence": "moving experts out: too little evidence to tell",
}
BASELINE_NAMES = {  # within a sentence
    BaselineName.ALL_LOCAL: "all experts local",
    BaselineName.MIX: "all experts local",
    BaselineName.CPU: "the whole model on CPUs",
    BaselineName.GPU: "the whole model on a GPU",
    BaselineName.STORED_CPU: "the whole model, quantised as it is stored, on CPUs",
    BaselineName.STORED_GPU: "the whole model, quantised as it is stored, on a GPU",
}


def per_million(usd: float) -> str:
    """Write what a request costs as the cost of a million requests, for one costs millionths of a dollar.

    >>> per_million(0.0000239383)
    '$23.94 per million'
    >>> per_million(1.0857)
    '$1,086,000 per million'
    """
    return f"{millions(usd)} per million"


def millions(usd: float) -> str:
    """Write a million times so many USD, with four digits.

    >>> millions(0.0175834)
    '$17,580'
    """
    digits = f"{usd * 1e6:.4g}"
    return f"${float(digits):,.0f}" if usd * 1e6 >= 1000 else f"${digits}"


def id_ranges(ids: tuple[int, ...]) -> str:
    """Write ascending ids with runs of three or more as `first-last`.

    >>> id_ranges((0, 1, 2, 5, 7, 8))
    '0-2, 5, 7, 8'
    """
    runs: list[list[int]] = []
    for expert in ids:
        if runs and expert == runs[-1][-1] + 1:
            runs[-1].append(expert)
        else:
            runs.append([expert])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def bought(spec: str, instances: int = 1) -> str:
    """Write what a main function or a baseline runs on, with the number of instances if there are several.

    >>> bought("ml.g6e.xlarge", 6)
    '6 x ml.g6e.xlarge'
    """
    name = "GPU memory by the GB-second" if spec == GPU_BY_USE else spec
    return name if instances == 1 else f"{instances} x {name}"


def capitalized(text: str) -> str:
    """Write the first letter of a sentence as a capital."""
    return text[:1].upper() + text[1:]

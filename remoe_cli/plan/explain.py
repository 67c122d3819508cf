"""A plan in rows of text for people. Pure functions; the command line decides how to draw them."""

from __future__ import annotations

from remoe_cli.plan.document import Plan

HEADER = ("layer", "remote experts", "count", "memory MB", "replicas")


def layer_rows(plan: Plan) -> tuple[tuple[str, str, str, str, str], ...]:
    """One row per MoE layer, under HEADER; runs of expert ids are written as `3-7`."""
    return tuple(
        (str(layer.layer), id_ranges(layer.remote), str(len(layer.remote)), str(layer.memory_mb), str(layer.replicas))
        if layer.remote
        else (str(layer.layer), "none", "0", "", "")
        for layer in plan.layers
    )


def summary_rows(plan: Plan) -> tuple[tuple[str, str], ...]:
    """(name, value) lines: verdict first, then money, latency, specs, and the certificate."""
    remote, with_remote = sum(len(layer.remote) for layer in plan.layers), sum(bool(layer.remote) for layer in plan.layers)
    local = tuple(
        (name, f"{per_million(b.cost_usd_per_request)} requests, TTFT {b.ttft_s:.4g} s, TPOT {b.tpot_s * 1000:.4g} ms")
        for name, b in plan.baselines.items()
    )
    return (
        ("verdict", plan.verdict),
        ("reason", plan.reason),
        ("cost", f"{per_million(plan.cost_usd_per_request)} requests of {plan.workload.n_in} + {plan.workload.n_out} tokens, warm"),
        ("TTFT", _against(plan.ttft_s, 1, "s", plan.targets.ttft_s)),
        ("TPOT", _against(plan.tpot_s, 1000, "ms", plan.targets.tpot_s)),
        ("main function", f"{plan.main.name}: {plan.main.memory_mb} MB, {_vcpus(plan.main.vcpus)}"),
        ("remote experts", f"{remote} in {with_remote} of {len(plan.layers)} layers"),
        ("certificate", f"{plan.status}: at least {per_million(plan.lower_bound_usd)}, gap {plan.gap:.2%}"),
        *local,
    )


def _vcpus(vcpus: float | None) -> str:
    return "all cores of the profile's machine" if vcpus is None else f"{vcpus:.3g} vCPUs"


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


def _against(value_s: float, factor: float, unit: str, target_s: float | None) -> str:
    return f"{value_s * factor:.4g} {unit}" + ("" if target_s is None else f" (target {target_s * factor:.4g} {unit})")

"""A plan in rows of text for people. Pure functions; the command line decides how to draw them."""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING

from remoe_cli.plan.document import MainSpec, Outcome, Plan, PredictedRouting
from remoe_cli.plan.wording import id_ranges, per_million

if TYPE_CHECKING:
    from remoe_cli.plan.catalog.catalog import Catalog
    from remoe_cli.plan.problem.request import Wanted
    from remoe_cli.profile.record import Profile

HEADER = ("layer", "remote experts", "count", "memory MB", "functions", "replicas")
BASELINES = ("", "requests", "TTFT", "TPOT", "on", "plan / it")
_TITLES = {"cpu": "CPU", "gpu": "GPU", "fetch": "Fetch (ideal)", "mix": "MIX", "all-local": "MIX* (all local)"}
Rows = tuple[tuple[str, ...], ...]


def layer_rows(plan: Plan) -> Rows:
    """One row per MoE layer, under HEADER; runs of expert ids are written as `3-7`."""
    return tuple(
        (
            str(layer.layer),
            id_ranges(layer.remote),
            str(len(layer.remote)),
            str(layer.memory_mb),
            str(len(layer.parts)),
            str(layer.replicas),
        )
        if layer.remote
        else (str(layer.layer), "none", "0", "", "", "")
        for layer in plan.layers
    )


def summary_rows(plan: Plan) -> tuple[tuple[str, str], ...]:
    """(name, value) lines: verdict first, then money, latency, specs, and the certificate."""
    remote, with_remote = sum(len(layer.remote) for layer in plan.layers), sum(bool(layer.remote) for layer in plan.layers)
    workload, targets = plan.workload, plan.targets
    lengths = f"{workload.n_in:.4g} + {workload.n_out:.4g} tokens" + (" on average" if workload.kinds else "")
    budget = "" if targets.budget_usd is None else f" (budget {per_million(targets.budget_usd)})"
    main = f"{plan.main.name}: {plan.main.memory_mb} MB, {_vcpus(plan.main)}"
    rows = [
        ("verdict", plan.verdict),
        ("reason", plan.reason),
        ("cost", f"{per_million(plan.cost_usd_per_request)} requests of {lengths}{budget}"),
        ("TTFT", _against(plan.ttft_s, 1, "s", targets.ttft_s)),
        ("TPOT", _against(plan.tpot_s, 1000, "ms", targets.tpot_s)),
        ("main function", main if plan.instances == 1 else f"{plan.instances} x {main}"),
        ("remote experts", f"{remote} in {with_remote} of {len(plan.layers)} layers"),
        ("certificate", _certificate(plan)),
    ]
    if plan.flip:
        rows.append(("traffic", _flip(plan)))
    rows += [("turns", text) for text in turn_texts(plan)]
    rows.append(("prices", f"of {plan.prices_of}, {(date.today() - date.fromisoformat(plan.prices_of)).days} days old"))
    return tuple(rows)


def baseline_rows(plan: Plan) -> Rows:
    """Under BASELINES: every other way to run the model, and what the plan costs relative to it."""
    rows = [
        (
            _TITLES[name] + ("" if b.meets else ", misses a target"),
            per_million(b.cost_usd_per_request),
            f"{b.ttft_s:.3g} s",
            f"{b.tpot_s * 1e3:.4g} ms",
            b.spec + (f" ({b.assumed})" if b.assumed else ""),
            f"{plan.cost_usd_per_request / b.cost_usd_per_request:.3f}" if b.cost_usd_per_request > 0 else "",
        )
        for name, b in plan.baselines.items()
    ]
    return tuple([*rows, *((_TITLES[name], "none", "", "", why, "") for name, why in plan.missing.items())])


def turn_texts(plan: Plan) -> list[str]:
    return [
        f"no number {turn.what} turns the choice against {turn.against}"
        if turn.at is None
        else f"against {turn.against} the choice turns at {turn.at:g} {turn.what}"
        for turn in plan.turns
    ]


def _flip(plan: Plan) -> str:
    assert plan.flip is not None
    return (
        f"above {plan.flip.requests_per_hour:g} requests an hour an always-on {plan.flip.instance} is cheaper than {plan.flip.by_use}, "
        "which is paid by use"
    )


def _certificate(plan: Plan) -> str:
    if plan.gap is None:
        return f"{plan.status}: no bound"
    least = per_million(plan.lower_bound_usd) if plan.lower_bound_usd is not None else f"{plan.lower_bound_s or 0.0:.4g} s"
    return f"{plan.status}: at least {least}, gap {plan.gap:.2%}"


def _vcpus(main: MainSpec) -> str:
    gpu = f", GPU of {main.gpu_memory_mb} MB, ${main.usd_per_hour:g} an hour" if main.gpu_memory_mb else ""
    return ("all cores of the profile's machine" if main.vcpus is None else f"{main.vcpus:.3g} vCPUs") + gpu


def _against(value_s: float, factor: float, unit: str, target_s: float | None) -> str:
    return f"{value_s * factor:.4g} {unit}" + ("" if target_s is None else f" (target {target_s * factor:.4g} {unit})")


# --explain


def explanation(plan: Plan, profile: Profile, catalog: Catalog, wanted: Wanted) -> dict[str, Rows]:
    """Sections of (name, text): where inputs came from, what binds and what more of it is worth, why layers went remote, robustness."""
    from remoe_cli.plan.explain.why import binding_rows, layer_reasons, money_rows
    from remoe_cli.plan.problem.request import make_problem

    problem = make_problem(profile, catalog, wanted)
    return {
        "Where the numbers come from": _inputs(plan, profile, catalog),
        "Where the money goes (a million requests)": tuple(money_rows(problem, plan)),
        "What binds, and what more of it is worth": tuple(binding_rows(problem, wanted.aim, plan)),
        "Why experts went remote": tuple(layer_reasons(problem, plan)),
        "Under other circumstances": robustness_rows(plan),
    }


def _inputs(plan: Plan, profile: Profile, catalog: Catalog) -> Rows:
    record, workload = profile.record, plan.workload
    latency = record.latency
    traced = len(profile.arrays["trace_ids"])
    sources = sorted({(entry.date.isoformat(), entry.source, ", ".join(entry.of)) for entry in catalog.provenance})
    traffic = "unknown" if workload.requests_per_hour is None else f"{workload.requests_per_hour:.4g} requests an hour"
    return (
        (
            "routing",
            f"{record.routing.source}, {len(profile.arrays['prompt_tokens'])} prompts of {record.dataset.source}, {traced} tokens traced",
        ),
        *((("prompts", _predicted(workload.routing)),) if workload.routing else ()),
        ("times", f"{latency.source}: {latency.machine}, {latency.measured_on}"),
        ("warm invocation", latency.invocation.target if latency.invocation else f"catalog {catalog.name}"),
        ("requests", f"{workload.n_in:.4g} + {workload.n_out:.4g} tokens; traffic {traffic}; {workload.cold_share:.1%} cold"),
        *((f"{day} {fields}", source) for day, source, fields in sources),
    )


def _predicted(routing: PredictedRouting) -> str:
    off = "unknown" if routing.validation_bits is None else f"{routing.validation_bits:.3f} bits"
    total = sum(routing.weights)
    most = sorted(zip(routing.weights, routing.recorded, strict=True), key=lambda pair: (-pair[0], pair[1]))[:3]
    return (
        f"{routing.count} of {routing.prompts.path} (sha256 {routing.prompts.sha256[:12]}), predicted by {routing.predictor}: divergence "
        f"on held-out prompts {off}. Priced as a mixture of {len(routing.recorded)} recorded prompts, {routing.mixture_bits:g} bits from "
        f"the prediction; most of all of prompts {', '.join(f'{prompt} ({weight / total:.0%})' for weight, prompt in most)}"
    )


def robustness_rows(plan: Plan) -> Rows:
    """The plan as it stands under other circumstances."""

    def text(of: Outcome, meets: bool, best: float | None) -> str:
        said = f"{per_million(of.cost_usd_per_request)}, TTFT {of.ttft_s:.3g} s, TPOT {of.tpot_s * 1e3:.4g} ms"
        known = "" if best is None else f"; the best plan known for them costs {per_million(best)}"
        return said + ("" if meets else "; misses a target") + known

    return tuple((shift.what, text(shift, shift.meets, shift.best_usd)) for shift in plan.robustness)

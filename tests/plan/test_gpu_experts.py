"""Experts on the main function's GPU: their time and memory against arithmetic by hand, what more memory is worth, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from remoe_cli.artifacts import json_text
from remoe_cli.errors import ArtifactError, InfeasibleError, UsageError
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.cost import main_function
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.document import BaselineName, LayerPlan, Plan, read_plan
from remoe_cli.plan.explain.rows import layer_columns, layer_rows, summary_rows
from remoe_cli.plan.explain.why import binding_rows
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.problem import Placement, Problem
from remoe_cli.plan.problem.workload import from_profile
from remoe_cli.plan.solve.local_search import improve
from remoe_cli.plan.solve.scan import scan
from remoe_cli.plan.verify.check import Finding, verify
from remoe_cli.profile.hardware import latency_from, read_hardware, whole_on_gpu
from remoe_cli.profile.record import Profile
from remoe_cli.units import size
from tests.support.synthetic import inverse, plan_of, problem_of, synthetic_profile, tiny_catalog

MB = 2**20
N_IN, N_OUT = 10, 20
EXPERT_MB, REST_MB = 60.0, 200.0


def gpu_catalog(gpu_memory_mb: int = 900, memory_mb: int = 900, **main: Any) -> Catalog:
    """One instance with a GPU that holds some of the experts, beside a CPU that holds some."""
    spec = {"name": "gpu", "memory_mb": memory_mb, "vcpus": 1.0, "gpu_memory_mb": gpu_memory_mb, "usd_per_hour": 0.2}
    return tiny_catalog({"menu": [spec], **main}, max_functions=4)


def gpu_profile(path: Path, layers: int = 2, experts: int = 12, gpu_s: float = 1e-4, **more: Any) -> Profile:
    """A profile of a machine with a GPU, where an expert takes a tenth of its time on the CPU."""
    sizes = {"layers": layers, "experts": experts, "skew": 1.5, "expert_mb": EXPERT_MB, "nonexpert_mb": REST_MB, "main_vcpus": 1} | more
    profile = synthetic_profile(path, local_expert=(1e-3, 1e-4), **sizes)
    latency = profile.record.latency.model_copy(update={"gpu_expert": inverse(gpu_s, 1e-6, at_vcpus=1)})
    return replace(profile, record=profile.record.model_copy(update={"latency": latency}))


def gpu_plan(profile: Profile, catalog: Catalog, **options: Any) -> Plan:
    return plan_of(profile, catalog, requests_per_hour=20.0, **options)


def three_tiers(path: Path) -> tuple[Profile, Catalog, Plan]:
    profile, catalog = gpu_profile(path), gpu_catalog()
    plan = gpu_plan(profile, catalog, tpot_s=0.05, examine=True)
    assert verify(plan, profile, catalog) == ()
    return profile, catalog, plan


def test_a_layer_takes_as_long_as_the_slowest_of_cpu_gpu_and_functions(tmp_path: Path) -> None:
    """Four experts, top-2: tokens hit (0, 1), (0, 2), (0, 3) and (2, 3), of which 0 is on the GPU, 1 and 2 are on the CPU, 3 is remote."""
    profile = gpu_profile(tmp_path, layers=1, experts=4, prompts=1, prompt_tokens=4, decode_tokens=4, gpu_s=1.5e-3)
    profile.arrays["prefill_counts"][:] = [3, 1, 2, 2]
    profile.arrays["trace_ids"][:] = np.array([(0, 1), (0, 2), (0, 3), (2, 3)])[:, None, :]
    catalog = gpu_catalog()
    problem = Problem(profile.record.spec, profile.record.latency, catalog, from_profile(profile, N_IN, N_OUT))
    layer = LayerPlan(layer=1, remote=(3,), memory_mb=512, replicas=1, gpu=(0,))
    got = evaluate(problem, Placement(catalog.main.menu[0], (layer,)))
    call_s = catalog.function.warm_unbilled_s + catalog.function.warm_billed_s
    wire_s = 2 * 2048 * catalog.function.wire_expansion / catalog.function.network_bytes_per_s
    own_s = (3e-4 + 2e-4) * catalog.function.mb_per_vcpu / 512
    remote_s = call_s + own_s + wire_s
    cpu_s, gpu_s = 1.1e-3, 1.501e-3
    assert remote_s > gpu_s > cpu_s
    assert got.tpot_s == pytest.approx(0.005 + (2 * gpu_s + 2 * remote_s) / 4, rel=1e-9)
    # 10 prompt tokens use experts 20 times: 7.5 rows of expert 0, 2.5 and 5 of 1 and 2, 5 of 3.
    prefill = {"cpu": 2e-3 + 7.5e-4, "gpu": 1.5e-3 + 7.5e-6}
    prefill["remote"] = call_s + (3e-4 + 5 * 2e-4) * catalog.function.mb_per_vcpu / 512 + 5 * wire_s
    assert got.ttft_s == pytest.approx(0.004 + 2e-4 * N_IN + max(prefill.values()), rel=1e-9)


def test_rows_of_memory_are_what_the_catalog_says(tmp_path: Path) -> None:
    """CPU memory has the experts that are not on the GPU, with what loading takes; the GPU has the rest, beside driver and CUDA."""
    profile = gpu_profile(tmp_path)
    catalog = gpu_catalog(1000, 1000, gpu_hidden_share=0.1, gpu_runtime_memory_mb=100.0, gpu_load_factor=1.25, runtime_memory_mb=300.0)
    problem = problem_of(profile, catalog, n_in=N_IN, n_out=N_OUT)
    main, hidden = catalog.main.menu[0], 2048
    kv = (N_IN + N_OUT) * (1024 * 3 + hidden)
    top_k = problem.spec.top_k
    outputs = 3 * top_k * hidden * N_IN
    assert main_function.gpu_capacity(problem, main) == int((800 * MB - REST_MB * MB - kv - outputs) // (EXPERT_MB * MB)) == 9
    buffers = hidden * (N_OUT + (1 + top_k) * N_IN)
    assert main_function.local_capacity(problem, main) == int((700 * MB - buffers) // (1.25 * EXPERT_MB * MB)) == 9
    assert main_function.main_memory_bytes(problem, main, 9) == 300 * MB + buffers + 9 * 1.25 * EXPERT_MB * MB
    without = problem_of(profile, catalog, n_in=N_IN, n_out=N_OUT, gpu_experts=False)
    assert main_function.gpu_capacity(without, main) == 0


def test_more_gpu_memory_never_costs_more(tmp_path: Path) -> None:
    """And neither does it ever take longer: the fewest places are filled with what is used most."""
    profile = gpu_profile(tmp_path)
    for aim in ({"objective": "tpot"}, {"objective": "cost"}):
        values = []
        for gpu_mb in (240, 300, 420, 600, 900, 1300, 1700):
            plan = gpu_plan(profile, gpu_catalog(gpu_mb), **aim)
            values.append(plan.tpot_s if aim["objective"] == "tpot" else plan.cost_usd_per_request)
            bound = plan.lower_bound_s if aim["objective"] == "tpot" else plan.lower_bound_usd
            assert bound is not None and bound <= values[-1]
        assert all(later <= earlier * (1 + 1e-3) for earlier, later in itertools.pairwise(values)), values
        assert values[-1] < values[0]


def test_times_of_a_gpu_are_not_taken_for_a_cpus_in_silence(tmp_path: Path) -> None:
    catalog = gpu_catalog()
    spec = catalog.main.menu[0].model_copy(update={"gpu_memory_mb": None, "memory_mb": 8000})
    catalog = catalog.model_copy(update={"main": catalog.main.model_copy(update={"menu": (spec,)})})
    said = f"measured on a GPU, which {spec.name} does not have"
    assert any(said in note for note in gpu_plan(gpu_profile(tmp_path / "gpu"), catalog).notes)
    on_cpus = synthetic_profile(tmp_path / "cpu", experts=12, expert_mb=EXPERT_MB, nonexpert_mb=REST_MB)
    assert not any(said in note for note in gpu_plan(on_cpus, catalog).notes)


def test_a_plan_has_three_tiers_and_says_so(tmp_path: Path) -> None:
    profile, catalog, plan = three_tiers(tmp_path)
    remote, gpu = (sum(len(getattr(layer, side)) for layer in plan.layers) for side in ("remote", "gpu"))
    assert remote > 0 and gpu > 0 and remote + gpu < 24
    assert ("local experts", f"{gpu} on the GPU ({size(gpu * EXPERT_MB * 2**20)} of its memory), {24 - remote - gpu} in CPU memory") in (
        summary_rows(plan)
    )
    rows = layer_rows(plan)
    assert {len(row) for row in rows} == {len(layer_columns(plan))} and [row[7] for row in rows] == [str(len(x.gpu)) for x in plan.layers]
    assert "experts on the GPU" in dict(binding_rows(problem_of(profile, catalog, requests_per_hour=20.0), Aim(), plan))
    assert any(note.startswith("The bound is also for plans with each layer's most used experts on the GPU") for note in plan.notes)
    few = gpu_plan(gpu_profile(tmp_path / "few", experts=4), gpu_catalog())  # all of whose remote sets are weighed, so no note is before
    assert any(note.startswith("The lower bound is for plans with each layer's most used experts on the GPU") for note in few.notes)
    without = gpu_plan(profile, catalog, tpot_s=0.05, gpu_experts=False)
    assert not any(layer.gpu for layer in without.layers) and plan.tpot_s < without.tpot_s
    assert not any("on the GPU" in note for note in without.notes)


def test_the_least_used_experts_are_remote_and_the_most_used_on_the_gpu(tmp_path: Path) -> None:
    profile, catalog, plan = three_tiers(tmp_path)
    workload = problem_of(profile, catalog).workload
    for layer, hits in zip(plan.layers, workload.decode_hits, strict=True):
        if layer.gpu and layer.remote:
            assert hits[list(layer.gpu)].mean() > hits[list(layer.remote)].mean()


def test_all_experts_local_fills_the_gpu(tmp_path: Path) -> None:
    """The baseline is no straw man: with as much CPU memory as it needs, it has the most used experts on the GPU."""
    profile, catalog = gpu_profile(tmp_path), gpu_catalog(900, 3000)
    found = gpu_plan(profile, catalog).baselines[BaselineName.ALL_LOCAL]
    without = gpu_plan(profile, catalog, gpu_experts=False).baselines[BaselineName.ALL_LOCAL]
    assert found.tpot_s < 0.8 * without.tpot_s


def altered(plan: Plan, index: int, **update: Any) -> Plan:
    """The plan with another layer, past what a file is checked for when it is read."""
    layers = list(plan.layers)
    layers[index] = layers[index].model_copy(update=update)
    return plan.model_copy(update={"layers": tuple(layers)})


def resized(plan: Plan, **update: Any) -> Plan:
    return plan.model_copy(update={"main": plan.main.model_copy(update=update)})


def test_the_verifier_knows_where_experts_can_be(tmp_path: Path) -> None:
    profile, catalog, plan = three_tiers(tmp_path)
    index = next(i for i, layer in enumerate(plan.layers) if layer.gpu and layer.remote and len(layer.gpu + layer.remote) < 12)
    layer = plan.layers[index]
    on_cpu = tuple(e for e in range(12) if e not in layer.remote + layer.gpu)
    room = {"gpu_hidden_share": 0.3}
    cases: list[tuple[Plan, Catalog, str]] = [
        (altered(plan, index, gpu=tuple(sorted((*layer.gpu, layer.remote[0])))), catalog, f"layers[{index}].gpu"),
        (altered(plan, index, gpu=layer.gpu[::-1] if len(layer.gpu) > 1 else (*layer.gpu, *layer.gpu)), catalog, f"layers[{index}].gpu"),
        (altered(plan, index, gpu=(*layer.gpu, 12)), catalog, f"layers[{index}].gpu"),
        (altered(plan, index, gpu=layer.gpu[1:]), catalog, "tpot_s"),
        (altered(plan, index, gpu=tuple(sorted((*layer.gpu, *on_cpu[:1])))), catalog, "tpot_s"),
        (plan.model_copy(update={"tpot_s": plan.tpot_s * (1 - 1e-7)}), catalog, "tpot_s"),
        (plan, same_file(gpu_catalog(**room), catalog), "main.gpu_memory_mb"),
        (plan, same_file(gpu_catalog(gpu_load_factor=2.0), catalog), "main.memory_mb"),
    ]
    for other, prices, field in cases:
        assert field in {finding.field for finding in verify(other, profile, prices)}, field


def same_file(catalog: Catalog, other: Catalog) -> Catalog:
    return catalog.model_copy(update={"file": other.file})


def test_an_expert_is_in_one_place(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="expert 3 of layer 2 is both remote and on the GPU"):
        LayerPlan(layer=2, remote=(1, 3), memory_mb=128, replicas=1, gpu=(3,))
    _profile, _, plan = three_tiers(tmp_path / "profile")
    data = plan.model_dump(mode="json")
    layer = next(layer for layer in data["layers"] if layer.get("gpu") and layer["remote"])
    layer["gpu"] = [layer["remote"][0]]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="both remote and on the GPU"):
        read_plan(tmp_path / "plan.json")


def moved(change: Callable[[dict[str, Any]], None], plan: Plan, folder: Path) -> Path:
    data = plan.model_dump(mode="json")
    change(data)
    (folder / "placement.json").write_text(json.dumps(data))
    return folder / "placement.json"


def test_a_given_placement_may_have_experts_on_the_gpu(tmp_path: Path) -> None:
    profile, catalog, plan = three_tiers(tmp_path / "profile")
    given = gpu_plan(profile, catalog, placement_file=moved(lambda data: None, plan, tmp_path))
    assert (given.tpot_s, [layer.gpu for layer in given.layers]) == (plan.tpot_s, [layer.gpu for layer in plan.layers])
    assert verify(given, profile, catalog) == ()

    def too_many(data: dict[str, Any]) -> None:
        for layer in data["layers"]:
            layer |= {"gpu": list(range(12)), "remote": [], "memory_mb": 0, "replicas": 0, "functions": []}

    with pytest.raises(InfeasibleError, match="the GPU of gpu holds"):
        gpu_plan(profile, catalog, placement_file=moved(too_many, plan, tmp_path))
    unsorted = moved(lambda data: data["layers"][0].update(gpu=[11, 10], remote=[], memory_mb=0, replicas=0), plan, tmp_path)
    with pytest.raises(UsageError, match="names experts"):
        gpu_plan(profile, catalog, placement_file=unsorted)


def test_a_forced_share_leaves_the_most_used_of_the_rest_to_the_gpu(tmp_path: Path) -> None:
    profile, catalog = gpu_profile(tmp_path), gpu_catalog()
    plan = gpu_plan(profile, catalog, remote_share=0.5, objective="tpot")
    assert sum(len(layer.remote) for layer in plan.layers) == 12 and any(layer.gpu for layer in plan.layers)
    assert verify(plan, profile, catalog) == ()


def test_other_solvers_go_on_working(tmp_path: Path) -> None:
    """The scan finds three tiers too; the paper's heuristic has two, whatever the menu has."""
    profile, catalog, plan = three_tiers(tmp_path)
    scanned = gpu_plan(profile, catalog, solver="scan", tpot_s=0.05)
    assert verify(scanned, profile, catalog) == () and any(layer.gpu for layer in scanned.layers)
    assert plan.cost_usd_per_request <= scanned.cost_usd_per_request * (1 + 1e-3)
    by_use = [{"name": f"m{mb}", "memory_mb": mb, "vcpus": 1.0} for mb in (900, 3000)]
    mixed = tiny_catalog({"menu": [*by_use, catalog.main.menu[0].model_dump()]}, max_functions=4)
    found = gpu_plan(profile, mixed, solver="paper")
    assert verify(found, profile, mixed) == () and not any(layer.gpu for layer in found.layers)


def test_what_no_gpu_holds_is_refused_with_what_it_needs(tmp_path: Path) -> None:
    profile = gpu_profile(tmp_path)
    with pytest.raises(InfeasibleError, match=r"the model without its experts needs 200 MB .* and gpu has 190 MB for it"):
        gpu_plan(profile, gpu_catalog(220, gpu_runtime_memory_mb=30.0))


def test_without_a_gpu_nothing_changes(tmp_path: Path) -> None:
    """Whether the profile knows the time of an expert on a GPU, and whether plans may use it: the same bytes, without the new field."""
    profile = gpu_profile(tmp_path, experts=6)
    texts = {json_text(plan_of(profile, tiny_catalog(), gpu_experts=gpu, remote_share=0.5, examine=True)) for gpu in (True, False)}
    assert len(texts) == 1 and '"gpu"' not in texts.pop().replace('"gpu": {', "")
    assert '"gpu_expert"' not in json_text(synthetic_profile(tmp_path / "cpu").record.latency)


def test_a_described_gpu_has_the_time_of_an_expert_of_a_whole_model_on_it(tmp_path: Path) -> None:
    spec = synthetic_profile(tmp_path).record.spec
    timing = latency_from("g5.xlarge", spec).gpu_expert
    assert timing is not None and timing.curve == whole_on_gpu(read_hardware("g5.xlarge"), spec)[1]
    assert latency_from("lambda", spec).gpu_expert is None


def test_a_finding_reads_well(tmp_path: Path) -> None:
    profile, catalog, plan = three_tiers(tmp_path)
    findings = verify(plan, profile, same_file(gpu_catalog(gpu_hidden_share=0.3), catalog))
    said = [finding for finding in findings if finding.field == "main.gpu_memory_mb"]
    assert said and isinstance(said[0], Finding) and said[0].stated == "630.000 usable" and said[0].found.startswith("needs ")


def test_a_gpu_that_is_the_slowest_is_waited_for_by_every_request(tmp_path: Path) -> None:
    """The times of single requests know the GPU too, in the planner and in the verifier."""
    profile, catalog = gpu_profile(tmp_path / "profile", gpu_s=5e-3), gpu_catalog(3000, 3000)
    layers = [{"layer": layer, "remote": [], "memory_mb": 0, "replicas": 0, "gpu": list(range(12))} for layer in (1, 2)]
    (tmp_path / "placement.json").write_text(json.dumps({"main": "gpu", "layers": layers}))
    plan = gpu_plan(profile, catalog, placement_file=tmp_path / "placement.json")
    assert plan.ttft_s > 24 * 5e-3 and [one.ttft_s for one in plan.spread] == pytest.approx([plan.ttft_s] * 3)
    assert verify(plan, profile, catalog) == ()


def test_what_steps_leave_empty_is_filled_by_single_experts(tmp_path: Path) -> None:
    """The scan's numbers of experts on the GPU are far apart: moving some more there fills its memory, and costs what is said."""
    profile, catalog = gpu_profile(tmp_path, experts=24, layers=3), gpu_catalog(1600, 900)
    problem, aim = problem_of(profile, catalog, requests_per_hour=20.0), Aim("tpot")
    room = main_function.gpu_capacity(problem, catalog.main.menu[0])
    found = scan(problem, aim)
    assert found is not None
    better = improve(problem, aim, found)
    before, after = (sum(len(layer.gpu) for layer in one.layers) for one in (found, better))
    assert before < after == room
    assert evaluate(problem, better.placement).tpot_s == pytest.approx(better.value, rel=1e-12) and better.value < found.value

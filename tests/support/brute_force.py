"""Every plan of a tiny problem, by plain loops: shares no code with the planner or the verifier.

For each main function, every subset of each layer's experts, memory spec, and number of replicas or functions that fit; a set is dealt
out to several functions in turn, least used first. Where an instance's GPU has room, any number of the most used other experts is on it.
What a choice does without the main function is worked out once, and every time of the profile's curves once. Several requests at once are
priced where none is cold. `drafts` are passes for each token, and the share of passes with 1, 2, .. rows.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.profile.record import Profile


def linear(line: Any, tokens: float) -> float:
    return max(line.least_s, line.fixed_s + line.per_token_s * tokens) if tokens > 0 else 0.0


@dataclass(frozen=True)
class Choice:
    """One layer's choice: experts that stay, by rising use; the longest invocation of a prompt, by kind of request; share of decode steps,
    rows of the local experts that they hit and longest wait; what its invocations cost; and the start of a cold instance."""

    local_ids: list[int]
    waits: list[float]
    steps: list[tuple[float, dict[int, int], float]]
    usd: float
    start_s: float


class Brute:
    """All plans of one problem as rows (cost, ttft, tpot), over main functions, main by main."""

    def __init__(
        self,
        profile: Profile,
        catalog: Catalog,
        kinds: list[tuple[float, int, int]],
        per_hour: float | None = None,
        cold_share: float = 0.0,
        per_expert: bool = False,
        concurrency: int = 1,
        drawn: tuple[int, int] = (1024, 64),
        drafts: tuple[float, tuple[float, ...]] | None = None,
        drafted: int = 512,
    ) -> None:
        assert concurrency == 1 or not cold_share
        self.n, self.drawn = concurrency, drawn
        self.drafts, self.drafted = drafts, drafted
        self.passes, self.widths = drafts or (1.0, (1.0,))
        self.most = concurrency * len(self.widths)
        self.profile, self.catalog, self.kinds = profile, catalog, kinds
        self.per_hour, self.cold_share, self.per_expert = per_hour, cold_share, per_expert
        self.spec, self.latency = profile.record.spec, profile.record.latency
        self.n_out = sum(share * n_out for share, _, n_out in kinds)
        self.known: dict[tuple[Any, ...], float] = {}
        totals = profile.arrays["prefill_counts"].sum(axis=0).tolist()
        self.use = [[self.spec.top_k * count / sum(row) for count in row] for row in totals]

    @property
    def log_usd(self) -> float:
        return self.catalog.function.log_bytes_per_call / 2**30 * self.catalog.storage.usd_per_log_gb

    def all(self) -> np.ndarray:
        plans = [plans for main in self.catalog.main.menu for plans in self.at(main)]
        return np.concatenate(plans) if plans else np.empty((0, 3))

    def at(self, main: Any) -> Iterator[np.ndarray]:
        """Plans of one row of the menu, once for every number of instances."""
        spec, latency, side = self.spec, self.latency, self.catalog.main
        by_use = main.usd_per_hour is None
        gpu = main.gpu_memory_mb is not None or (by_use and side.usd_per_accelerator_gb_second > 0)
        vcpus = latency.main_vcpus if main.vcpus is None else min(main.vcpus, latency.main_vcpus)
        slow = 1.0 if gpu else latency.main_vcpus / vcpus
        longest_out, tokens = max(n_out for _, _, n_out in self.kinds), max(n_in + n_out for _, n_in, n_out in self.kinds)
        base = spec.nonexpert_bytes + self.n * tokens * (spec.hidden_state_bytes + 1024 * spec.hidden_layers)
        held, loading, spare = side.runtime_memory_mb * 2**20 + (self.n * longest_out * spec.hidden_state_bytes if gpu else base), 1.0, 0.0
        if main.gpu_memory_mb is not None:
            spare = (main.gpu_memory_mb * (1 - side.gpu_hidden_share) - side.gpu_runtime_memory_mb) * 2**20 - base
            loading = side.gpu_load_factor
            held += 2 * max(self.most, *(n_in for _, n_in, _ in self.kinds)) * spec.hidden_state_bytes
            if spare < 0:
                return
        most = int(spare // spec.expert_bytes) if latency.gpu_expert else 0
        layers = len(spec.moe_layers)
        rest = [linear(latency.nonexpert_prefill, n_in) * slow + 2 * layers * linear(latency.copy_s, n_in) for _, n_in, _ in self.kinds]
        ttft0 = sum(share * seconds for (share, _, _), seconds in zip(self.kinds, rest, strict=True))
        # Each request by itself, should it be cold: prefill with the starts that it waits for
        own = [seconds + (side.cold_start_s + spec.nonexpert_bytes / side.load_bytes_per_s if by_use else 0.0) for seconds in rest]
        if by_use:
            ttft0 += self.cold_share * (side.cold_start_s + spec.nonexpert_bytes / side.load_bytes_per_s)
        tpot0 = 0.0
        for width, share in enumerate(self.widths, 1):
            more = linear(latency.nonexpert_prefill, self.n * width) - linear(latency.nonexpert_prefill, 1)
            tpot0 += share * ((latency.nonexpert_decode_s + more) * slow + 2 * layers * linear(latency.copy_s, self.n * width))
        if any(not choices for choices in self.choices):
            return
        ttft, tpot, usd, local, there = (ttft0, tpot0, 0.0, 0.0, 0.0)
        for axis in range(layers):
            c = np.array(self.beside(main, vcpus, axis, most))
            shape = [1] * layers
            shape[axis] = len(c)
            ttft, tpot = ttft + c[:, 0].reshape(shape), tpot + c[:, 1].reshape(shape)
            usd, local = usd + c[:, 2].reshape(shape), local + c[:, 3].reshape(shape)
            there = there + c[:, 4].reshape(shape)
            own = [seconds + c[:, 5 + kind].reshape(shape) for kind, seconds in enumerate(own)]
        step, tpot = tpot, self.passes * tpot
        if self.n > 1:
            own = [seconds + step for seconds in own]
            ttft, tpot = ttft + step, tpot + (self.n - 1) * ttft / self.n_out
        request = (ttft + self.n_out * tpot) / self.n
        ends_s = side.timeout_s if by_use else side.rented_timeout_s or math.inf
        fits = (held + local * spec.expert_bytes * loading <= main.memory_mb * 2**20) & (there <= most)
        if by_use:
            rate = side.usd_per_gb_second["x86_64"] * main.memory_mb / 1024 + side.usd_per_accelerator_gb_second * base / 2**30
            rate += max(0, main.memory_mb - self.catalog.function.storage_free_mb) / 1024 * side.usd_per_storage_gb_second
            reads = math.ceil(main.memory_mb * 1048576 / side.bytes_per_read) if side.bytes_per_read else 0
            fixed = side.usd_per_request + self.log_usd + self.cold_share * reads * self.catalog.storage.usd_per_1000_reads / 1000
            options = [(rate, fixed, math.inf)]
        elif self.per_hour is None:
            options = [(main.usd_per_hour / 3600, 0.0, math.inf)]
        else:
            most = min(64, math.ceil(float(request.max()) * self.per_hour / 3600))
            options = [(0.0, n * main.usd_per_hour / self.per_hour, 3600 * n / self.per_hour) for n in range(1, most + 1)]
        for rate, fixed, longest in options:
            good = fits & (request <= longest * (1 + 1e-9))
            for (_, _, n_out), seconds in zip(self.kinds, own, strict=True):
                good &= seconds + n_out * tpot <= ends_s * (1 + 1e-9)
            yield np.stack(
                [(rate * request + fixed + usd)[good], np.broadcast_to(ttft, good.shape)[good], np.broadcast_to(tpot, good.shape)[good]], 1
            )

    def beside(self, main: Any, vcpus: float, layer: int, most: int) -> list[tuple[float, ...]]:
        """Of one layer: (prefill with cold starts, decode, bill, experts on the CPU, on the GPU, prefill of each kind when cold) of
        everything that fits, beside this main function; up to `most` experts are on its GPU."""
        gpu_step_s, gpu_s = [0.0] * (self.most + 1), [[0.0] * len(self.use[layer])] * len(self.kinds)
        if most:
            timing = self.latency.gpu_expert.seconds
            gpu_step_s, gpu_s = (
                [float(timing(rows, 1)) for rows in range(self.most + 1)],
                [[float(timing(use * n_in, 1)) for use in self.use[layer]] for _, n_in, _ in self.kinds],
            )
        curve = self.latency.local_expert
        step_s = [self.once(curve.seconds, rows, vcpus) for rows in range(self.most + 1)]
        local_s = [[self.once(curve.seconds, use * n_in, vcpus) for use in self.use[layer]] for _, n_in, _ in self.kinds]
        cold_s = self.cold_share * self.spec.expert_bytes / self.catalog.main.load_bytes_per_s if main.usd_per_hour is None else 0.0
        out = []
        for c in self.choices[layer]:
            prefill = cold_s * len(c.local_ids) + (self.cold_share * c.start_s if main.usd_per_hour is not None else 0.0)
            full_s = self.spec.expert_bytes / self.catalog.main.load_bytes_per_s * len(c.local_ids)
            if main.usd_per_hour is not None:
                full_s = c.start_s if self.cold_share else 0.0
            for size in range(min(most, len(c.local_ids)) + 1):
                on_cpu, on_gpu = c.local_ids[: len(c.local_ids) - size], c.local_ids[len(c.local_ids) - size :]
                alone, first = [], prefill
                for (share, _, _), own, there, wait in zip(self.kinds, local_s, gpu_s, c.waits, strict=True):
                    longest = max(sum([own[e] for e in on_cpu]), sum([there[e] for e in on_gpu]), wait)
                    first += share * longest
                    alone.append(longest + full_s)
                steps_s = 0.0
                for share, hit, wait in c.steps:
                    far = sum(gpu_step_s[rows] for e, rows in hit.items() if e in on_gpu)
                    steps_s += share * max(sum(step_s[rows] for e, rows in hit.items() if e not in on_gpu), far, wait)
                out.append((first, steps_s, c.usd, len(on_cpu), len(on_gpu), *alone))
        return out

    @cached_property
    def choices(self) -> list[list[Choice]]:
        """Of each layer everything that fits."""
        return [list(self.choices_of(layer)) for layer in range(len(self.spec.moe_layers))]

    def choices_of(self, layer: int) -> Iterator[Choice]:
        experts, use, side = range(self.spec.experts_per_layer), self.use[layer], self.catalog.function
        trace = self.profile.arrays["trace_ids"][:, layer].tolist()
        hit = [sum(e in token for token in trace) / len(trace) for e in experts]
        seen = Counter(tuple(sorted(e for e in token if e >= 0)) for token in trace)
        if self.drafts:
            seen = self.drafted_steps(trace)
        elif self.n > 1:
            seen = self.steps_of(seen)
        mean_in = sum(share * n_in for share, n_in, _ in self.kinds)
        order = sorted(experts, key=lambda e: (use[e] * mean_in + self.n_out * hit[e], e))
        for remote in itertools.chain.from_iterable(itertools.combinations(order, size) for size in range(len(experts) + 1)):
            if not remote:
                yield self.choice(use, seen, order, [], 0, 0)  # type: ignore[misc]
            for memory_mb in side.memory_menu_mb if remote else ():
                for functions in range(1, min(side.max_functions, len(remote)) + 1):
                    parts = [list(remote[j::functions]) for j in range(functions)]
                    if all(self.bytes(part, use) <= memory_mb * 2**20 for part in parts):
                        for replicas in range(1, (side.max_replicas if functions == 1 else 1) + 1):
                            found = self.choice(use, seen, order, parts, memory_mb, replicas)
                            yield from [found] if found else []

    def bytes(self, part: list[int], use: list[float]) -> float:
        side, longest = self.catalog.function, max(self.most, *(n_in for _, n_in, _ in self.kinds))
        held = side.runtime_memory_mb * 2**20 + len(part) * self.spec.expert_bytes * side.expert_memory_factor
        return held + sum(use[e] * longest for e in part) * self.spec.hidden_state_bytes

    def steps_of(self, seen: Counter[tuple[int, ...]]) -> Counter[tuple[int, ...]]:
        """Draw steps of several tokens, as method.md says: each is the experts of all its tokens, one after another."""
        tokens = sorted(seen.elements(), key=lambda token: (-1,) * (self.spec.top_k - len(token)) + token)
        count = max(self.drawn[1], self.drawn[0] // self.n)
        steps: list[tuple[int, ...]] = [()] * count
        for place in range(self.n):
            for step, part in enumerate(np.random.RandomState(place).permutation(count)):
                at = (part + (place + 1) * (math.sqrt(5) - 1) / 2 % 1) / count
                steps[step] += tokens[int(at * len(tokens))]
        return Counter(steps)

    def drafted_steps(self, trace: list[list[int]]) -> Counter[tuple[int, ...]]:
        """Draw steps with drafts: each request has some tokens of the trace that follow each other."""
        steps: list[tuple[int, ...]] = [()] * self.drafted
        golden = (math.sqrt(5) - 1) / 2
        for request in range(self.n):
            dealt = np.random.RandomState(65536 + request).permutation(self.drafted)
            for step, part in enumerate(np.random.RandomState(request).permutation(self.drafted)):
                width, at = 1, (dealt[step] + golden) / self.drafted
                while width < len(self.widths) and at >= sum(self.widths[:width]):
                    width += 1
                first = int((part + (request + 1) * golden % 1) / self.drafted * len(trace))
                for row in range(width):
                    steps[step] += tuple(e for e in trace[(first + row) % len(trace)] if e >= 0)
        return Counter(steps)

    def choice(
        self, use: list[float], seen: Counter[tuple[int, ...]], order: list[int], parts: Any, memory_mb: int, replicas: int
    ) -> Choice | None:
        side = self.catalog.function
        tmp_mb = math.ceil(max(map(len, parts), default=0) * self.spec.expert_bytes / 1048576) + side.storage_spare_mb
        rate = memory_mb / 1024 * side.usd_per_gb_second["x86_64"]
        rate += max(tmp_mb - side.storage_free_mb, 0) / 1024 * side.usd_per_storage_gb_second
        remote = {e: j for j, part in enumerate(parts) for e in part}
        local_ids = [e for e in order if e not in remote]
        waits, usd = [], 0.0
        for share, n_in, _ in self.kinds:
            groups = parts if replicas <= 1 else self.lpt({e: use[e] * n_in for e in remote}, replicas)
            durations = []
            for group in groups:
                rows = sum(use[e] * n_in for e in group)
                if rows * self.spec.hidden_state_bytes * side.wire_expansion > side.payload_limit_bytes:
                    return None
                if rows:
                    durations.append(self.inside(memory_mb, [use[e] * n_in for e in group]))
            waits.append(max([0.0, *(self.wait(d) for d in durations)]))
            usd += share * sum(self.bill(rate, d) for d in durations)
        steps = []
        for token, times in seen.items():
            hits = [h for j in range(len(parts)) if (h := sum(remote.get(e) == j for e in token))]
            if self.per_expert:
                calls = [self.inside(memory_mb, [1.0]) for h in hits for _ in range(h)]
                longest = max([0.0, *(h * self.wait(self.inside(memory_mb, [1.0])) for h in hits)])
            else:
                calls = [
                    self.inside(memory_mb, [float(rows) for e, rows in sorted(Counter(token).items()) if remote.get(e) == j])
                    for j in range(len(parts))
                    if any(remote.get(e) == j for e in token)
                ]
                longest = max([0.0, *(self.wait(t) for t in calls)])
            share = times / seen.total()
            steps.append((share, {e: rows for e, rows in Counter(token).items() if e not in remote}, longest))
            usd += self.n_out * self.passes * share * sum(self.bill(rate, t) for t in calls) / self.n
        start_s = 0.0
        if parts:
            measured = self.latency.cold_start
            start_s = measured.total_s - measured.weights_s if measured else side.cold_start_s
            start_s += max(map(len, parts)) * self.spec.expert_bytes / side.load_bytes_per_s
            heads = 1 if side.bytes_per_read else 0
            reads = heads + max(map(len, parts)) * (math.ceil(self.spec.expert_bytes / side.bytes_per_read) if heads else 0)
            each = start_s * rate + reads * self.catalog.storage.usd_per_1000_reads / 1000
            usd += self.cold_share * len(parts) * replicas * each
            rows, most = self.most * min(self.spec.top_k, max(map(len, parts))), max(map(len, parts))
            if (self.n > 1 or self.drafts) and rows * self.spec.hidden_state_bytes * side.wire_expansion > side.payload_limit_bytes:
                return None
            top = [rows / min(rows, most)] * min(rows, most)
            if start_s + 4 * max(*waits, self.wait(self.inside(memory_mb, top))) > min(side.timeout_s, 900) * (1 + 1e-9):
                return None
        return Choice(local_ids, waits, steps, usd, start_s)

    def lpt(self, tokens: dict[int, float], replicas: int) -> list[list[int]]:
        """By work at one vCPU, longest first, to the least loaded."""
        groups: list[list[int]] = [[] for _ in range(replicas)]
        load = [0.0] * replicas
        one = min(self.catalog.function.max_useful_vcpus, 1.0)
        work = {e: self.once(self.latency.remote_expert.work_s, n, one) for e, n in tokens.items() if n > 0}
        for expert in sorted(work, key=lambda e: (-work[e], e)):
            least = load.index(min(load))
            groups[least].append(expert)
            load[least] += work[expert]
        return [group for group in groups if group]

    def once(self, curve: Any, *of: float) -> float:
        """A time from one of the profile's curves, each worked out once."""
        key = (curve.__name__, curve.__self__ is self.latency.local_expert, *of)
        if key not in self.known:
            self.known[key] = float(curve(*of))
        return self.known[key]

    def inside(self, memory_mb: int, rows: list[float]) -> float:
        side, timing, measured = self.catalog.function, self.latency.remote_expert, self.latency.invocation
        vcpus = min(side.max_useful_vcpus, memory_mb / side.mb_per_vcpu)
        rate = measured.bytes_per_s if measured else side.network_bytes_per_s
        seconds = self.once(timing.elapsed_s, sum(self.once(timing.work_s, n, vcpus) for n in rows), vcpus)
        return seconds + 2 * sum(rows) * self.spec.hidden_state_bytes * side.wire_expansion / rate

    @cached_property
    def billed_overheads(self) -> list[float]:
        measured = self.latency.invocation
        return list(measured.billed_s.tenths) if measured else [self.catalog.function.warm_billed_s]

    @cached_property
    def overhead(self) -> float:
        measured = self.latency.invocation
        outside = sum(measured.unbilled_s.tenths) / len(measured.unbilled_s.tenths) if measured else self.catalog.function.warm_unbilled_s
        return outside + sum(self.billed_overheads) / len(self.billed_overheads)

    def wait(self, inside_s: float) -> float:
        return self.overhead + inside_s

    def bill(self, usd_per_s: float, inside_s: float) -> float:
        side, granule = self.catalog.function, self.catalog.function.billing_granularity_ms / 1000
        rounded = [math.ceil((overhead + inside_s) / granule - 1e-6) * granule for overhead in self.billed_overheads]
        return sum(rounded) / len(rounded) * usd_per_s + side.usd_per_request + self.log_usd

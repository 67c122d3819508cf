"""A simulation beside the local twin, under the same requests at the same times.

    python docs/measure/simulate_twin.py [--requests 48] [--at-once 1,4] [--seed 0]

A small random model is profiled, planned with half of its experts remote, deployed and calibrated. Then requests come at random, in
bursts, so that some wait for others and some find the expert functions gone: the catalog keeps an idle instance for a few seconds only. The
main function is rented. `remoe simulate` gets the same requests, twice:

    predicted   with the cost model's times, as the command has them: of the profile and of the calibration at the beginning
    own times   with what the prompt, the start of functions and, one at a time, the steps of each of these requests took the twin; where
                several share steps, with the mean time of steps of 1, 2, .. requests, and with what calls of warm requests cost: what is
                left is the simulation of turns, queues, shared steps, starts and idle instances

Own times are those of each request because a machine that others use gets faster and slower, and what waits in a queue grows faster than
the times: times measured before and after the requests, while little ran, gave a mean TTFT that was a fifth too low. Requests come in
parts, each with times of steps of its own. A round trip makes most of each call, so that other work on the machine changes less.

Printed are ratios, simulated / measured. Exits with 1 where one of `own times` is more than 15% off.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from remoe_cli import artifacts, openmp

openmp.wait_briefly(os.environ)  # before torch is imported, as the command line does

from remoe_cli.deploy.console import SILENT  # noqa: E402
from remoe_cli.deploy.local.calibrate import calibrate  # noqa: E402
from remoe_cli.deploy.local.target import LocalTarget  # noqa: E402
from remoe_cli.deploy.target import DeployOptions  # noqa: E402
from remoe_cli.plan.build import make_plan  # noqa: E402
from remoe_cli.plan.catalog.catalog import Catalog, catalog_text, read_catalog  # noqa: E402
from remoe_cli.plan.problem.problem import Placement  # noqa: E402
from remoe_cli.plan.problem.request import PlanRequest, problem_of  # noqa: E402
from remoe_cli.profile.prompts import PromptSet  # noqa: E402
from remoe_cli.profile.record import Profile  # noqa: E402
from remoe_cli.profile.run import profile  # noqa: E402
from remoe_cli.runtime.client import Http  # noqa: E402
from remoe_cli.simulate.load import Load  # noqa: E402
from remoe_cli.simulate.requests import Arrivals  # noqa: E402
from remoe_cli.simulate.run import Run, run, run_load  # noqa: E402
from remoe_cli.simulate.service import Service, of_placement  # noqa: E402

OLMOE = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 8, "num_experts": 16, "num_experts_per_tok": 4, "max_position_embeddings": 1024,
    "pad_token_id": 1, "eos_token_id": None,
}  # fmt: skip
PROMPTS, ANSWERS = (8, 128), (8, 32)  # shortest and longest, in tokens; answers without their first
LOAD, BURSTINESS = 0.5, 1.5
IDLE_S = 4.0
MENU = f'[{{ name = "rented", memory_mb = 2048, vcpus = {os.cpu_count()}, usd_per_hour = 0.2 }}]'
RTT_MS = 15.0
PARTS = 3  # of the requests
LIMIT = 0.15
HERE = LocalTarget(SILENT)


@dataclass(frozen=True)
class Outcome:
    """What became of some requests.

    ttft_s, tpot_s, cold   of each
    usd                    of expert functions, and of the rented hours
    """

    ttft_s: Any
    tpot_s: Any
    cold: Any
    usd: tuple[float, float]


@dataclass(frozen=True)
class Asked:
    """One answer: its prompt tokens, when it was asked for and when each token came, in seconds since the beginning, and its receipt."""

    n_in: int
    at_s: float
    tokens_s: tuple[float, ...]
    receipt: dict[str, Any]

    @property
    def ttft_s(self) -> float:
        return self.tokens_s[0] - self.at_s


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--at-once", default="1,4")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    missed = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["REMOE_STATE_DIR"] = f"{folder}/state"
        made, catalog = _profile(folder), _catalog(folder)
        print(
            f"{date.today()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {options.requests} requests, ratios simulated / twin"
        )
        for at_once in map(int, options.at_once.split(",")):
            missed += _compare(folder, made, catalog, at_once, options.requests, options.seed)
    for line in missed:
        print(f"MISSED: {line}")
    return 1 if missed else 0


def _profile(folder: Path) -> Profile:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OlmoeConfig(**OLMOE, initializer_range=0.1), dtype=torch.float32)
    model.save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(512)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder / "model")
    prompts = PromptSet("drawn", "prompt", _texts(48))
    return profile(str(folder / "model"), prompts, folder / "profile", max_new_tokens=32, max_prompt_tokens=512, batch_size=16)


def _texts(count: int) -> tuple[str, ...]:
    draw = random.Random(1)
    return tuple(" ".join(f"w{draw.randrange(2, 512)}" for _ in range(draw.randint(*PROMPTS))) for _ in range(count))


def _catalog(folder: Path) -> Catalog:
    """Write the catalog 'local' with a rented main function, and with functions that are soon gone."""
    head, _, rest = catalog_text("local").partition("menu = [\n")
    text = f"{head}menu = {MENU}\n" + rest.partition("\n]\n")[2]
    text = text.replace("idle_ttl_s = 300.0", f"idle_ttl_s = {IDLE_S}")
    path = folder / "rented.toml"
    path.write_text(text, encoding="utf-8")
    return read_catalog(str(path))


def _compare(folder: Path, made: Profile, catalog: Catalog, at_once: int, count: int, seed: int) -> list[str]:
    """Play the requests on the twin and in the simulation, print both, and return what is missed."""
    name = f"at-once-{at_once}-{os.getpid()}"
    shape = {"n_in": sum(PROMPTS) // 2, "n_out": sum(ANSWERS) // 2}
    plan = make_plan(made, catalog, PlanRequest(**shape, requests_per_hour=1800.0, remote_share=0.5, concurrency=at_once, examine=False))
    artifacts.write_json(folder / f"{name}.json", plan)
    HERE.deploy(folder / f"{name}.json", name, DeployOptions(rtt_ms=RTT_MS))
    try:
        address = HERE.main_address(name)
        assert isinstance(address, Http)
        calibrated = calibrate(name, folder / f"calibrated-{at_once}", _texts(8), 32, SILENT)
        problem = problem_of(plan, calibrated, catalog)
        n_in = np.array([float(tokens) for tokens in range(PROMPTS[0], PROMPTS[1] + 1)])
        predicted = of_placement(problem, Placement(plan.main, plan.layers, plan.instances), "the plan", n_in, float(shape["n_out"]))
        outcomes: dict[str, list[Outcome]] = {"twin": [], "predicted": [], "own times": []}
        for part in range(PARTS):
            wanted = _arrivals(count // PARTS, seed + part, asyncio.run(_each_s(address.url, at_once)))
            played = sorted(asyncio.run(_play(address.url, wanted)), key=lambda one: one.at_s)
            arrivals = _came(played, wanted.over_s)  # a busy machine sends some later than wanted
            outcomes["twin"].append(_measured(played, arrivals, predicted))
            outcomes["predicted"].append(_outcome(predicted, run(predicted, arrivals, seed)))
            outcomes["own times"].append(_with_own_times(predicted, played, arrivals))
    finally:
        HERE.destroy(name)
    return _print(at_once, {each: _figures(some) for each, some in outcomes.items()})


def _arrivals(count: int, seed: int, each_s: float) -> Arrivals:
    """Draw requests that load the twin as much as LOAD says, in bursts, where one takes so long in the mean."""
    draw = np.random.default_rng(seed)
    n_in, n_out = (draw.integers(low, high + 1, count) for low, high in (PROMPTS, ANSWERS))
    gaps_s = draw.gamma(1 / BURSTINESS**2, BURSTINESS**2, count)
    gaps_s *= each_s / LOAD / float(gaps_s.mean())
    at_s = np.cumsum(gaps_s) - gaps_s
    return Arrivals(at_s, n_in, n_out, float(gaps_s.sum()))


# The twin


async def _ask(client: httpx.AsyncClient, n_in: int, n_out: int, seed: int, begun_s: float) -> Asked:
    """Ask for an answer of `n_out` tokens after the first."""
    draw, at_s, tokens_s = random.Random(seed), time.perf_counter() - begun_s, list[float]()
    body = {"prompt_token_ids": [draw.randrange(2, 512) for _ in range(n_in)], "max_new_tokens": n_out + 1, "stream": True}
    async with client.stream("POST", "/invocations", json=body) as response:
        async for line in response.aiter_lines():
            event = json.loads(line) if line else {}
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if "answer" in event:
                assert len(tokens_s) == n_out + 1, "each token is an event of its own"
                return Asked(n_in, at_s, tuple(tokens_s), event["answer"]["receipt"])
            if event:
                tokens_s.append(time.perf_counter() - begun_s)
    raise RuntimeError("the stream ended without an answer")


def _client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=300, trust_env=False, limits=httpx.Limits(max_connections=None))


async def _each_s(url: str, at_once: int) -> float:
    """Measure what a mean request takes of the twin's time now, where as many as it takes are answered at once."""
    async with _client(url) as client:
        await _ask(client, PROMPTS[0], 8, 0, 0.0)
        begun_s = time.perf_counter()
        await asyncio.gather(*(_ask(client, sum(PROMPTS) // 2, sum(ANSWERS) // 2, each, begun_s) for each in range(at_once)))
        return (time.perf_counter() - begun_s) / at_once


async def _play(url: str, arrivals: Arrivals) -> list[Asked]:
    """Ask each request at its time."""
    async with _client(url) as client:
        await asyncio.sleep(2 * IDLE_S)  # the simulation begins without any instance, too
        begun_s = time.perf_counter()

        async def one(number: int) -> Asked:
            await asyncio.sleep(max(0.0, begun_s + float(arrivals.at_s[number]) - time.perf_counter()))
            return await _ask(client, int(arrivals.n_in[number]), int(arrivals.n_out[number]), number, begun_s)

        return list(await asyncio.gather(*(one(number) for number in range(len(arrivals.at_s)))))


def _came(played: Sequence[Asked], over_s: float) -> Arrivals:
    """Say when the requests really came."""
    n_in, n_out = ([one.n_in for one in played], [len(one.tokens_s) - 1 for one in played])
    return Arrivals(np.array([one.at_s for one in played]), np.array(n_in), np.array(n_out), max(over_s, played[-1].at_s))


def _with_own_times(service: Service, played: Sequence[Asked], arrivals: Arrivals) -> Outcome:
    """Simulate with what the twin took for the prompts, steps and starts of these requests, and for calls of warm ones.

    A prompt is read from the last token of anybody before it, or from its arrival, to its own first token. What is between two tokens of a
    request is a step, and the prompts that were read meanwhile. Calls that take longer are billed longer, by the same factor for all.
    """
    firsts_s, every_s = np.array([one.tokens_s[0] for one in played]), np.sort([at_s for one in played for at_s in one.tokens_s])
    last_s = np.array([one.tokens_s[-1] for one in played])
    before_s = np.array([every_s[every_s < first_s].max(initial=0.0) for first_s in firsts_s.tolist()])
    read_s = firsts_s - np.maximum(before_s, [one.at_s for one in played])
    steps_s: dict[int, list[float]] = {number: [] for number in range(1, service.at_once + 1)}
    for one in played:
        for begun_s, ended_s in pairwise(one.tokens_s):
            meanwhile_s = float(read_s[(firsts_s > begun_s) & (firsts_s <= ended_s)].sum())
            number = int(((firsts_s < ended_s) & (last_s >= ended_s)).sum())
            steps_s[min(number, service.at_once)].append(ended_s - begun_s - meanwhile_s)
    cold = np.array([bool(one.receipt["cold_starts"]) for one in played])
    slope, least = np.polyfit(arrivals.n_in[~cold], read_s[~cold], 1)
    seen = [number for number, taken_s in steps_s.items() if taken_s]
    step_s = np.interp(np.arange(service.at_once + 1.0), [0, *seen], [0.0, *(statistics.fmean(steps_s[number]) for number in seen)])
    warm_s = least + slope * arrivals.n_in
    starts_s = read_s - warm_s
    calls = np.average(service.token_usd[1:], weights=[len(steps_s[number]) for number in range(1, service.at_once + 1)])
    prompt_usd = np.interp(arrivals.n_in, service.prompts, service.prefill_usd)
    billed_usd = sum(one.receipt["cost"]["functions_usd"] for one in played if not one.receipt["cold_starts"])
    dearer = billed_usd / float((prompt_usd + arrivals.n_out * calls)[~cold].sum())
    load = Load(
        at_s=arrivals.at_s,
        n_in=arrivals.n_in,
        prompt_s=np.where(cold, warm_s, read_s),
        prompt_usd=dearer * prompt_usd,
        tpot_s=(last_s - firsts_s) / arrivals.n_out,
        n_out=arrivals.n_out,
        cold_s=np.where(cold, starts_s, float(starts_s[cold].mean())),
        over_s=arrivals.over_s,
    )
    own = replace(service, step_s=step_s, token_usd=dearer * service.token_usd)
    return _outcome(own, run_load(own, arrivals, np.ones(len(played), dtype=bool), load))


# What comes of it


def _measured(played: Sequence[Asked], arrivals: Arrivals, service: Service) -> Outcome:
    ttft_s, tpot_s = (np.array(each) for each in zip(*((one.ttft_s, one.receipt["tpot_s"]) for one in played), strict=True))
    over_s = max(arrivals.over_s, float((arrivals.at_s + ttft_s + tpot_s * arrivals.n_out).max()))
    functions_usd = sum(each.receipt["cost"]["functions_usd"] for each in played)
    cold = np.array([bool(each.receipt["cold_starts"]) for each in played])
    return Outcome(ttft_s, tpot_s, cold, (functions_usd, service.usd_per_hour * over_s / 3600))


def _outcome(service: Service, served: Run) -> Outcome:
    hours_usd = service.usd_per_hour * served.up_share * served.over_s / 3600
    return Outcome(served.ttft_s, served.tpot_s, served.cold, (served.usd - hours_usd, hours_usd))


def _figures(parts: Sequence[Outcome]) -> dict[str, float]:
    ttft_s, tpot_s, cold = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ttft_s", "tpot_s", "cold"))
    functions_usd, hours_usd = np.sum([part.usd for part in parts], axis=0).tolist()
    times = {f"{name} p{p}": float(np.percentile(each, p)) for name, each in (("TTFT", ttft_s), ("TPOT", tpot_s)) for p in (50, 95)}
    return {
        **times,
        "TTFT mean": float(ttft_s.mean()),
        "cold": float(cold.mean()),
        "USD": functions_usd + hours_usd,
        "of functions": functions_usd,
    }


def _print(at_once: int, found: dict[str, dict[str, float]]) -> list[str]:
    measured, missed = found.pop("twin"), []
    print(f"\n{f'{at_once} at once':>10}" + "".join(f"{name:>14}" for name in measured))
    print(f"{'twin':>10}" + "".join(f"{value:>14.3g}" for value in measured.values()), flush=True)
    for known, figures in found.items():
        ratios = {name: figures[name] / value if value else 1.0 + figures[name] for name, value in measured.items()}
        print(f"{known:>10}" + "".join(f"{ratio:>14.2f}" for ratio in ratios.values()), flush=True)
        if known == "own times":
            missed = [
                f"{at_once} at once: {name} is {ratio:.2f} times the twin's" for name, ratio in ratios.items() if abs(ratio - 1) > LIMIT
            ]
    return missed


if __name__ == "__main__":
    sys.exit(main())

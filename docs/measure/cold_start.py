"""From process start to first token with a cold page cache: the whole model in one process, and remoe's split of it.

    python docs/measure/cold_start.py [--folder DIR] [--remote 1.0 0.5] [--rounds 3] [--prompt 16] [--before CHECKOUT]

The model is random, in bfloat16, about 1.7 GB, and experts are 91% of its bytes. It is made once in DIR. The twin of Lambda runs before;
all its functions are cold, one for each layer. Before each start the files of the checkpoint and of the shards are dropped from the page
cache (posix_fadvise DONTNEED, which needs no root), not those of Python and its libraries. A process then imports, loads as a main server
does, computes its own first token, and the first token of a prompt. `functions` is how long it still waits for functions that read. Ways
take turns. On the twin all share one disk and this machine's cores. CHECKOUT is another version of remoe, whose main function is started
beside this one's, with the same functions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from statistics import median

MODEL = {
    "vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_experts": 24, "num_experts_per_tok": 4, "max_position_embeddings": 4096,
    "pad_token_id": 1, "eos_token_id": None,
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
_TRIES = 5
PARTS = ("process", "imports", "model", "functions", "own token", "first token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keeps the model there; by default it is made anew")
    parser.add_argument("--remote", nargs="*", type=float, default=[1.0, 0.5], help="shares of each layer's experts in its function")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--before", type=Path, help="a checkout of another version, to compare with")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_start(options.child, options.prompt)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["REMOE_STATE_DIR"] = f"{scratch}/state"
        folder = options.folder or Path(scratch) / "model"
        checkpoint = _checkpoint(folder)
        from remoe_cli.model.spec import read_spec

        spec = read_spec(checkpoint)
        share = spec.routed_bytes / (spec.routed_bytes + spec.nonexpert_bytes)
        print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {options.rounds} rounds,")
        print(f"a prompt of {options.prompt} tokens; {(spec.routed_bytes + spec.nonexpert_bytes) / 1e9:.2f} GB, experts {share:.0%}\n")
        print(f"| seconds, medians | {' | '.join(PARTS)} | in all | of one process | GB it reads |")
        print(f"|{' --- |' * (len(PARTS) + 4)}")
        checkouts = [*([options.before.resolve()] if options.before else []), ROOT]
        turns = [(checkout, remote) for checkout in checkouts for remote in (0.0, *options.remote)]
        made: dict[tuple[Path, float], list[dict[str, float]]] = {turn: [] for turn in turns}
        tokens: set[int] = set()
        with ExitStack() as deployed:
            ways = {remote: deployed.enter_context(_deployed(checkpoint, remote, Path(scratch))) for remote in (0.0, *options.remote)}
            for _ in range(options.rounds):
                for checkout, remote in turns:
                    started = _child(*ways[remote], options, checkout)
                    tokens.add(int(started.pop("token")))
                    made[checkout, remote].append(started)
        base_s = _all_s(made[turns[0]])
        for (checkout, remote), starts in made.items():
            held = (spec.nonexpert_bytes + round(spec.experts_per_layer * (1 - remote)) * spec.expert_bytes * len(spec.moe_layers)) / 1e9
            cells = " | ".join(f"{median(each[part] for each in starts):.2f}" for part in PARTS)
            name = f"{remote:.0%} of the experts in functions" if remote else "all in one process"
            name += ", before" if checkout != ROOT else ""
            print(f"| {name} | {cells} | {_all_s(starts):.2f} | {_all_s(starts) / base_s:.2f} | {held:.2f} |")
        print(f"\nFirst tokens are {'the same' if len(tokens) == 1 else 'not all the same'}.")


def _all_s(starts: Sequence[dict[str, float]]) -> float:
    return median(sum(each[part] for part in PARTS) for each in starts)


def _child(config: Path, cold, options: argparse.Namespace, checkout: Path) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Start a main function of a checkout in a process of its own, again where a function did not start within its 10 s."""
    command = [sys.executable, __file__, "--child", str(config), "--prompt", str(options.prompt)]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    for _ in range(_TRIES):
        cold()
        run = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if run.returncode == 0:
            return dict(json.loads(run.stdout))
        print(run.stderr.strip().splitlines()[-1], file=sys.stderr)
    sys.exit(f"A main function did not start in {_TRIES} tries.")


def _start(path: Path, prompt: int) -> dict[str, float]:
    """Start a main function in this process, and say how long each part took."""
    parts = {"process": _age_s()}

    def timed(part: str, function):  # type: ignore[no-untyped-def]
        def run(*given, **named):  # type: ignore[no-untyped-def]
            begun_s = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                parts[part] = parts.get(part, 0.0) + time.perf_counter() - begun_s

        return run

    begun_s = time.perf_counter()
    from functools import partial

    from remoe_cli.runtime import load_main
    from remoe_cli.runtime.invoke import make_caller
    from remoe_cli.runtime.main_function import Request

    parts["imports"] = time.perf_counter() - begun_s
    begun_s = time.perf_counter()
    import_engine = timed("imports", load_main._import_engine)

    def imported() -> None:
        import_engine()
        from remoe_cli.runtime import engine

        engine.load, engine.copy_weights = timed("model", engine.load), timed("model", engine.copy_weights)  # type: ignore[attr-defined]
        engine.Engine.warm_up = timed("own token", engine.Engine.warm_up)  # type: ignore[method-assign]

    load_main._import_engine = imported
    settings = json.loads(path.read_text())
    before_s = parts["imports"]
    served = load_main.load_here(path.with_name("server.json"), partial(make_caller, settings["endpoint"]))
    # Besides, loading waits for functions that are still starting.
    known_s = parts["imports"] - before_s + parts["model"] + parts["own token"]
    parts["functions"] = time.perf_counter() - begun_s - known_s
    draw = random.Random(0)
    ids = tuple(draw.randrange(2, MODEL["vocab_size"]) for _ in range(prompt))
    answer = timed("first token", served.answer)(Request(prompt_token_ids=ids, max_new_tokens=1))
    return parts | {"token": answer.token_ids[0]}


def _age_s() -> float:
    started = (int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) + 0.5) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _checkpoint(folder: Path):  # type: ignore[no-untyped-def]
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedTokenizerFast

    from remoe_cli.model.checkpoint import find

    if not (folder / "tokenizer.json").exists():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(OlmoeConfig(**MODEL, initializer_range=0.05), dtype=torch.bfloat16)
        model.save_pretrained(folder)
        vocabulary = {f"w{i}": i for i in range(100)}
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))).save_pretrained(folder)
    return find(str(folder))


@contextmanager
def _deployed(checkpoint, share: float, scratch: Path) -> Iterator[tuple[Path, object]]:  # type: ignore[no-untyped-def]
    """Deploy the last experts of each layer on the twin, and yield a settings file for `_start` and what makes all cold."""
    from batching import expert_functions

    from remoe_cli import artifacts
    from remoe_cli.deploy.local import lifecycle
    from remoe_cli.deploy.local.calibrate import restart
    from remoe_cli.deploy.local.config import FunctionConfig, TwinConfig
    from remoe_cli.model.spec import read_spec
    from remoe_cli.plan.catalog.catalog import read_catalog
    from remoe_cli.plan.cost import prices
    from remoe_cli.profile.record import ModelRef
    from remoe_cli.runtime.receipt import Prices
    from remoe_cli.runtime.server_config import ServedFunction, ServerConfig, StartPolicy

    spec, catalog, name = read_spec(checkpoint), read_catalog("local"), f"cold-{os.getpid()}-{share * 100:.0f}"
    count = round(spec.experts_per_layer * share)
    remote = {layer: tuple(range(spec.experts_per_layer - count, spec.experts_per_layer)) for layer in spec.moe_layers if count}
    use = (spec.top_k / spec.experts_per_layer,) * count
    functions: list[FunctionConfig] = []
    served: list[ServedFunction] = []
    files: list[Path] = list(checkpoint.weight_files)

    def prepare(at: Path) -> TwinConfig:
        made, more = expert_functions(checkpoint, spec, remote, at, use)
        functions.extend(made)
        served.extend(more)
        files.extend(at / "bundle" / each.shard for each in more)
        return TwinConfig(name=name, functions=tuple(functions), python=sys.executable)

    status = lifecycle.start(name, prepare)
    at = scratch / f"settings-{name}"
    at.mkdir()
    main_prices = prices.main_prices(catalog, catalog.main.menu[-1])
    config = ServerConfig(
        model=ModelRef(path=checkpoint.name, revision=checkpoint.revision),
        spec=spec,
        functions=tuple(served),
        prices=Prices(catalog="local", main=main_prices, function=prices.function_prices(catalog)),
        start_ahead=StartPolicy(idle_s=300.0, most_usd=1.0, n_in=16, usd_per_call=0.0),
    )
    artifacts.write_json(at / "server.json", config)
    (at / "settings.json").write_text(json.dumps({"endpoint": status["endpoint"]}))

    def cold() -> None:
        for function in functions:
            restart(name, function.name)
        _drop([_written(name, file) for file in files])

    try:
        yield at / "settings.json", cold
    finally:
        lifecycle.destroy(name)


def _written(name: str, file: Path) -> Path:
    """Return where a file is that was written while the deployment was made in a folder of another name."""
    if file.exists():
        return file
    (found,) = (Path(os.environ["REMOE_STATE_DIR"])).glob(f"**/{file.parent.name}/{file.name}")
    return found


def _drop(files: Sequence[Path]) -> None:
    os.sync()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()

"""Every command of README.md, CONTRIBUTING.md, the tutorial and some guides runs: on a tiny model, on the local twin, in an empty folder.

The commands run in the order of the pages, in one folder, with the files of `write_files`. What cannot run here (an account, a network, a
terminal that waits) is in PARSED and is held against the real commands and options; targets of make are looked up by `make -n`. A
line that is none of these fails.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.main
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from remoe_cli.cli.app import app
from remoe_cli.errors import RemoeError
from remoe_cli.plan.catalog.catalog import catalog_text
from tests.docs.make import make
from tests.support import forked
from tests.support.families import EXPERTS, TOP_K, VOCAB_SIZE, save
from tests.support.paths import ROOT
from tests.support.routing_files import LENGTHS, vllm_lines, write_lines

WORDS = [f"w{number}" for number in range(VOCAB_SIZE - 8)]
PROMPTS = 24
DEMO_MODEL = ".cache/remoe/models/smolmoe-float32"  # which `make demo` leaves

PAGES = (
    *("README.md", "CONTRIBUTING.md", "docs/tutorial/first-receipt.md", "docs/how-to/deploy-here.md", "docs/how-to/lower-the-bill.md"),
    *("docs/how-to/own-model.md", "docs/how-to/own-gpu.md", "docs/how-to/read-a-plan.md", "docs/how-to/ci.md"),
    *("docs/how-to/from-vllm-or-sglang.md", "docs/explanation/when-it-pays.md"),
)
# Commands that are only parsed, by how they begin or what they say, and why.
PARSED = {
    "remoe package plans/olmoe-aws.json --image": "pushes to a registry",
    "remoe deploy plans/olmoe-aws.json --target aws --endpoint-image": "needs an account",
    "remoe infer olmoe-aws": "needs an account",
    "remoe destroy olmoe-aws": "needs an account",
    "remoe profile measure": "needs a deployment that is not destroyed yet; tests/runtime/test_calibrate.py runs it",
    "remoe deploy plans/mine.json": "does what 'remoe deploy plans/olmoe.json' does, as the next two do",
    "remoe infer mine": "does what 'remoe infer olmoe' does",
    "remoe destroy mine": "does what 'remoe destroy olmoe' does",
    "remoe cost mine": "needs a deployment that has served; tests/usage/test_on_twin.py runs it",
    "remoe calibrate mine": "needs a deployment that has served; tests/usage/test_on_twin.py runs it",
    "remoe drift mine": "needs a deployment that has served; tests/usage/test_on_twin.py runs it",
    "remoe simulate plans/gpt-oss-20b-aws.json": "needs the profile of a large model; tests/simulate runs what it does",
    "remoe plan show plans/deepseek-v2-lite-aws.json": "tests/docs/test_read_a_plan.py runs it and compares what it prints",
    "remoe deploy plans/tiny-remote.json": "does what 'remoe deploy plans/olmoe.json' does, as the next two do",
    "remoe infer tiny-remote": "does what 'remoe infer olmoe' does",
    "remoe destroy tiny-remote": "does what 'remoe destroy olmoe' does",
    "remoe deploy plans/my-gpu.json": "needs a GPU, or an account",
    "remoe serve my-gpu": "needs an account",
    "remoe catalog update": "asks AWS's price list; tests/plan/test_catalog_update.py runs it",
}
# Options that make a command quick, by how it begins.
QUICKLY = {
    "remoe profile ~/models/OLMoE-1B-7B-0924 --data prompts.jsonl --device cuda": ("--device", "cpu", "--latency-from", "g5.xlarge"),
    "remoe profile tiny": ("--latency-from", "paper"),
    "remoe profile ~/.cache/": ("--latency-from", "paper", "--max-new-tokens", "10"),
    "remoe profile ~/models/": ("--latency-from", "paper", "--max-new-tokens", "10"),
    "remoe infer": ("--max-new-tokens", "4"),
    "remoe predict profiles/gpt-oss --evaluate": ("--folds", "2"),
}
# Lines that are not commands of ours.
OTHERS = (
    "source .venv/bin/activate",
    "curl http://127.0.0.1:PORT/",
    "python make_tiny.py",
    "cp remoe_cli/demo_data/prompts.jsonl prompts.jsonl",
)


@dataclass(frozen=True)
class Line:
    """One command of a page, without its comment."""

    page: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"

    def starts(self, table: Any) -> str | None:
        return next((start for start in table if self.text.startswith(start)), None)


def lines() -> list[Line]:
    found = []
    for page in PAGES:
        for block in re.findall(r"(?ms)^```sh\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8")):
            texts = (re.sub(r"(^|\s+)# .*", "", line).strip() for line in block.splitlines())
            found += [Line(page, text) for text in texts if text]
    return found


ALL = lines()


def words(line: Line, home: Path | None = None) -> list[str]:
    return [str(home / word[2:]) if home and word.startswith("~/") else word for word in shlex.split(line.text.partition(" > ")[0])]


def write_files(home: Path) -> None:
    """What the pages take for given: models, prompts, routing and a trace of requests."""
    for name, family in (
        ("models/OLMoE-1B-7B-0924", "olmoe"),
        ("models/small", "olmoe"),
        ("gpt-oss-20b", "gpt_oss"),
        (DEMO_MODEL, "olmoe"),
    ):
        save(family, torch.float32, home / name, fused=False)
        words = Tokenizer(models.WordLevel({word: number + 8 for number, word in enumerate(WORDS)} | {"<unk>": 2}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>").save_pretrained(home / name)
    random = np.random.default_rng(0)
    for name in ("prompts.jsonl", "tomorrow.jsonl"):
        texts = (" ".join(random.choice(WORDS, size=6)) for _ in range(PROMPTS))
        (home / name).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    ids = np.argsort(random.random((PROMPTS * 12, 2, EXPERTS)), axis=2)[:, :, :TOP_K]
    counts = np.stack([(ids[..., None] == np.arange(EXPERTS)).any(axis=2)[first::PROMPTS].sum(axis=0) for first in range(PROMPTS)])
    np.savez(home / "counts.npz", counts=counts)
    vectors = np.array([sorted(random.permutation(EXPERTS)[:TOP_K]) for _ in range(sum(LENGTHS) * 2)]).reshape(-1, 2, TOP_K)
    write_lines(home / "responses.jsonl", vllm_lines(vectors))
    menu = re.search(r"(?ms)^```toml\n(menu = .*?)^```$", (ROOT / "docs/how-to/own-gpu.md").read_text(encoding="utf-8"))
    head, _, rest = catalog_text("local").partition("menu = [\n")
    assert menu
    (home / "my-gpu.toml").write_text(head + menu[1] + rest.partition("\n]\n")[2], encoding="utf-8")
    script = re.search(r"(?ms)^```python\n(.*?)^```$", (ROOT / "docs/how-to/own-model.md").read_text(encoding="utf-8"))
    assert script
    (home / "make_tiny.py").write_text(script[1], encoding="utf-8")
    rows = "".join(f"2026-11-16 18:{minute:02}:00,6,10\n" for minute in range(30))
    (home / "trace.csv").write_text("timestamp,n_in,n_out\n" + rows, encoding="utf-8")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the commands run, with no deployment left in it at the end."""
    folder = tmp_path_factory.mktemp("home")
    write_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMOE_STATE_DIR", str(folder / "state"))
        patch.setenv("HOME", str(folder))
        patch.chdir(folder)
        made = forked.complete(runpy.run_path, "make_tiny.py")
        assert made.returncode == 0, made.stderr
        yield folder
        for deployment in (folder / "state" / "deployments").glob("*"):
            forked.remoe("destroy", deployment.name)


def parse(arguments: list[str]) -> None:
    """Hold a command line against the commands and options that there are; raises what the command line would."""
    command = typer.main.get_command(app)

    def disarm(each: Any) -> None:
        for inner in getattr(each, "commands", {}).values():
            disarm(inner)
        if not hasattr(each, "commands"):
            each.callback = lambda **_: None

    disarm(command)
    command.main(arguments, prog_name="remoe", standalone_mode=False)


def test_the_pages_have_commands() -> None:
    assert len(ALL) > 25 and {line.page for line in ALL} == set(PAGES)


@pytest.mark.parametrize("line", [line for line in ALL if line.text.startswith("make ")], ids=str)
def test_targets_of_make_exist(line: Line) -> None:
    run = make(*words(line)[1:], "-n")
    assert run.returncode == 0, run.stderr
    if part := re.search(r"\bT=(\S+)", line.text):
        assert (ROOT / part[1]).exists()


@pytest.mark.parametrize("line", [line for line in ALL if not line.text.startswith("make ") and not line.starts(OTHERS)], ids=str)
def test_commands_of_remoe_run(line: Line, home: Path) -> None:
    program, *arguments = words(line, home)
    assert program == "remoe", "neither a command of remoe, nor of make, nor one of OTHERS"
    parse(arguments)
    if line.starts(PARSED):
        return
    (home / "plans").mkdir(exist_ok=True)
    quickly = QUICKLY.get(line.starts(QUICKLY) or "", ())
    # A reader at a terminal is asked before an output is replaced; a job has none, so its page says --yes itself.
    agreed = ("--yes",) if {"-o", "report"} & set(arguments) and line.page != "docs/how-to/ci.md" else ()
    run = forked.remoe(*arguments, *quickly, *agreed)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_workflow_for_ci_is_one_whose_commands_parse() -> None:
    page = (ROOT / "docs/how-to/ci.md").read_text(encoding="utf-8")
    workflow, more = (yaml.safe_load(block) for block in re.findall(r"(?ms)^```yaml\n(.*?)^```$", page))
    steps = [*workflow["jobs"]["plan"]["steps"], *more]
    commands = [step["run"] for step in steps if step.get("run", "").startswith("remoe ")]
    assert len(commands) == 2
    for command in commands:
        parse(shlex.split(command.partition(" > ")[0])[1:])
    assert all(re.fullmatch(r"[\w/-]+@v\d+", step["uses"]) for step in steps if "uses" in step)


def kinds(error: type[RemoeError]) -> Iterator[type[RemoeError]]:
    yield error
    for kind in error.__subclasses__():
        yield from kinds(kind)


def test_the_page_on_ci_has_every_exit_code() -> None:
    page = (ROOT / "docs/how-to/ci.md").read_text(encoding="utf-8")
    codes = {kind.exit_code for kind in kinds(RemoeError)}
    assert [int(code) for code in re.findall(r"(?m)^\| (\d) \|", page)] == sorted({0, *codes})


@pytest.mark.parametrize(("new", "code"), [(1.0, 0), (1.1, 1)])
def test_the_check_for_ci_fails_where_a_plan_is_dearer(new: float, code: int, tmp_path: Path) -> None:
    page = (ROOT / "docs/how-to/ci.md").read_text(encoding="utf-8")
    step = re.search(r"run: (python -c .*)", page)
    assert step
    for name, usd in (("old.json", 1.0), ("new.json", new)):
        (tmp_path / name).write_text(json.dumps({"cost_usd_per_request": usd}))
    command = [sys.executable, *shlex.split(step[1])[1:3], "old.json", "new.json"]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == code


def test_the_tables_name_commands_that_the_pages_have() -> None:
    for start in (*PARSED, *QUICKLY, *OTHERS):
        assert any(line.text.startswith(start) for line in ALL), start


def test_an_option_that_is_not_there_does_not_parse() -> None:
    parse(["plan", "profiles/olmoe", "-o", "plan.json", "--tpot", "0.2"])
    with pytest.raises(Exception, match="no-such-option"):
        parse(["plan", "profiles/olmoe", "-o", "plan.json", "--no-such-option", "1"])

"""`remoe demo`: the whole pipeline on a real small model that needs no model hub."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remoe_cli.cli import infer, output
from remoe_cli.cli import plan as plan_command
from remoe_cli.cli.groups import examples

if TYPE_CHECKING:
    from remoe_cli.profile.prompts import PromptSet
    from remoe_cli.profile.record import Profile

QUESTION = "What is the capital of France?"
REMOTE_SHARE = 0.25
_NEW_TOKENS, _PROMPT_TOKENS, _BATCH = 32, 512, 16

EXAMPLES = examples("remoe demo", "remoe demo --verbose   # with the tables of layers")


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"


def command(
    dtype: Annotated[Dtype, typer.Option(help="Number type of the model's weights.")] = Dtype.bfloat16,
    verbose: output.VerboseOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Profile, plan, deploy and ask a real small model on this machine. Needs no account."""
    from remoe_cli import artifacts
    from remoe_cli.deploy.local.target import LocalTarget
    from remoe_cli.deploy.target import DeployOptions
    from remoe_cli.model.demo import NAMES, demo_model
    from remoe_cli.owned import refuse_file
    from remoe_cli.plan.build import make_plan
    from remoe_cli.plan.catalog.catalog import read_catalog
    from remoe_cli.plan.document import Plan
    from remoe_cli.plan.problem.request import PlanRequest
    from remoe_cli.profile.record import refuse_foreign
    from remoe_cli.runtime.client import answer
    from remoe_cli.settings import cache_dir

    folder = cache_dir() / "demo" / NAMES[dtype.value]
    for name in ("plan.json", "plan-remote.json"):
        refuse_file(folder / name, artifacts.made_as(Plan))
    refuse_foreign(folder / "profile")
    output.say("1/5 The model")
    model = demo_model(dtype.value, output.say)
    output.say(f"2/5 Profile: which experts the demo prompts use ({folder / 'profile'})")
    profile = _profile(model, folder / "profile")

    output.say("3/5 Plan: what to move out, if anything")
    catalog = read_catalog("local")
    honest = make_plan(profile, catalog)
    artifacts.write_json(folder / "plan.json", honest)
    if not output.is_json():
        plan_command.show(honest, folder / "plan.json")

    share = f"{REMOTE_SHARE:.0%}"
    output.say(f"4/5 Deploy, with {share} of the experts forced out to show the remote path at work")
    forced_path = folder / "plan-remote.json"
    forced = make_plan(profile, catalog, PlanRequest(remote_share=REMOTE_SHARE))
    artifacts.write_json(forced_path, forced)
    if not output.is_json():
        plan_command.show(forced, forced_path)
    name = f"remoe-demo-{os.getpid()}"
    here = LocalTarget(output.console())
    deployed = here.deploy(forced_path, name, DeployOptions())
    try:
        output.say(f"5/5 Ask: {QUESTION}\n")
        on_text = (lambda text: None) if output.is_json() else output.piece
        document = answer(here.main_address(name), QUESTION, 64, on_text, expected=infer.expected_cost_of(forced_path))
    finally:
        here.destroy(name)
    output.result(
        {
            "model": str(model),
            "profile": str(profile.path),
            "plan": str(folder / "plan.json"),
            "plan_deployed": str(forced_path),
            "verdict": honest.verdict,
            "deployment": {"name": name, "target": "local", "functions": len(deployed["functions"]), "state": "destroyed"},
            "text": document["text"],
            "receipt": document["receipt"],
        },
        lambda: _show(document, forced_path),
    )


def _prompts() -> PromptSet:
    from importlib.resources import as_file, files

    from remoe_cli.profile.prompts import PromptSet, read_prompts

    with as_file(files("remoe_cli.demo_data") / "prompts.jsonl") as file:
        return PromptSet("remoe_cli.demo_data/prompts.jsonl", "prompt", read_prompts(str(file)).texts)


def _profile(model: Path, out: Path) -> Profile:
    """The demo profile, made now unless this very one is there already."""
    from remoe_cli.errors import ArtifactError
    from remoe_cli.model.checkpoint import find
    from remoe_cli.predict.train import train
    from remoe_cli.profile.record import read_profile
    from remoe_cli.profile.run import profile

    prompts = _prompts()
    try:
        made = read_profile(out)
        if (made.record.dataset.sha256, made.record.model.revision) == (prompts.sha256, find(str(model)).revision):
            return made
    except ArtifactError:
        pass
    with output.progress("Profiling prompts") as progress:
        made = profile(
            str(model),
            prompts,
            out,
            max_new_tokens=_NEW_TOKENS,
            max_prompt_tokens=_PROMPT_TOKENS,
            batch_size=_BATCH,
            progress=progress,
            say=output.say,
        )
    train(made)
    return made


def _show(document: dict[str, Any], plan: Path) -> None:
    infer.show_receipt(document["receipt"])
    output.line("\nThe demo deployment is gone again. To keep one, and to ask it your own questions:")
    output.line(f"  remoe deploy {plan} --name demo")
    output.line("  remoe infer demo --prompt 'Write a haiku about rivers.'")
    output.line("  remoe destroy demo")

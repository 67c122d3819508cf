"""`remoe demo`: the whole pipeline on a real small model that needs no model hub."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remoe_cli.cli import infer, output, plan_show
from remoe_cli.cli.groups import examples
from remoe_cli.cli.profile_shared import trained_predictor

if TYPE_CHECKING:
    from remoe_cli.plan.document import Plan
    from remoe_cli.profile.prompts import PromptSet
    from remoe_cli.profile.record import Profile

QUESTION = "What is the capital of France, and what is it known for?"
REMOTE_SHARE = 0.25
_EVERY = 5  # of the prompts one is profiled: 8 of each topic, about 1,700 generated tokens
_NEW_TOKENS, _PROMPT_TOKENS, _BATCH = 32, 512, 16
_ANSWER_TOKENS = 31  # two whole sentences, and about as many tokens as the plan expects of a request

EXAMPLES = examples("remoe demo", "remoe demo --verbose   # with the tables of layers")


class Dtype(StrEnum):
    """Number type of the demo model.

    float32 is the default: where a CPU computes bfloat16 fast, profiling in float32 takes 1.4 times as long, and where it does not,
    0.4 times (measured with 16 prompts on one core of an AMD EPYC, with and without its bfloat16 instructions).
    """

    bfloat16 = "bfloat16"
    float32 = "float32"


def command(
    dtype: Annotated[Dtype, typer.Option(help="Number type of the model's weights.")] = Dtype.float32,
    verbose: output.VerboseOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Profile, plan, deploy and ask a real small model on this machine. Needs no account."""
    from remoe_cli import artifacts
    from remoe_cli.cli import demo_story as story
    from remoe_cli.demo_data import PROMPTS
    from remoe_cli.deploy.local.target import LocalTarget
    from remoe_cli.deploy.target import DeployOptions
    from remoe_cli.model.names import DEMO_NAMES
    from remoe_cli.owned import refuse_file
    from remoe_cli.plan.document import Plan
    from remoe_cli.profile.record import refuse_foreign
    from remoe_cli.report.page import refuse_page
    from remoe_cli.settings import cache_dir

    folder = cache_dir() / "demo" / DEMO_NAMES[dtype.value]
    plan_path, forced_path, page = folder / "plan.json", folder / "plan-remote.json", folder / "report.html"
    for path in (plan_path, forced_path):
        refuse_file(path, artifacts.made_as(Plan))
    refuse_page(page)
    refuse_foreign(folder / "profile")
    output.say("1/5 The model: small, so that all of this runs here")
    with output.progress("Fetching and building the demo model"):
        from remoe_cli.model.demo import demo_model

        model = demo_model(dtype.value, output.say)
    with output.progress("Reading the model"):
        from remoe_cli.model.checkpoint import find
        from remoe_cli.model.spec import read_spec

        spec = read_spec(find(str(model)))
    _tell(story.model_lines(spec))

    output.say("\n2/5 Profile: which experts do prompts use, and how long does everything take here?")
    prompts = _prompts()
    profile = _profile(model, prompts, folder / "profile")
    _tell(story.profile_lines(profile, len(prompts.texts), model, PROMPTS))
    if output.is_verbose():
        _tell([f"    warning: {warning}" for warning in profile.record.latency.warnings])

    output.say("\n3/5 Plan: is it cheaper to move some of the experts into serverless functions?")
    plan, forced = _plans(profile)
    artifacts.write_json(plan_path, plan)
    artifacts.write_json(forced_path, forced)
    _tell(story.plan_lines(plan))
    _show_tables(plan, plan_path)

    output.say(f"\n4/5 Deploy: {REMOTE_SHARE:.0%} of the experts are forced out now, to show how remote experts work")
    _tell(story.forced_lines(plan, forced))
    _show_tables(forced, forced_path)
    name = f"remoe-demo-{os.getpid()}"
    here = LocalTarget(output.console())
    deployed = here.deploy(forced_path, name, DeployOptions())
    try:
        output.say(f"\n5/5 Ask: {QUESTION}\n")
        document = infer.ask(here.main_address(name), QUESTION, _ANSWER_TOKENS)
    finally:
        here.destroy(name)
    _report(profile, forced, forced_path, document["receipt"], page)
    output.result(
        {
            "model": str(model),
            "profile": str(profile.path),
            "prompts": len(profile.arrays["prompt_tokens"]),
            "prompts_left_out": len(prompts.texts) - len(profile.arrays["prompt_tokens"]),
            "plan": str(plan_path),
            "plan_deployed": str(forced_path),
            "verdict": plan.verdict,
            "deployment": {"name": name, "target": "local", "functions": len(deployed["functions"]), "state": "destroyed"},
            "text": document["text"],
            "receipt": document["receipt"],
            "report": str(page),
        },
        lambda: _show(document, page, story.commands(forced_path)),
    )


def _tell(lines: list[str]) -> None:
    for line in lines:
        output.say(line)


def _show_tables(plan: Plan, path: Path) -> None:
    if output.is_verbose() and not output.is_json():
        plan_show.show(plan, path)


def _prompts() -> PromptSet:
    from remoe_cli.demo_data import PROMPTS
    from remoe_cli.profile.prompts import PromptSet, read_prompts

    return PromptSet("remoe_cli.demo_data/prompts.jsonl", "prompt", read_prompts(str(PROMPTS)).texts)


def _profile(model: Path, prompts: PromptSet, out: Path) -> Profile:
    """Profile some of the prompts, unless an earlier run of the demo has done just that."""
    from dataclasses import replace

    from remoe_cli.errors import ArtifactError, UsageError
    from remoe_cli.model.checkpoint import find
    from remoe_cli.profile.record import read_profile
    from remoe_cli.profile.run import profile

    subset = replace(prompts, source=f"{prompts.source}, every {_EVERY}th prompt", texts=prompts.texts[::_EVERY])
    try:
        made = read_profile(out)
        if (made.record.dataset.sha256, made.record.model.revision) == (subset.sha256, find(str(model)).revision):
            output.say(f"    The profile of an earlier run is used again: {out}")
            return made
    except (ArtifactError, UsageError):  # there is none, or not of this version
        pass
    made = profile(
        str(model),
        subset,
        out,
        max_new_tokens=_NEW_TOKENS,
        max_prompt_tokens=_PROMPT_TOKENS,
        batch_size=_BATCH,
        progress=output.progress,
    )
    trained_predictor(made)
    return made


def _plans(profile: Profile) -> tuple[Plan, Plan]:
    """The cheapest plan, and the cheapest one of those with REMOTE_SHARE of the experts remote."""
    with output.progress("Planning"):
        from remoe_cli.plan.build import make_plan
        from remoe_cli.plan.catalog.catalog import read_catalog
        from remoe_cli.plan.problem.request import PlanRequest

        catalog = read_catalog("local")
        return make_plan(profile, catalog), make_plan(profile, catalog, PlanRequest(remote_share=REMOTE_SHARE))


def _report(profile: Profile, plan: Plan, plan_path: Path, receipt: dict[str, Any], page: Path) -> None:
    """Write the report of the deployed plan, its profile and its receipt."""
    from remoe_cli.progress import no_progress
    from remoe_cli.report.content import content_of
    from remoe_cli.report.inputs import Inputs, ReceiptFigures, Receipts
    from remoe_cli.report.page import write_page

    receipts = Receipts((), (ReceiptFigures.model_validate(receipt),), without=0)
    write_page(content_of(Inputs(profile, plan, plan_path, receipts), no_progress), page)  # in less than a second


def _show(document: dict[str, Any], page: Path, commands: list[str]) -> None:
    from remoe_cli.cli import demo_story as story

    receipt = document["receipt"]
    infer.show_receipt(receipt)
    for line in story.accuracy_lines(receipt["tpot_s"], receipt["predicted"] and receipt["predicted"]["tpot_s"]):
        output.line(line)
    output.line(f"All of this as a page for your browser: {story.shown(page)}")
    output.line()
    output.paragraph("The demo's deployment is gone again. Deploy it to stay, ask it your own question, and remove it:")
    for command in commands:
        output.line(f"  {command}")

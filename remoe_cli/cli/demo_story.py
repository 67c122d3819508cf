"""What `remoe demo` prints at each of its steps, which cli/demo.py does. No line has over 100 columns."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from remoe_cli.cli import output
from remoe_cli.plan.document import BaselineName
from remoe_cli.plan.wording import HOURS_PER_MONTH, bought, dollars, price

if TYPE_CHECKING:
    from remoe_cli.model.spec import MoeSpec
    from remoe_cli.plan.document import Plan
    from remoe_cli.profile.record import Profile

WITHIN = 0.25  # how far the demo's predictions may be off
_INDENT = "    "
_WIDTH = 100
_ANSWERS = {
    "recommended": "Yes: it is worth it here.",
    "not-recommended": "No: it is not worth it here.",
    "depends-on-traffic": "It depends on how many requests come.",
    "insufficient-evidence": "There is too little evidence to tell.",
}


def model_lines(spec: MoeSpec) -> list[str]:
    """Say what a mixture-of-experts model is, with the demo's as the example."""
    experts = spec.experts
    routed = spec.expert_bytes * experts / (spec.expert_bytes * experts + spec.nonexpert_bytes)
    return _filled(
        f"SmolMoE is a mixture-of-experts language model, here in {spec.dtype}. Each of its {len(spec.moe_layers)} layers has "
        f"{spec.experts_per_layer} experts, small networks of which {spec.top_k} are used for each token. The {experts} experts are "
        f"{routed:.0%} of its weights."
    )


def profile_lines(profile: Profile, all_prompts: int, model: Path, data: Path) -> list[str]:
    """Say what was profiled, what was found, what was left out, and the command that leaves nothing out."""
    arrays = profile.arrays
    prompts, decode_tokens = len(arrays["prompt_tokens"]), int(arrays["decode_tokens"].sum())
    shares = arrays["decode_counts"].sum(axis=0) / decode_tokens  # [layers, experts]
    least, most = float(sorted(shares.min(axis=1))[len(shares) // 2]), float(sorted(shares.max(axis=1))[len(shares) // 2])
    return [
        *_filled(
            f"To save time, only {prompts} of the {all_prompts} demo prompts were run: {int(arrays['prompt_tokens'].sum()):,} prompt "
            f"tokens and {decode_tokens:,} generated ones. In a typical layer {most:.0%} of the generated tokens use the most popular "
            f"expert, and {least:.0%} the least popular one. This command runs all prompts:"
        ),
        f"{_INDENT}  {program()} profile {shown(model)} \\",
        f"{_INDENT}    --data {shown(data)} -o profiles/demo",
    ]


def plan_lines(plan: Plan) -> list[str]:
    """Say whether moving experts out pays and why, money first."""
    gpu, traffic = plan.baselines.get(BaselineName.GPU), plan.break_even_traffic
    on_gpu = ""
    if gpu and gpu.usd_per_hour is not None:
        month = dollars(gpu.usd_per_hour * gpu.instances * HOURS_PER_MONTH)
        pays = f", which pays above {traffic.requests_per_hour:,.0f} requests an hour" if traffic else ""
        on_gpu = f"The whole model on a GPU ({bought(gpu.spec, gpu.instances)}) costs {month} a month{pays}. "
    length = f"{plan.workload.n_in:.0f} prompt tokens and {plan.workload.n_out + 1:.0f} generated ones"
    return [
        *_filled(f"{_ANSWERS[plan.verdict]} {plan.reason}"),
        *_filled(f"{on_gpu}A request has {length}; it runs at this machine's speed and costs what AWS Lambda would charge."),
    ]


def forced_lines(plan: Plan, forced: Plan) -> list[str]:
    """Say what was forced out, and what that is predicted to cost in money and in time."""
    remote = sum(len(layer.remote) for layer in forced.layers)
    experts = forced.model.experts_per_layer * len(forced.layers)
    functions = sum(len(layer.parts) for layer in forced.layers)
    times = forced.cost_usd_per_request / plan.cost_usd_per_request
    return _filled(
        f"{remote} of the {experts} experts, in each layer the least used ones, run in {functions} functions. Predicted: "
        f"{price(forced.cost_usd_per_request, forced.workload)}, which is {times:.1f} times the plan's cost, and "
        f"{forced.tpot_s * 1e3:.0f} ms instead of {plan.tpot_s * 1e3:.0f} ms for each token after the first (TPOT)."
    )


def accuracy_lines(measured_s: float | None, predicted_s: float | None) -> list[str]:
    """Say so where the predicted time per further token is off by more than WITHIN, and why it may be."""
    if measured_s is None or predicted_s is None or abs(predicted_s / measured_s - 1) <= WITHIN:
        return []
    return _filled(
        f"The predicted time per further token is {predicted_s / measured_s:.1f} times the measured one. Was the machine busy with other "
        "work, now or while it was profiled? Predictions hold for a quiet one.",
        indent="",
    )


def commands(plan: Path) -> list[str]:
    """Return the commands that deploy, ask and remove the demo, for the user's shell and folder."""
    remoe = program()
    return [
        f"{remoe} deploy {shown(plan)} --name demo",
        f"{remoe} infer demo --prompt 'What is the capital of Japan?'",
        f"{remoe} destroy demo",
    ]


def program() -> str:
    """Return what runs this remoe in the user's shell: `remoe` if the shell finds it, else its path."""
    script = Path(sys.executable).with_name("remoe")
    found = shutil.which("remoe")
    if found is not None and script.exists() and Path(found).samefile(script):
        return "remoe"
    return shown(script) if script.exists() else f"{shown(Path(sys.executable))} -m remoe_cli"


def shown(path: Path) -> str:
    """Shorten a path for the user's shell: from this folder, from the home folder, or whole."""
    here, home = Path.cwd(), Path(os.path.expanduser("~"))
    path = Path(os.path.abspath(path))
    if path.is_relative_to(here):
        return shlex.quote(str(path.relative_to(here)))
    if path.is_relative_to(home):
        return f"~/{shlex.quote(str(path.relative_to(home)))}"
    return shlex.quote(str(path))


def _filled(text: str, indent: str = _INDENT) -> list[str]:
    return textwrap.wrap(text, min(_WIDTH, output.width()), initial_indent=indent, subsequent_indent=indent)

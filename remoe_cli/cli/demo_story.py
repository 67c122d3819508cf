"""What `remoe demo` tells at each of its steps, in lines of at most 100 columns. cli/demo.py does the steps."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from remoe_cli.plan.document import BaselineName
from remoe_cli.plan.wording import bought, per_million

if TYPE_CHECKING:
    from remoe_cli.model.spec import MoeSpec
    from remoe_cli.plan.document import Plan
    from remoe_cli.profile.record import Profile

_INDENT = "    "
_WIDTH = 100
_ANSWERS = {
    "recommended": "Yes: it is recommended.",
    "not-recommended": "No: it is not recommended.",
    "insufficient-evidence": "That cannot be told yet.",
}


def model_lines(spec: MoeSpec) -> list[str]:
    """Say what a mixture-of-experts model is, with the demo's as the example."""
    experts = spec.experts_per_layer * len(spec.moe_layers)
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
    gpu = plan.baselines.get(BaselineName.GPU)
    on_gpu = (
        f"The whole model on a GPU ({bought(gpu.spec, gpu.instances)}) would cost {per_million(gpu.cost_usd_per_request)} requests. "
        if gpu
        else ""
    )
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
        f"{per_million(forced.cost_usd_per_request)} requests, which is {times:.1f} times the plan's cost, and "
        f"{forced.tpot_s * 1e3:.0f} ms instead of {plan.tpot_s * 1e3:.0f} ms for each token after the first (TPOT)."
    )


def commands(plan: Path) -> list[str]:
    """The commands that deploy the demo again, ask it and remove it, for the shell and folder in which `remoe demo` runs."""
    remoe = program()
    return [
        f"{remoe} deploy {shown(plan)} --name demo",
        f"{remoe} infer demo --prompt 'Write a haiku about rivers.'",
        f"{remoe} destroy demo",
    ]


def program() -> str:
    """Return what runs this very remoe in the user's shell: `remoe` where the shell finds it, else its path."""
    script = Path(sys.executable).with_name("remoe")
    found = shutil.which("remoe")
    if found is not None and script.exists() and Path(found).samefile(script):
        return "remoe"
    return shown(script) if script.exists() else f"{shown(Path(sys.executable))} -m remoe_cli"


def shown(path: Path) -> str:
    """Write a path briefly, so that the user's shell understands it: from this folder, from the home folder, or whole."""
    here, home = Path.cwd(), Path(os.path.expanduser("~"))
    path = Path(os.path.abspath(path))
    if path.is_relative_to(here):
        return shlex.quote(str(path.relative_to(here)))
    if path.is_relative_to(home):
        return f"~/{shlex.quote(str(path.relative_to(home)))}"
    return shlex.quote(str(path))


def _filled(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)

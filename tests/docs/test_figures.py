"""Figures and lists that the documentation takes from the code are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import transformers
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from remoe_cli.plan.assess.verdict import MIN_TRACE_TOKENS
from remoe_cli.plan.paper.bound import place
from tests.support.families import FAMILIES
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROFILES = (ROOT / "docs/explanation/profiles.md").read_text(encoding="utf-8")


def families() -> tuple[set[str], set[str]]:
    """Of transformers' families that generate text: those whose experts go through its interface, and the other ones with experts."""
    served, others = set(), set()
    for name in {model_type_to_module_name(kind) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}:
        folder = Path(transformers.__file__).parent / "models" / name
        code = "".join(file.read_text(encoding="utf-8") for file in folder.glob("modeling_*.py"))
        if "@use_experts_implementation" in code:
            served.add(name)
        elif re.search(r"class \w*(?:Experts|MoE|MoeMLP)\(", code):
            others.add(name)
    return served, others


def names(text: str) -> list[str]:
    return re.findall(r"\w+", text.replace(" and ", ", "))


def test_the_readme_counts_the_families_that_work() -> None:
    served, others = families()
    assert f"{len(served)} of the {len(served) + len(others)} mixture-of-experts families" in README
    not_working = re.search(r"\. ([\w, ]+) do(?:es)? not work\.", README)
    assert not_working and names(not_working[1]) == sorted(others - {"dbrx", "jetmoe", "llama4", "longcat_flash"})  # which have adapters


def test_the_readme_names_the_families_that_are_tested() -> None:
    tested = re.search(r"(\d+) of them are tested in every way: (.*?)\.", README, re.DOTALL)
    assert tested and int(tested[1]) == len(FAMILIES) and names(tested[2]) == sorted(FAMILIES)


def test_how_many_prompts_are_enough_is_what_the_code_does() -> None:
    assert f"A plan needs {MIN_TRACE_TOKENS} traced decode tokens" in PROFILES
    calibrated = re.search(r"From (\d+) prompts on, the worst-case bound", PROFILES)
    never = re.search(r"with fewer than (\d+) not at all", PROFILES)
    assert calibrated and never
    enough, least = int(calibrated[1]), int(never[1])
    assert place(least - 1) is None and place(least) == least  # the largest score: no confidence yet
    assert 0.95**enough <= 0.1 < 0.95 ** (enough - 1)  # below, even the largest score misses 95% too often

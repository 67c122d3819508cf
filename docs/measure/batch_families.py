"""Which families answer in a batch what they answer alone: transformers' continuous batching, and remoe's (ADR 12 and 14).

    python docs/measure/batch_families.py

Tiny random models in float32. Four prompts of different lengths get 12 greedy tokens each. In remoe's batch they join at different
steps, and prompts are read in parts of 9 tokens. In the last column passes also try drafts of up to 6 tokens, half of them wrong.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

sys.path.insert(0, str(Path(__file__).parents[2]))
from remoe_cli.model import draft
from remoe_cli.runtime import batch
from tests.support.batching import PROMPTS, Asked, engine_of, guesses, together
from tests.support.families import FAMILIES, build

TOKENS = 12


def main() -> None:
    logging.disable(logging.CRITICAL)
    batch.PROMPT_PART_TOKENS = 9
    print(f"{'family':<18}{'transformers, sdpa':<24}{'transformers, eager':<24}{'remoe':<16}remoe, drafts")
    for family in FAMILIES:
        engine = engine_of(family)
        answers = [engine.generate(prompt, TOKENS) for prompt in PROMPTS]
        alone = [list(each.token_ids) for each in answers]
        theirs = [_theirs(family, attention, alone) for attention in ("sdpa", "eager")]
        ours, drafts = "one at a time", "none"
        if engine.batches:
            asked = [Asked(3 * n, prompt, TOKENS) for n, prompt in enumerate(PROMPTS)]
            ours = _same([list(each.stream.ids) for each in together(engine, asked)], alone)
        if engine.drafts:
            draft.lookup = guesses(answers)
            made = together(engine, [replace(each, speculate=6) for each in asked])
            drafts = _same([list(each.stream.ids) for each in made], alone)
        print(f"{family:<18}{theirs[0]:<24}{theirs[1]:<24}{ours:<16}{drafts}", flush=True)


def _theirs(family: str, attention: str, alone: list[list[int]]) -> str:
    settings = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    blocks = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256, page_size=16)
    try:
        model: Any = build(family)
        model.set_attn_implementation(attention)
        made = model.generate_batch(PROMPTS, settings, blocks, auto_switch_to_flash=False)
    except Exception as error:
        return f"refused, {type(error).__name__}"
    answers = {tuple(each.prompt_ids): list(each.generated_tokens) for each in made.values()}
    return _same([answers[tuple(prompt)] for prompt in PROMPTS], alone)


def _same(answers: list[list[int]], alone: list[list[int]]) -> str:
    equal = sum(a == b for a, b in zip(answers, alone, strict=True))
    return "the same" if equal == len(alone) else f"{equal} of {len(alone)} the same"


if __name__ == "__main__":
    main()

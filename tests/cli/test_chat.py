"""`remoe chat` against a deployment on the twin: turns, commands, a system prompt; and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.local import target
from remoe_cli.deploy.target import DeployOptions
from remoe_cli.model.chat import Conversation
from remoe_cli.plan.document import LayerPlan
from remoe_cli.runtime import client
from remoe_cli.runtime.sampling import GREEDY, Sampling
from tests.support.by_hand import ByHand, by_hand, on_twin

HERE = target.LocalTarget(SILENT)
LAYERS = (LayerPlan(layer=0, remote=(1, 2, 3), memory_mb=1769, replicas=1),)
CHAT = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ByHand]:
    folder = tmp_path_factory.mktemp("deployed")
    with pytest.MonkeyPatch.context() as patch, on_twin(by_hand(folder, LAYERS, {"chat_template.jinja": CHAT}), folder, patch) as deployed:
        HERE.deploy(deployed.plan_path, "d", DeployOptions())
        yield deployed


def remoe(*arguments: str, typed: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "remoe_cli", *arguments]
    return subprocess.run(command, input=typed, capture_output=True, text=True, check=False, timeout=120, **more)


def answered(*texts: str, sampling: Sampling = GREEDY) -> str:
    """What the deployment answers to a conversation: a system prompt or none, then user and assistant in turn."""
    roles = ("user", "assistant") * len(texts)
    messages = tuple({"role": role, "content": text} for role, text in zip(roles, texts, strict=False))
    return str(client.answer(HERE.main_address("d"), Conversation(messages), 6, lambda text: None, sampling=sampling)["text"])


def test_turns_commands_and_a_new_beginning(made: ByHand) -> None:
    first = answered("w1 w2")
    second = answered("w1 w2", first, "w3")
    assert second != answered("w3") != first
    typed = "w1 w2\n\nw3\n/receipt\n/reset\n/receipt\nw3\n/what\n/exit\nw9\n"
    done = remoe("chat", "d", "--max-new-tokens", "6", typed=typed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [first, second]
    assert "15 prompt tokens" not in done.stdout and "9 prompt tokens, 6 generated tokens" in done.stdout  # 2, 6 and 1
    assert done.stdout.splitlines()[-1] == answered("w3")
    for sentence in ("The conversation begins again.", "There is no answer yet.", "/what is no command."):
        assert sentence in done.stderr


def test_a_system_prompt_and_sampling_are_sent(made: ByHand) -> None:
    options = ("--max-new-tokens", "6", "--system", "w7", "--temperature", "1.5", "--seed", "3", "--quiet")
    done = remoe("chat", "d", *options, typed="w1\n")
    with_system = Conversation(({"role": "system", "content": "w7"}, {"role": "user", "content": "w1"}))
    sampling = Sampling(temperature=1.5, seed=3)
    asked = client.answer(HERE.main_address("d"), with_system, 6, lambda text: None, sampling=sampling)
    assert done.stdout == asked["text"] + "\n" and done.stderr == "" and len(asked["prompt_token_ids"]) == 2
    infer = remoe("infer", "d", *options, "--json", "--prompt", "w1", typed="")
    assert f'"text":"{asked["text"]}"' in infer.stdout.replace('": "', '":"')
    stopped = remoe("infer", "d", "--max-new-tokens", "6", "--stop", answered("w1").split()[2], "--json", "--prompt", "-", typed="w1")
    assert '"finish_reason":"stop"' in stopped.stdout.replace('": "', '":"')


def test_messages_of_a_file_are_one_conversation(made: ByHand, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    roles = zip(("user", "assistant", "user"), ("w1 w2", "w4", "w3"), strict=True)
    file.write_text(json.dumps({"messages": [{"role": role, "content": content} for role, content in roles]}))
    done = remoe("infer", "d", "--messages", str(file), "--max-new-tokens", "6", "--json", typed="")
    assert f'"text":"{answered("w1 w2", "w4", "w3")}"' in done.stdout.replace('": "', '":"')
    piped = remoe("infer", "d", "--messages", "-", "--max-new-tokens", "6", "--json", typed=file.read_text())
    assert piped.stdout.partition('"receipt"')[0] == done.stdout.partition('"receipt"')[0]
    file.write_text(f"{file.read_text()}\n{file.read_text()}")
    several = remoe("infer", "d", "--messages", str(file), typed="")
    assert several.returncode == 2 and "holds 2 conversations, not one" in several.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--top-p", "0"), "--top-p is wrong"),
        (("--temperature", "nan"), "--temperature"),
        (("--stop", ""), "--stop is wrong"),
        (("--seed", "99999999999999999999"), "--seed"),
    ],
)
def test_options_that_are_wrong_are_named(options: tuple[str, ...], sentence: str) -> None:
    done = remoe("chat", "d", *options, typed="")
    assert (done.returncode, done.stdout) == (2, "") and sentence in done.stderr


def test_a_piped_message_that_fails_ends_the_command(made: ByHand) -> None:
    done = remoe("chat", "d", "--max-new-tokens", "600", typed="w1\nw2\n")
    assert done.returncode == 2 and "exceed the model's 512 positions" in done.stderr


def test_on_a_terminal_a_message_that_fails_is_taken_back(made: ByHand) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "remoe_cli", "chat", "d", "--max-new-tokens", "6"]
    with (
        subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "dumb"}) as process,
        ExitStack() as stack,
    ):
        os.close(theirs)
        seen = b""

        def until(text: str) -> str:
            """Read up to a text; what came with it is left for the next call."""
            nonlocal seen
            while text.encode() not in seen:
                ready, _, _ = select.select([ours], [], [], 60)
                assert ready, f"no {text!r} came in 60 s, only {seen!r}"
                seen += os.read(ours, 4096)
            before, found, seen = seen.partition(text.encode())
            return (before + found).decode()

        stack.callback(process.kill)  # a failure must not wait for it
        until("> ")
        os.write(ours, b"w1 " * 510 + b"\n")
        until("exceed the model's 512 positions")
        until("> ")
        os.write(ours, b"w1 w2\n")
        assert answered("w1 w2") in until("\n> ").replace("\r", "")
        os.write(ours, b"\x1b[A\n")  # the arrow up brings the message back
        until("w1 w2")
        until("\n> ")
        os.write(ours, b"/exit\n")
        assert process.wait(30) == 0
    os.close(ours)

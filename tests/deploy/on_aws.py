"""`make test-aws`: the contract of both targets (tests/deploy/test_contract.py), on the AWS account that the environment names.

Says first what it costs, and asks. Whatever happens, it destroys what it made and says what is left. With AWS_ENDPOINT_URL set to moto's
server it shows itself at work as far as moto goes.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from remoe_cli.deploy.aws import session
from remoe_cli.errors import ArtifactError, RemoeError
from remoe_cli.model.demo import demo_model
from remoe_cli.profile.record import read_profile
from remoe_cli.settings import cache_dir
from tests.support.paths import ROOT

REQUESTS = 2  # of the contract, with room to spare
HOURS_PER_MONTH = 730


def remoe(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "remoe_cli", *arguments], stdout=subprocess.PIPE, text=True, check=False)


def make_plan() -> Path:
    """The demo model with a quarter of its experts in functions, at AWS's prices."""
    folder = cache_dir() / "test-aws"
    try:
        read_profile(folder / "profile")
    except ArtifactError:  # none yet, or of an earlier remoe
        data = ROOT / "remoe_cli" / "demo_data" / "prompts.jsonl"
        options = ("--data", str(data), "--limit", "32", "--max-new-tokens", "16", "-o", str(folder / "profile"), "--yes")
        remoe("profile", str(demo_model("float32")), *options).check_returncode()
    plan = folder / "plan.json"
    options = ("--catalog", "aws-us-east-1", "--remote-share", "0.25", "-o", str(plan))
    remoe("plan", str(folder / "profile"), *options, "--yes", "--quiet", "--json").check_returncode()
    return plan


def estimate_usd(plan: Path, name: str) -> float:
    """An hour at rest, and the requests."""
    run = remoe("deploy", str(plan), "--name", name, "--target", "aws", "--endpoint", "none", "--dry-run", "--json")
    run.check_returncode()
    cost: dict[str, Any] = json.loads(run.stdout)["cost"]
    request_usd = cost["usd_per_request"] + cost["beside_usd_per_request"]
    return float(REQUESTS * request_usd + cost["idle_usd_per_month"] / HOURS_PER_MONTH)


def main() -> int:
    try:
        account = session.connect()
    except RemoeError as error:
        print(f"error: {error.message}\n  hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    name, plan = f"test-{secrets.token_hex(3)}", make_plan()
    print(f"This deploys '{name}' to account {account.id}, {account.region}, as {account.caller}, asks it, and destroys it.")
    print(f"That costs about ${estimate_usd(plan, name):.4f} at list prices. If this is killed: remoe destroy {name} --target aws")
    if "--yes" not in sys.argv and input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        return 1
    os.environ |= {"REMOE_TEST_NAME": name, "REMOE_TEST_PLAN": str(plan), "AWS_REGION": account.region}
    try:
        # In this process: a signal that ends it then ends the command that the test is waiting for, too.
        return int(pytest.main(["-p", "no:cacheprovider", "-v", "tests/deploy/test_contract.py"]))
    finally:
        for target in (("--target", "aws", "--yes"), ("--target", "local")):
            gone = remoe("destroy", name, *target, "--json")
            print(gone.stdout.strip() if '"absent"' not in gone.stdout else f"Nothing is left of {name} {' '.join(target[:2])}.")


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    sys.exit(main())

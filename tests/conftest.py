"""Settings for all tests, before anything heavy is imported."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from remoe_cli.deploy.aws.session import Account

# Tiny models gain nothing from threads, and spinning ones starve the worker processes that run beside them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# No test may reach for a hub, whatever the machine allows.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor may it read the settings of whoever runs it.
os.environ["REMOE_CONFIG_DIR"] = "/nonexistent"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

# Shells start what they put in the background with SIGINT ignored, and all processes inherit that: then no test could interrupt any.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from remoe_cli import cages
from tests.support.sample import sampled


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", action="store_true", help="leave out tests of each night, and three in four cases of a sweep")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("sample"):
        taken = dict.fromkeys(sampled(items))
        config.hook.pytest_deselected(items=[item for item in items if item not in taken])
        items[:] = taken


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Spare the garbage collector what the tests import, of which nothing is ever garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def probed() -> Iterator[cages.Mechanism]:
    """The best limits that this machine has; at the end none of their groups may be left."""
    mechanism = cages.probe(f"remoe-test-{os.getpid()}")
    yield mechanism
    for group in mechanism.groups:
        assert not [entry for entry in group.iterdir() if entry.is_dir()], "a worker's group was left behind"
        assert cages.remove(group)


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    """One moto server for all tests that want one; they tell their deployments apart by name."""
    from tests.support import aws_account as aws

    with aws.moto() as url:
        yield url


@pytest.fixture(scope="module")
def calls() -> list[str]:
    """Names of what `account` calls, as it calls them."""
    return []


@pytest.fixture(scope="module")
def account(moto_url: str, calls: list[str]) -> Iterator[Account]:
    """An account at moto's server."""
    from tests.support import aws_account as aws

    with pytest.MonkeyPatch.context() as patch:
        aws.use(patch, moto_url)
        yield aws.connect(calls.append)


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Notes a figure that a test measured; all of them are printed at the end of the run."""
    return lambda figure: request.node.user_properties.append(("measured", f"{request.node.name}: {figure}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # From the reports, which reach this process from whichever process ran the test.
    reports = [report for some in terminalreporter.stats.values() for report in some if getattr(report, "when", None) == "call"]
    lines = [figure for report in reports for name, figure in report.user_properties if name == "measured"]
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)

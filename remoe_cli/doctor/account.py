"""The AWS account that the credentials belong to.

AWS is asked who calls, and Lambda what the account may run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from remoe_cli.doctor.finding import Finding, tried
from remoe_cli.units import size

if TYPE_CHECKING:
    from remoe_cli.deploy.aws.session import Account

_USUAL_CONCURRENCY = 1000


def findings(region: str | None, profile: str | None) -> Iterator[Finding]:
    """Look at the account of the named region and AWS profile."""
    from remoe_cli.deploy.aws import session

    found: list[Account] = []

    def credentials() -> Finding:
        found.append(account := session.connect(region, profile))
        return Finding(name="AWS credentials", ok=True, value=f"{account.caller} ({account.origin})")

    yield tried("AWS credentials", credentials)
    for account in found:
        yield Finding(name="AWS region", ok=True, value=account.region)
        yield tried("Lambda's limits", lambda account=account: _limits(account))  # type: ignore[misc]


def _limits(account: Account) -> Finding:
    from remoe_cli.deploy.aws import session

    with session.plain_errors(account.origin):
        limits = account.client("lambda").get_account_settings()["AccountLimit"]
    at_once = int(limits["ConcurrentExecutions"])
    hint = "" if at_once >= _USUAL_CONCURRENCY else "Many accounts have 1,000; ask for more 'Concurrent executions' in Service Quotas."
    value = f"{at_once:,} instances at once, {size(limits['TotalCodeSize'])} of code"
    return Finding(name="Lambda's limits", ok=True, value=value, hint=hint)

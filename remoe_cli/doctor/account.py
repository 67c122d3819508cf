"""The AWS account that the credentials belong to.

AWS is asked who calls, and Lambda what the account may run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from remoe_cli.doctor.finding import Finding

if TYPE_CHECKING:
    from remoe_cli.deploy.aws.session import Account

_USUAL_CONCURRENCY = 1000


def findings(region: str | None, profile: str | None) -> Iterator[Finding]:
    """Look at the account of the named region and AWS profile.

    Raises: what `session.connect` raises, before the first finding.
    """
    from remoe_cli.deploy.aws import session
    from remoe_cli.errors import RemoeError

    try:
        account = session.connect(region, profile)
    except RemoeError as error:
        yield Finding(name="AWS credentials", ok=False, value=error.message, hint=error.hint)
        return
    yield Finding(name="AWS credentials", ok=True, value=f"{account.caller} ({account.origin})")
    yield Finding(name="AWS region", ok=True, value=account.region)
    yield _concurrency(account)


def _concurrency(account: Account) -> Finding:
    from remoe_cli.deploy.aws import session
    from remoe_cli.errors import RemoeError

    try:
        with session.plain_errors(account.origin):
            limits = account.client("lambda").get_account_settings()["AccountLimit"]
    except RemoeError as error:
        return Finding(name="Lambda's limits", ok=False, value=error.message, hint=error.hint)
    at_once = int(limits["ConcurrentExecutions"])
    hint = "" if at_once >= _USUAL_CONCURRENCY else "Many accounts have 1,000; ask for more 'Concurrent executions' in Service Quotas."
    value = f"{at_once:,} instances at once, {limits['TotalCodeSize'] / 1e9:.0f} GB of code"
    return Finding(name="Lambda's limits", ok=True, value=value, hint=hint)

"""Delete from a deployment's bucket what earlier plans have left and nothing needs any more.

It works only while the stack is unchanged and no change is proposed. Then no rollback can need what the templates do not name, and
CloudFormation has deleted the versions of functions that did, which are resources of the stack. Whoever wants to change the stack makes a
change set before relying on any object (deployment.py), so while one waits, everything stays. What is newer than the stack's last operation
stays too: it may be the template of a change set that is not made yet. So does what remoe did not put there. A run that is interrupted
leaves the rest to the next.
"""

from __future__ import annotations

from collections.abc import Collection

from botocore.exceptions import BotoCoreError, ClientError

from remoe_cli.deploy.aws import names
from remoe_cli.deploy.aws.session import explained
from remoe_cli.deploy.aws.stack import Stack, StackState
from remoe_cli.deploy.aws.storage import Bucket
from remoe_cli.deploy.console import Console
from remoe_cli.errors import RemoeError
from remoe_cli.units import size

_AT_ONCE = 1000  # objects of one request


def tidy(stack: Stack, bucket: Bucket, state: StackState, needed: Collection[str], console: Console) -> int:
    """Delete all objects except the `needed` keys while the stack is as in `state`; return their bytes.

    It raises nothing that S3 or CloudFormation answers, as the deployment is complete; it says what stays.
    """
    ours = [each for each in bucket.stored() if names.is_key(each.key) and each.key != names.LOCK_KEY]
    left = sorted((each for each in ours if each.key not in needed and each.since < state.since), key=lambda each: each.key)
    if not left:
        return 0
    gone_bytes, why = 0, "somebody has proposed or made other changes, which may need it"
    try:
        with console.progress("Deleting what earlier plans left in the bucket"):
            while left and stack.is_unchanged(state):
                batch = left[:_AT_ONCE]
                bucket.delete([each.key for each in batch])
                gone_bytes += sum(each.size_bytes for each in batch)
                left = left[_AT_ONCE:]
    except (BotoCoreError, ClientError) as error:
        why = explained(error).message.rstrip(".")
    except RemoeError as error:
        why = error.message.rstrip(".")
    if gone_bytes:
        console.say(f"Deleted from the bucket what earlier plans left there: {size(gone_bytes)}.")
    if left:
        console.say(f"{size(sum(each.size_bytes for each in left))} of other plans stay in the bucket: {why}.")
    return gone_bytes

"""Every name that a deployment has on AWS. Pure: names depend on its name and on digests only."""

from __future__ import annotations

import re

from remoe_cli.errors import UsageError

# The bucket's name has 63 characters, with account and region in it; a function's 64, with the entry.
NAME_FORM = r"[a-z0-9](?:[a-z0-9-]{0,22}[a-z0-9])?"
ALIAS = "live"
DEPLOYMENT_TAG, PLAN_TAG = "remoe:deployment", "remoe:plan"
ACCOUNT, REGION = "${AWS::AccountId}", "${AWS::Region}"  # CloudFormation's pseudo parameters
LOCK_KEY = "remoe-lock.json"  # says who changes or destroys the deployment at this moment (lock.py)


def check_name(name: str) -> str:
    """Return `name` if a deployment on AWS can have it.

    Raises: UsageError for any other name.
    """
    if not re.fullmatch(NAME_FORM, name):
        raise UsageError(
            f"{name!r} cannot be the name of a deployment on AWS.",
            "Use lower-case letters, digits and hyphens, 24 at most, no hyphen at either end: --name NAME.",
        )
    return name


def tag_value(text: str) -> str:
    """Replace the characters that a tag's value cannot have.

    >>> tag_value("arn:aws:iam::1:user/me on host (tmp)")
    'arn:aws:iam::1:user/me on host _tmp_'
    """
    return re.sub(r"[^A-Za-z0-9 +\-=._:/@]", "_", text)[:256]


def stack(name: str) -> str:
    return f"remoe-{name}"


def bucket(name: str, account: str, region: str) -> str:
    return f"remoe-{name}-{account}-{region}"


def prefix(name: str, own_bucket: str | None) -> str:
    """Return what all keys begin with: in a bucket of the user's other things may be."""
    return f"remoe/{name}/" if own_bucket else ""


def function(name: str, entry: str) -> str:
    """Name the expert function of a bundle entry. Callers add the alias (`invoked`)."""
    return f"{name}-{entry}"


def main(name: str) -> str:
    """Name the main function, or the SageMaker endpoint."""
    return f"{name}-main"


def invoked(function_name: str) -> str:
    """Name what an invocation calls: the function's alias."""
    return f"{function_name}:{ALIAS}"


def log_group(function_name: str) -> str:
    return f"/aws/lambda/{function_name}"


def endpoint_log_group(name: str) -> str:
    """Name the log group to which SageMaker writes what the main function prints."""
    return f"/aws/sagemaker/Endpoints/{main(name)}"


def logical_id(entry: str) -> str:
    """Name an entry's function in a template; its role, log group, version and alias add a word.

    >>> logical_id("layer-003"), logical_id("layer-003-1")
    ('Layer003', 'Layer003Part1')
    """
    _, layer, *part = entry.split("-")
    return f"Layer{layer}" + "".join(f"Part{number}" for number in part)


# Keys in the bucket. Each says the digest of what it names, so what is there need not be sent again.


def code_key(sha256: str) -> str:
    return f"code/{sha256}.zip"


def shard_key(entry: str, sha256: str) -> str:
    return f"functions/{entry}/{sha256}.safetensors"


MAIN_FOLDER = "main/"


def main_manifest_key(sha256: str) -> str:
    return f"{MAIN_FOLDER}{sha256}.json"


def main_file_key(sha256: str, file_name: str) -> str:
    return f"{MAIN_FOLDER}{sha256}/{file_name}"


def template_key(sha256: str) -> str:
    return f"templates/{sha256}.json"


_KEY = re.compile(
    r"code/\w{64}\.zip|functions/[^/]+/\w{64}\.safetensors|main/\w{64}(\.json|/[^/]+)|templates/\w{64}\.json|remoe-lock\.json"
)


def is_key(key: str) -> bool:
    """Return whether a key is one of those above.

    remoe did not write objects with other keys, and does not delete them.

    >>> is_key(code_key("0" * 64)), is_key(shard_key("layer-003", "0" * 64)), is_key("thesis.tex")
    (True, True, False)
    """
    return _KEY.fullmatch(key) is not None

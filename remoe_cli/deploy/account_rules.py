"""What a company's AWS account demands of everything that is made in it. Pure.

A deployment keeps its rules in its stack's template (`RECORD`), so that a later deploy or destroy needs no option again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from remoe_cli.errors import UsageError

RECORD = "remoe"  # of the template's Metadata
NONE = "none"  # what takes an earlier rule away
NO_TAGS = (("", NONE),)  # the same of all tags: no tag has an empty key
_MOST_TAGS, _MOST_SUBNETS, _MOST_GROUPS = 45, 16, 5
_TAG_TEXT = re.compile(r"[\w .:/=+\-@]*", re.UNICODE)


@dataclass(frozen=True)
class AccountRules:
    """The rules of one deployment.

    permissions_boundary   ARN of the policy that bounds each role
    role_path              path of each role and policy, such as /teams/ml/
    kms_key                ARN of the key that encrypts objects, logs and environment variables
    bucket                 a bucket of the user's, in place of one that remoe makes
    tags                   on everything that can have tags
    subnets                with `security_groups`: where functions and the endpoint get their network
    """

    permissions_boundary: str | None = None
    role_path: str | None = None
    kms_key: str | None = None
    bucket: str | None = None
    tags: tuple[tuple[str, str], ...] = ()
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()

    @property
    def document(self) -> dict[str, Any]:
        """Return the rules that are set, as the template records them."""
        return {name: [list(each) if isinstance(each, tuple) else each for each in value] if isinstance(value, tuple) else value
                for name, value in asdict(self).items() if value}  # fmt: skip

    def over(self, recorded: AccountRules) -> AccountRules:
        """Return these rules, and of the recorded ones those that are not given; `none` takes one away."""
        merged: dict[str, Any] = {}
        for each in fields(self):
            given = getattr(self, each.name)
            value = given or getattr(recorded, each.name)
            merged[each.name] = each.default if given in (NONE, (NONE,), NO_TAGS) else value
        rules = AccountRules(**merged)
        _check_vpc(rules)
        return rules


def recorded_in(template: Mapping[str, Any]) -> AccountRules:
    """Read the rules that a deployed template records; none where it is of an earlier version of remoe."""
    document = template.get("Metadata", {}).get(RECORD, {})
    known = {each.name for each in fields(AccountRules)}
    values: dict[str, Any] = {
        name: tuple(tuple(each) if isinstance(each, list) else each for each in value) if isinstance(value, list) else value
        for name, value in document.items()
        if name in known
    }
    return AccountRules(**values)


_FORMS = {
    "permissions_boundary": (
        r"arn:aws[a-z-]*:iam::(?:\d{12}|aws):policy/[\w+=,.@/-]{1,512}",
        "is no ARN of an IAM policy",
        "Write it as arn:aws:iam::ACCOUNT:policy/NAME.",
    ),
    "role_path": (r"/|/[!-.0-~]+(?:/[!-.0-~]+)*/", "is no path of IAM", "Begin and end it with a slash, such as /teams/ml/."),
    "kms_key": (
        r"arn:aws[a-z-]*:kms:[a-z0-9-]+:\d{12}:key/[\w-]{1,128}",
        "is no ARN of a KMS key",
        "'aws kms describe-key --key-id alias/NAME --query KeyMetadata.Arn' prints it; roles cannot name a key by an alias.",
    ),
    "bucket": (
        r"(?!xn--)[a-z0-9][a-z0-9-]{1,61}[a-z0-9]",
        "is no name of a bucket that can be used here",
        "Give the name alone, of 3 to 63 lower-case letters, digits and hyphens, without s3://. A dot in it has no certificate.",
    ),
}


def account_rules(
    permissions_boundary: str | None = None,
    role_path: str | None = None,
    kms_key: str | None = None,
    bucket: str | None = None,
    tags: Sequence[str] = (),
    subnets: Sequence[str] = (),
    security_groups: Sequence[str] = (),
) -> AccountRules:
    """Check what the options say, each by itself.

    Raises: UsageError for the first value that AWS would refuse.
    """
    given = {"permissions_boundary": permissions_boundary, "role_path": role_path, "kms_key": kms_key, "bucket": bucket}
    for name, value in given.items():
        form, wrong, hint = _FORMS[name]
        too_long = name == "role_path" and len(value or "") > 512
        if value is not None and value != NONE and (too_long or not re.fullmatch(form, value)):
            raise UsageError(f"--{name.replace('_', '-')} {value!r} {wrong}.", hint)
    _check_ids("subnet", subnets, "subnet-", _MOST_SUBNETS)
    _check_ids("security-group", security_groups, "sg-", _MOST_GROUPS)
    return AccountRules(**given, tags=_tags(tags), subnets=tuple(subnets), security_groups=tuple(security_groups))


def _check_ids(option: str, ids: Sequence[str], start: str, most: int) -> None:
    if tuple(ids) == (NONE,):
        return
    for each in ids:
        if not re.fullmatch(rf"{start}[0-9a-f]{{8,17}}", each):
            raise UsageError(f"--{option} {each!r} is no id of a {option.replace('-', ' ')}.", f"Write it as {start}0123456789abcdef0.")
    if len(set(ids)) < len(ids):
        raise UsageError(f"--{option} names one twice.", "Name each once.")
    if len(ids) > most:
        raise UsageError(f"--{option} is given {len(ids)} times; AWS takes {most} at most.", "Choose fewer.")


def _check_vpc(rules: AccountRules) -> None:
    """Refuse one half of a VPC.

    Raises: UsageError for it.
    """
    if bool(rules.subnets) != bool(rules.security_groups):
        given, missing = ("--subnet", "--security-group") if rules.subnets else ("--security-group", "--subnet")
        raise UsageError(f"{given} needs {missing} too: a VPC is both.", "Give both, or neither.")


def _tags(given: Sequence[str]) -> tuple[tuple[str, str], ...]:
    if tuple(given) == (NONE,):
        return NO_TAGS
    tags: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--tag {text!r} is not KEY=VALUE.", "Write it as --tag team=ml.")
        if not _TAG_TEXT.fullmatch(text) or len(key) > 128 or len(value) > 256:
            hint = "AWS takes letters, digits, spaces and . : / = + - @ _ only, 128 for the key and 256 for the value at most."
            raise UsageError(f"--tag {text!r} has characters or a length that no tag can have.", hint)
        if key.lower().startswith(("aws:", "remoe:")):
            raise UsageError(f"--tag {text!r}: tags that begin with aws: and remoe: are not yours to give.", "Choose another key.")
        if key in tags:
            raise UsageError(f"--tag gives '{key}' twice.", "Give each key once.")
        tags[key] = value
    if len(tags) > _MOST_TAGS:
        raise UsageError(f"There are {len(tags)} tags; a resource can have {_MOST_TAGS} of yours.", "Give fewer.")
    return tuple(sorted(tags.items()))

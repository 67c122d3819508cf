"""Asking a deployment's main function, or running it here: where it is, and what it was told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import boto3
from botocore.config import Config

from remoe_cli import artifacts
from remoe_cli.deploy.aws import names, status
from remoe_cli.deploy.aws.functions import plan_sha256
from remoe_cli.deploy.aws.session import Account, plain_errors
from remoe_cli.deploy.aws.storage import Bucket
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.errors import ArtifactError, DeployError
from remoe_cli.package.partial_checkpoint import MainManifest
from remoe_cli.plan.document import Plan
from remoe_cli.runtime import client
from remoe_cli.settings import cache_dir

# An answer takes as long as it takes, and is paid for: it is waited for, and not asked for again.
_ANSWER = Config(connect_timeout=10, read_timeout=910, retries={"mode": "standard", "total_max_attempts": 1})


def reach(account: Account, name: str) -> client.MainAddress:
    """Raises DeployError for an unknown deployment, and for one of functions only."""
    kind = status.stack_state(account, name).outputs.get("EndpointKind")
    with plain_errors():
        match kind:
            case Endpoint.aws_lambda:
                return client.LambdaMain(names.invoked(names.main(name)), account.session.client("lambda", config=_ANSWER))
            case Endpoint.sagemaker:
                return client.SageMaker(names.main(name), account.session.client("sagemaker-runtime", config=_ANSWER))
    raise DeployError(f"'{name}' has functions only.", f"Run its main function on this machine: 'remoe serve {name} --target aws'.")


def deployed_file(account: Account, name: str, file_name: str) -> Path:
    """A copy of one of the files that the main function was given beside its weights, server.json or plan.json: those of the plan that
    the stack was made of, which is the one that `status` names.

    Raises DeployError for an unknown deployment, ArtifactError when its bucket has no such file.
    """
    planned = status.stack_state(account, name).outputs.get("Plan")
    bucket = Bucket(account, names.bucket(name, account.id, account.region))
    with plain_errors():
        for manifest in bucket.keys(names.MAIN_FOLDER):
            files = {file.name: file for file in MainManifest.model_validate_json(bucket.read(manifest)).files}
            plan = bucket.read(names.main_file_key(files["plan.json"].sha256, "plan.json"))
            if plan_sha256(Plan.model_validate_json(plan)) == planned:
                path = cache_dir() / "deployed" / f"{files[file_name].sha256}.json"
                with artifacts.atomic_path(path) as temporary:
                    temporary.write_bytes(bucket.read(names.main_file_key(files[file_name].sha256, file_name)))
                return path
    raise ArtifactError(f"The bucket {bucket.name} has no {file_name} of the plan that is deployed.", "Deploy the plan again.")


def serve(account: Account, name: str, host: str, port: int, say: Callable[[str], None]) -> None:
    """Run the main function of a deployment in this process until it is interrupted, from the model's own checkpoint; it calls the
    functions with this account's credentials. Raises what `deployed_file`, runtime/main_function.py and runtime/server.py raise."""
    from remoe_cli.runtime.server import serve_here

    server_json = deployed_file(account, name, "server.json")
    # What runtime/invoke.py makes its client of.
    boto3.DEFAULT_SESSION, os.environ["AWS_REGION"] = account.session, account.region
    serve_here(name, server_json, None, host, port, say)

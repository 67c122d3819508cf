"""An AWS deployment's main function: its address, its files, and running it on this machine."""

from __future__ import annotations

from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from botocore.config import Config

from remoe_cli import owned, recognise
from remoe_cli.artifacts import parse_document
from remoe_cli.deploy.account_rules import recorded_in
from remoe_cli.deploy.aws import names, status
from remoe_cli.deploy.aws.credentials import open_session
from remoe_cli.deploy.aws.functions import plan_sha256
from remoe_cli.deploy.aws.session import Account, plain_errors
from remoe_cli.deploy.aws.stack import Stack
from remoe_cli.deploy.aws.storage import Bucket
from remoe_cli.deploy.console import Console
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.deploy.serve_here import serve_here
from remoe_cli.deploy.target import SERVE_PLAINLY, ServeOptions
from remoe_cli.errors import ArtifactError, DeployError
from remoe_cli.lambda_limits import MAX_TIMEOUT_S, read_timeout_s
from remoe_cli.package.partial_checkpoint import MainManifest
from remoe_cli.plan.document import Plan
from remoe_cli.runtime import client
from remoe_cli.runtime.invoke import Connect, make_caller
from remoe_cli.runtime.kept import Book, book_of
from remoe_cli.settings import cache_dir

# An answer may take as long as a function may run, and it is paid for: it is waited for, and not asked for again.
_ANSWER = Config(connect_timeout=10, read_timeout=read_timeout_s(MAX_TIMEOUT_S), retries={"mode": "standard", "total_max_attempts": 1})


def main_address(account: Account, name: str) -> client.MainAddress:
    """Return where the main function takes requests.

    Raises: DeployError for an unknown deployment, and for one of functions only.
    """
    kind = status.stack_state(account, name).outputs.get("EndpointKind")
    book = receipts(account, name)
    with plain_errors(account.origin):
        match kind:
            case Endpoint.aws_lambda:
                return client.LambdaMain(names.invoked(names.main(name)), account.session.client("lambda", config=_ANSWER), book=book)
            case Endpoint.lambda_gpu:
                invoked = names.invoked(names.main(name))
                return client.LambdaMain(invoked, account.session.client("lambda", config=_ANSWER), scales_to_zero=True, book=book)
            case Endpoint.sagemaker:
                return client.SageMaker(names.main(name), account.session.client("sagemaker-runtime", config=_ANSWER), book=book)
    raise DeployError(f"'{name}' has functions only.", f"Run its main function on this machine: 'remoe serve {name} --target aws'.")


def receipts(account: Account, name: str) -> Book:
    """Return the receipts that this machine keeps of a deployment, by account and region."""
    names.check_name(name)
    return book_of("aws", f"{account.id}-{account.region}", name)


def deployed_file(account: Account, name: str, file_name: str) -> Path:
    """Copy server.json or plan.json of the deployed plan from the bucket to the cache.

    The bucket may hold files of several plans. This returns the file of the plan that the stack was made of, which `status` names.

    Raises: DeployError for an unknown deployment, ArtifactError when its bucket has no such file.
    """
    state = status.stack_state(account, name)
    planned = state.outputs.get("Plan")
    with plain_errors(account.origin):
        bucket = Bucket.of(account, name, recorded_in(Stack(account, name).template(state)))
        for manifest in bucket.keys(names.MAIN_FOLDER):
            files = {file.name: file for file in parse_document(bucket.read(manifest), MainManifest, manifest).files}
            plan = bucket.read(names.main_file_key(files["plan.json"].sha256, "plan.json"))
            if plan_sha256(parse_document(plan, Plan, "plan.json")) == planned:
                path = cache_dir() / "deployed" / f"{files[file_name].sha256}.json"
                with owned.writing(path, recognise.document(f"remoe.{Path(file_name).stem}")) as temporary:
                    temporary.write_bytes(bucket.read(names.main_file_key(files[file_name].sha256, file_name)))
                return path
    raise ArtifactError(f"The bucket {bucket.name} has no {file_name} of the plan that is deployed.", "Deploy the plan again.")


def serve(account: Account, name: str, host: str, port: int, console: Console, asked: ServeOptions = SERVE_PLAINLY) -> None:
    """Run a deployment's main function in this process, from the model's checkpoint, until interrupted.

    It calls the expert functions with the credentials of `account`.

    Raises: what `deployed_file`, runtime/main_function.py and runtime/server.py raise.
    """
    with console.progress("Reading the deployed plan"):
        server_json = deployed_file(account, name, "server.json")
    from remoe_cli.runtime.last_resort import LastResort, aws_environment

    bucket = status.stack_state(account, name).outputs["Bucket"]
    last_resort = LastResort(f"s3://{bucket}", lambda: aws_environment(_reopened(account)))
    serve_here(name, server_json, _clients(account), host, port, console, asked, last_resort, book=receipts(account, name))


def _clients(account: Account) -> Connect:
    """Make clients of an account's expert functions.

    A second client has credentials that are read again, as after a new login.
    """
    sessions = chain([account.session], iter(partial(_reopened, account), None))
    return lambda connections, timeout_s: make_caller(None, connections, timeout_s, session=next(sessions))


def _reopened(account: Account) -> Any:
    return open_session(account.region, account.profile)[0]

"""`remoe package`: the files of a deployment, or the container image of its main function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.options import AcceptLossOption, ExpertForm, PlanArgument
from remoe_cli.cli.replacing import ReplaceOption, agree_to_replace
from remoe_cli.errors import UsageError
from remoe_cli.units import size

EXAMPLES = examples(
    "remoe package plans/olmoe.json -o olmoe-package",
    "remoe package plans/olmoe-int8.json --experts int8   # of a profile with --experts int8",
    "remoe package plans/olmoe.json --image --repository ACCOUNT.dkr.ecr.REGION.amazonaws.com/remoe",
)

_PACKAGE, _CONTEXT = "package", "image context"


def command(
    plan: PlanArgument,
    out: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Folder to write; by default the plan's name.")] = None,
    image: Annotated[bool, typer.Option("--image", help="Build the container image of the main function instead.")] = False,
    repository: Annotated[
        str | None,
        typer.Option(metavar="URI", help="With --image: push to this repository, such as ACCOUNT.dkr.ecr.REGION.amazonaws.com/remoe."),
    ] = None,
    experts: Annotated[
        ExpertForm | None, typer.Option(help="Check that the plan has expert functions' experts quantised to this form.")
    ] = None,
    accept_loss: AcceptLossOption = False,
    yes: ReplaceOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Write a deployment's files and show their sizes, or build the main function's image.

    The files are a bundle for each expert function, and the part of the model that the main function loads.
    """
    if repository is not None and not image:
        raise UsageError("--repository is for an image.", "Give --image too.")
    if image and (experts is not None or accept_loss):
        raise UsageError("--experts and --accept-loss are for the files of expert functions, not for an image.", "Leave them out.")
    folder = out or Path(f"{plan.stem}-{'image' if image else 'package'}")
    if image:
        _image(plan, folder, repository, yes)
    else:
        _files(plan, folder, yes, experts and experts.value, accept_loss)


def _files(plan_path: Path, folder: Path, yes: bool, experts: str | None, accept_loss: bool) -> None:
    from remoe_cli.deploy.inputs import check_model, read_inputs
    from remoe_cli.deploy.main_files import server_config, write_main_files
    from remoe_cli.deploy.quantised import agreed_terms
    from remoe_cli.owned import new_folder, refuse_folder
    from remoe_cli.package import bundle

    refuse_folder(folder, _PACKAGE, _files_before_marks)
    agree_to_replace(yes, folder)
    with output.progress("Checking the plan"):
        plan, profile, catalog = inputs = read_inputs(plan_path)
    if experts is not None and plan.model.experts != experts:
        raise UsageError(
            f"{plan_path} is not a plan for experts in {experts.upper()}: sizes, times and what it loses are not those of that form.",
            f"Profile with 'remoe profile {profile.record.model.path} --experts {experts} ...', and plan again.",
        )
    quantised = agreed_terms(inputs, accept_loss, output.say)
    check_model(plan, profile, output.progress)
    with new_folder(folder, _PACKAGE, _files_before_marks) as fresh:
        with output.progress("Packaging functions") as progress:
            made = bundle.build(plan, plan_path, profile, fresh / "functions", progress)
        with output.progress("Writing the main function's share", of_bytes=True) as progress:
            config = server_config(plan, profile, catalog, made, lambda entry: f"{plan_path.stem}-{entry}")
            share = write_main_files(config, plan_path, fresh / "main", progress)
    sizes = {f.name: f.shard_bytes for f in made.functions}
    document = {"path": str(folder), "main_bytes": share.bytes, "functions_bytes": sum(sizes.values()), "functions": sizes}
    if quantised is not None:
        document["quantised"] = quantised.document

    def show() -> None:
        rows = [("main function", size(share.bytes)), *((name, size(count)) for name, count in sizes.items())]
        output.table(f"Packaged in {folder}", ("", "bytes"), rows)

    output.result(document, show)


def _files_before_marks(folder: Path) -> list[str]:
    """List the files of a package of a version of remoe without marks."""
    from remoe_cli.package import bundle, partial_checkpoint

    functions, main = bundle.files(folder / "functions"), partial_checkpoint.files(folder / "main")
    return [*(f"functions/{name}" for name in functions), *(f"main/{name}" for name in main)]


def _image(plan_path: Path, folder: Path, repository: str | None, yes: bool) -> None:
    from remoe_cli.deploy.image import build, by_hand
    from remoe_cli.owned import new_folder, refuse_folder
    from remoe_cli.package.image import Image, write_context
    from remoe_cli.plan.catalog.catalog import read_catalog
    from remoe_cli.plan.document import read_plan

    refuse_folder(folder, _CONTEXT)
    agree_to_replace(yes, folder)
    plan = read_plan(plan_path)
    gpu = plan.main.gpu_memory_mb is not None
    architecture = "x86_64" if gpu else read_catalog(plan.catalog.path).architecture
    with new_folder(folder, _CONTEXT) as fresh:
        # SageMaker runs containers as root; elsewhere the program is a user that may do little.
        digest = write_context(fresh, gpu=gpu, as_root=plan.main.name.startswith("ml."))
    image = Image(folder, digest, gpu, architecture, repository)
    done = build(image, output.say, output.progress)
    commands = [] if done else by_hand(image)
    document = {"path": str(folder), "sha256": image.sha256, "image": image.uri, "built": done, "pushed": done and repository is not None}

    def show() -> None:
        output.line(f"The build context is {folder}, the image {image.uri}.")
        if commands:
            output.paragraph("Docker is not running here. To build and push the image elsewhere:")
        for each in commands:
            output.line(f"  {each}")

    output.result(document | {"commands": commands}, show)

"""The `remoe` command: its groups and commands.

This is the only place that turns an exception into an exit code.
"""

from __future__ import annotations

import os
import sys
from textwrap import fill
from typing import Annotated, ClassVar

import typer
from typer.exceptions import TyperException

from remoe_cli import __version__, interrupts, openmp
from remoe_cli.cli import (
    calibrate,
    catalog_update,
    chat,
    config_file,
    config_show,
    cost,
    demo,
    deploy,
    deployments_list,
    destroy,
    doctor,
    drift,
    export,
    infer,
    logs,
    output,
    package,
    plan_make,
    plan_show,
    predict,
    profile_import,
    profile_measure,
    profile_merge,
    profile_run,
    report,
    serve,
    simulate,
    status,
)
from remoe_cli.cli.groups import Command, Group, examples
from remoe_cli.cli.mistakes import refuse_other_bytes, usage_error
from remoe_cli.errors import RemoeError, UsageError
from remoe_cli.settings import debug


class _Remoe(Group):
    panels: ClassVar = {
        "Start here": ("demo", "doctor"),
        "Pipeline": ("profile", "predict", "plan", "package", "deploy", "infer", "chat"),
        "Study": ("report", "simulate", "export"),
        "Operate": ("list", "serve", "status", "logs", "destroy"),
        "Learn from use": ("cost", "calibrate", "drift"),
        "Settings": ("catalog", "config"),
    }


class _Profile(Group):
    default = "run"


class _Plan(Group):
    default = "make"


EXIT_CODES = {
    0: "ok",
    1: "failure",
    2: "wrong usage",
    3: "no plan meets the targets",
    4: "over budget",
    5: "held by another process",
    6: "partly deployed",
    130: "interrupted",
    143: "ended by SIGTERM",
}
_NO_BREAK = "\N{NO-BREAK SPACE}"  # between a code and its meaning, while the line is wrapped
_CODES = ", ".join(f"{code} {meaning}".replace(" ", _NO_BREAK) for code, meaning in EXIT_CODES.items())
_EPILOG = f"""\
Start with 'remoe demo', which needs no account. 'remoe COMMAND --help' shows more examples.
Words such as TTFT, top-k and cold start are explained in docs/reference/glossary.md.
{fill(f"Exit codes: {_CODES}.", 90).replace(_NO_BREAK, " ")}

{examples("remoe demo", "remoe plan --help")}"""


def _group(help: str, epilog: str, cls: type[Group] = Group, completion: bool = False) -> typer.Typer:
    return typer.Typer(
        cls=cls,
        help=help,
        epilog=epilog,
        add_completion=completion,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"max_content_width": 100, "help_option_names": ["--help", "-h"]},
    )


app = _group(
    """Run a mixture-of-experts (MoE) language model with its rarely used experts in serverless functions.

    Each MoE layer has many experts (small networks); its router picks a few of them for each token. remoe records which experts your
    prompts use, plans which experts to keep in the main function and which to move into functions of their own (the remote experts),
    deploys both, and shows what an answer took and cost.
    """,
    _EPILOG,
    _Remoe,
    completion=True,
)
profile = _group(
    """Record which experts a model uses on your prompts, and how long things take.

    'remoe profile MODEL ...' is short for 'remoe profile run MODEL ...'.
    """,
    examples("remoe profile ~/models/olmoe --data prompts.jsonl -o profiles/olmoe", "remoe profile run --help"),
    _Profile,
)
plan = _group(
    """Choose which experts to move into functions, and show such plans again.

    'remoe plan PROFILE ...' is short for 'remoe plan make PROFILE ...'.
    """,
    examples("remoe plan profiles/olmoe -o plans/olmoe.json", "remoe plan make --help", "remoe plan show plans/olmoe.json"),
    _Plan,
)
catalog = _group(
    """Keep catalogs, the files of hardware and prices that 'remoe plan' reads.""",
    examples("remoe catalog update -o prices/aws.toml", "remoe plan profiles/olmoe -o plans/olmoe.json --catalog prices/aws.toml"),
)
config = _group(
    """See the settings that remoe reads from remoe.toml.""",
    examples("remoe config show", "remoe config show --json"),
)
app.add_typer(profile, name="profile")
app.add_typer(plan, name="plan")
app.add_typer(catalog, name="catalog")
app.add_typer(config, name="config")
for group, modules in (
    (app, (demo, doctor, predict, package, deploy, infer, chat, report, simulate, export)),
    (app, (deployments_list, serve, status, logs, destroy, cost, calibrate, drift)),
    (profile, (profile_run, profile_import, profile_measure, profile_merge)),
    (plan, (plan_make, plan_show)),
    (catalog, (catalog_update,)),
    (config, (config_show,)),
):
    for module in modules:
        name = module.__name__.rpartition(".")[2].rpartition("_")[2]
        group.command(name, cls=Command, epilog=module.EXAMPLES)(module.command)


def _print_version(value: bool) -> None:
    if value:
        output.line(f"remoe {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)] = False,
) -> None:
    context.default_map = config_file.default_map(config_file.read_settings(context.command))


def main() -> None:
    """Run the command line and exit."""
    openmp.wait_briefly(os.environ)  # here, and in the servers that are started from here
    code = run()
    if code in (130, 143):  # at once: the end of an interpreter with torch in it takes seconds, and waits for threads
        output.flush()
        os._exit(code)
    sys.exit(code)


def run() -> int:
    """Run the command line and return its exit code, one of EXIT_CODES."""
    output.take_any_text()
    try:
        refuse_other_bytes(sys.argv[1:])
        with interrupts.kept():
            return int(app(prog_name="remoe", standalone_mode=False) or 0)
    except TyperException as error:
        output.fail(usage_error(error))
        return UsageError.exit_code
    except RemoeError as error:
        _traceback()
        output.fail(error)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        output.say("Interrupted.")
        return interrupts.exit_code(interrupt)
    except BrokenPipeError:
        return 1
    except UnicodeEncodeError as error:
        _traceback()
        output.fail(RemoeError(f"This name or text is not UTF-8: {error.object!r}.", "Use a path that is UTF-8."))
        return 1
    except OSError as error:
        _traceback()
        output.fail(RemoeError(f"The system refused: {error}", "Check the path, its permissions and the free space."))
        return 1
    except MemoryError:
        _traceback()
        output.fail(RemoeError("There is not enough memory for this.", "Give smaller files, or use a machine with more memory."))
        return 1
    except Exception as error:
        _traceback()
        output.fail(
            RemoeError(
                f"remoe failed: {type(error).__name__}: {error}", "Run again with REMOE_DEBUG=1 for a traceback, and please report it."
            )
        )
        return 1


def _traceback() -> None:
    if debug():
        output.trace()

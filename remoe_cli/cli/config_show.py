"""`remoe config show`: which settings hold here, and where each one comes from."""

from __future__ import annotations

import os
from typing import Any

from remoe_cli.cli import config_file, output
from remoe_cli.cli.groups import examples
from remoe_cli.settings import FOLDERS, config_dir, debug

EXAMPLES = examples("remoe config show", "remoe config show --json")


def command(json: output.JsonOption = False, quiet: output.QuietOption = False) -> None:
    """Show the settings that hold in this folder, and the file or variable that each comes from.

    Options of a command line go before all of them.
    """
    from typer._click.globals import get_current_context

    settings = config_file.read_settings(get_current_context().find_root().command)
    last = {(each.command, each.option): each for each in settings}
    document: dict[str, Any] = {
        "files": [str(path) for path in config_file.files()],
        "options": [
            {"command": " ".join(each.command), "option": each.option, "value": each.value, "source": str(each.source)}
            for each in last.values()
        ],
        "folders": [
            {"name": name, "value": str(folder()), "source": variable if os.environ.get(variable) else "default"}
            for name, (variable, folder) in FOLDERS.items()
        ],
        "tracebacks": debug(),
    }
    output.result(document, lambda: _show(document))


def _show(document: dict[str, Any]) -> None:
    rows = [(f"{each['command']} --{each['option']}", str(each["value"]), each["source"]) for each in document["options"]]
    if rows:
        output.table("Options", ("option", "value", "from"), rows)
    else:
        output.paragraph(f"No options are set in a file: neither {config_file.NAME} here or above, nor {config_dir() / config_file.NAME}.")
    folders = [(each["name"], each["value"], each["source"]) for each in document["folders"]]
    output.table("Folders", ("folder", "value", "from"), folders)

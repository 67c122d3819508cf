"""The shape of the package: imports without a circle, and files that a reader can hold in the head."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

from tests.support.paths import ROOT

LONGEST_LINES = 400


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports inside functions count too; those for type checkers alone count as well, for a reader follows them all."""
    graph = grimp.build_graph("remoe_cli", cache_dir=None)
    try:
        tuple(TopologicalSorter({module: graph.find_modules_directly_imported_by(module) for module in graph.modules}).static_order())
    except CycleError as error:
        pytest.fail(f"These modules import each other: {' -> '.join(error.args[1])}.")


def test_modules_are_short() -> None:
    counted = {
        file: len(file.read_text().splitlines()) for folder in ("remoe_cli", "tests", "docs") for file in (ROOT / folder).rglob("*.py")
    }
    assert {str(file.relative_to(ROOT)): lines for file, lines in counted.items() if lines > LONGEST_LINES} == {}


def test_bytes_are_written_in_one_way() -> None:
    """A fixed unit makes 0.0 GB of a small model; units.py chooses the one that fits. A function may import nothing else of remoe."""
    fixed = re.compile(r"/ ?(?:1e9|1e6|1e3|2 ?\*\* ?[123]0|_?GB|1024)[^{}]*\} ?(?:GB|MB|kB)")
    found = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "remoe_cli").rglob("*.py")
        if "function" not in file.relative_to(ROOT / "remoe_cli").parts[:1] and fixed.search(file.read_text(encoding="utf-8"))
    }
    assert found == set()


# Calls that delete, replace or write files, and the modules that may have them: all others go through owned.py.
CHANGES_FILES = {"rmtree", "unlink", "rmdir", "rename", "move", "removedirs", "mkdir", "makedirs", "touch", "symlink_to", "ftruncate"}
CHANGES_FILES |= {"write_text", "write_bytes", "copyfile", "copytree", "copy2", "extract", "extractall", "savefig", "save_file"}
MAY_CHANGE_FILES = {
    "owned.py": "it checks all the others",
    "cages.py": "control groups, which are no files",
    "journal.py": "files of its own, in a folder that it has marked",
    "function/weights.py": "a file of its own in /tmp, under a name that nothing has",
    "function/kernel/build.py": "the libraries that it builds, beside it",
    "profile/function_latency.py": "a control group",
    # A path that owned.writing yields
    **dict.fromkeys(("artifacts.py", "deploy/aws/access.py", "model/shards.py", "plan/catalog/update.py", "plan/export.py"), "yielded"),
    **dict.fromkeys(("profile/record.py", "report/page.py", "report/picture.py", "runtime/fetch.py"), "yielded"),
    # A folder that owned.new_folder yields, that owned.require_empty has checked, or a temporary one
    **dict.fromkeys(("model/demo.py", "package/bundle.py"), "new"),
    **dict.fromkeys(("package/dependencies.py", "package/image.py", "package/partial_checkpoint.py"), "new"),
    "package/assistant_files.py": "new",
    # A folder whose files it knows by their names
    **dict.fromkeys(("deploy/local/folder.py", "deploy/local/instance.py", "deploy/local/lifecycle.py"), "a deployment's"),
    **dict.fromkeys(("deploy/local/logs.py", "deploy/local/main_server.py", "deploy/local/place.py"), "a deployment's"),
    "deploy/local/supervisor.py": "a deployment's",
    **dict.fromkeys(("profile/run.py", "profile/partial.py"), "a profile's, in partial/"),
}


def calls_that_change_files(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        of_os = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "os"
        if (
            name in CHANGES_FILES
            or (of_os and name in ("remove", "replace", "link"))
            or (name == "replace" and len(node.args) == 1 and not node.keywords)
        ):
            yield name
        elif name == "open":
            text = " ".join(ast.unparse(argument) for argument in node.args)
            modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str) and len(a.value) < 4]
            if "O_CREAT" in text or any(set(mode) & set("wax+") for mode in modes):
                yield name


def test_files_are_changed_in_few_modules_only() -> None:
    package = ROOT / "remoe_cli"
    changing = {
        file.relative_to(package).as_posix() for file in package.rglob("*.py") if any(calls_that_change_files(ast.parse(file.read_text())))
    }
    assert changing == set(MAY_CHANGE_FILES)


def test_a_call_that_changes_files_is_found(tmp_path: Path) -> None:
    for text in ("shutil.rmtree(a)", "path.replace(b)", "os.replace(a, b)", "open(a, 'w')", "a.open('ab')", "os.open(a, os.O_CREAT)"):
        assert list(calls_that_change_files(ast.parse(text))), text
    for text in ("a.replace('b', 'c')", "open(a)", "a.open('rb')", "items.remove(a)", "replace(plan, main=b)"):
        assert not list(calls_that_change_files(ast.parse(text))), text


# Calls that read a file whole or decode JSON, and the modules that may have them: all others go through bounded.py.
READS_WHOLE = {"read_text", "read_bytes", "load", "loads", "model_validate_json"}
MAY_READ_WHOLE = {
    "bounded.py": "it counts first",
    "cages.py": "files of the kernel",
    **dict.fromkeys(("model/loader.py", "owned.py"), "a file of the kernel"),
    **dict.fromkeys(("deploy/local/place.py", "deploy/local/processes.py"), "files of the kernel"),
    "runtime/device.py": "files of the kernel",
    "runtime/main_state.py": "a file of the kernel",
    "runtime/main_function.py": "bodies, which its servers limit",
    "runtime/api/common.py": "bodies, which its servers limit",
    **dict.fromkeys(
        ("package/bundle.py", "package/dependencies.py", "package/image.py", "package/locks.py"), "remoe's own code and installed packages"
    ),
    "provenance.py": "what comes with remoe; TOML after its size is known",
    "cli/config_file.py": "TOML after its size is known",
    "model/demo.py": "a wheel of a known digest",
    "profile/imports/json_rows.py": "one row, whose size is checked first",
    "profile/imports/torch_file.py": "after its description is checked",
    **dict.fromkeys(("profile/function_latency.py", "profile/function_timing.py"), "what remoe's own child wrote"),
    "plan/catalog/update.py": "AWS's price list, whose size is checked first",
    **dict.fromkeys(("runtime/client.py", "runtime/invoke.py", "deploy/aws/stack.py"), "a part of an answer that was read within a limit"),
    **dict.fromkeys(("deploy/local/front.py", "deploy/local/instance.py"), "a body, which its server limits"),
    "deploy/aws/credentials.py": "what the user's own program for credentials says",
    "predict/neighbours.py": "an array that was read within a limit",
    **dict.fromkeys(("plan/solve/columns.py", "report/terms.py"), "the load of a function, which is no file"),
    "report/page.py": "what comes with remoe",
}


def test_files_are_read_whole_in_few_modules_only() -> None:
    package = ROOT / "remoe_cli"
    reading = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            call = node.func if isinstance(node, ast.Call) else None
            if isinstance(call, ast.Attribute) and call.attr in READS_WHOLE and ast.unparse(call.value) != "bounded":
                reading.add(file.relative_to(package).as_posix())
    assert {name for name in reading if not name.startswith("function/")} == set(MAY_READ_WHOLE)

"""Nothing that snap reads can name code to run: its own source is walked for every way in."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "snapshot_tool"
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen"}
# What is imported by name, and by whom: the command table, --fms-path, --candidate and --family.
IMPORTERS = {
    "cli/commands.py": "a table of snap's own commands",
    "candidates/__init__.py": "--candidate module:factory",
    "candidates/fms/importing.py": "FMS, installed or of --fms-path",
    "families/__init__.py": "a file or an entry point of --family",
    "__init__.py": "a table of the names that the package offers",
}
PROCESSES = {"candidates/fms/importing.py", "base/git.py", "check/bisect.py"}


def sources() -> Iterator[tuple[str, ast.AST]]:
    """Yield every module of the package, parsed."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def called(node: ast.Call) -> str:
    """Return what is called as it is written, "" where that is no plain name."""
    return ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""


def find_ways_in(tree: ast.AST) -> list[str]:
    """Return every import and call by which data could become code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] if node.module.split(".")[0] in FORBIDDEN_MODULES else []
        elif isinstance(node, ast.Call):
            found += [called(node)] if called(node) in FORBIDDEN_CALLS else []
            for word in node.keywords:
                if word.arg == "shell" or (
                    word.arg == "trust_remote_code" and ast.unparse(word.value) == "True"
                ):
                    found.append(f"{word.arg}={ast.unparse(word.value)}")
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from yaml import load",
        "eval(text)",
        "torch.load(path)",
        "subprocess.run(line, shell=True)",
        "Auto.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_the_walk_sees_every_way_in(code: str) -> None:
    """A walk that finds nothing in bad code proves nothing about good code."""
    assert find_ways_in(ast.parse(code))


def test_no_module_turns_data_into_code() -> None:
    """No pickle in any form, no eval, no shell, no code of a checkpoint that nobody trusted."""
    assert {name: found for name, tree in sources() if (found := find_ways_in(tree))} == {}


def test_only_what_the_user_points_at_is_imported_by_name() -> None:
    """Imports by a name that is computed stand in five modules, none of which reads a golden."""
    importers = {
        name
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and called(node).endswith(("import_module", "exec_module", "entry_points"))
    }
    assert importers == set(IMPORTERS)


def test_only_git_is_started_as_a_process() -> None:
    """And that by three modules, which name it themselves."""
    starters = {
        name
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and called(node).startswith(("subprocess.", "os.exec", "os.spawn"))
    }
    assert starters <= PROCESSES

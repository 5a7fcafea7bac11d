"""Families of the user's own: declared in a Python file, or by an installed package.

Their code runs, so the user names them (`--family`). A golden set names a family and never a file.
"""

import hashlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

from snapshot_tool.base.errors import FamilyInvalid
from snapshot_tool.families import FAMILIES, forget_files, register, register_later
from snapshot_tool.families.family import PAGE, Family

ENTRY_POINTS = "snapshot_tool.families"


def name_families(names: Iterable[str]) -> None:
    """Take what `--family` names, files or entry points; their code runs when it is needed.

    What an earlier run in this process named is forgotten.

    Raises FamilyInvalid for a name that is neither.
    """
    forget_files()
    for name in names:
        if name.endswith(".py"):
            if not Path(name).is_file():
                raise FamilyInvalid(f"--family {name} is not a file", f"see {PAGE}")
            register_later(partial(_load, name, partial(_run_file, Path(name))))
        else:
            register_later(partial(_load, name, partial(_import_module, _find_entry_point(name))))


def _load(name: str, run: Callable[[], ModuleType]) -> None:
    """Run the code behind a name and register the families in it."""
    try:
        module = run()
        digest = hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
    except Exception as error:  # the user's code may raise anything
        raise FamilyInvalid(
            f"--family {name} cannot be used: {type(error).__name__}: {error}", f"see {PAGE}"
        ) from error
    declared = [value for value in vars(module).values() if isinstance(value, Family)]
    own = [family for family in declared if not _is_snaps(family)]
    if not own:
        raise FamilyInvalid(f"--family {name} declares no Family", f"see {PAGE}")
    for family in own:
        register(replace(family, digest=digest))


def _run_file(path: Path) -> ModuleType:
    """Run a file as a module under a name that no other module has."""
    name = f"snap_family_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _find_entry_point(name: str) -> importlib.metadata.EntryPoint:
    installed = importlib.metadata.entry_points(group=ENTRY_POINTS)
    if name not in installed.names:
        known = ", ".join([*sorted(installed.names), "FILE.py"])
        raise FamilyInvalid(
            f"--family {name} is none of {known}",
            f"name a Python file, or an entry point of {ENTRY_POINTS}",
        )
    return installed[name]


def _import_module(entry: importlib.metadata.EntryPoint) -> ModuleType:
    entry.load()
    return sys.modules[entry.module]


def _is_snaps(family: Family) -> bool:
    return any(family is built_in for built_in in FAMILIES.values())

"""Families of the user's own: declared in a Python file, or by an installed package.

Their code runs, so the user names them (`--family`). A golden set names a family and never a file.
"""

import hashlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from snapshot_tool.base.errors import FamilyInvalid
from snapshot_tool.families.family import PAGE, Family

ENTRY_POINTS = "snapshot_tool.families"

# The user's families, by name.
OWN: dict[str, Family] = {}
# Named and not yet run.
_NAMED: list[str] = []


def name_families(names: Iterable[str]) -> None:
    """Take the values of `--family`, files or entry points; raise FamilyInvalid for others.

    Their code runs when a family is first looked up. A check looks none up before golden set and
    checkpoint are verified. What an earlier run in this process named is forgotten.
    """
    _NAMED.clear()
    for family in [family for family in OWN.values() if family.digest]:
        del OWN[family.name]
    for name in names:
        if name.endswith(".py"):
            if not Path(name).is_file():
                raise FamilyInvalid(f"--family {name} is not a file", f"see {PAGE}")
        else:
            _find_entry_point(name)
        _NAMED.append(name)


def load_named(built_in: Collection[Family]) -> Iterator[Family]:
    """Run the code that was named and not yet run; yield the families that it declares.

    built_in: families that it may hold without declaring them. Raises FamilyInvalid.
    """
    while _NAMED:
        name = _NAMED.pop(0)
        try:
            if name.endswith(".py"):
                module = _run_file(Path(name))
            else:
                entry = _find_entry_point(name)
                entry.load()
                module = sys.modules[entry.module]
            digest = hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
        except Exception as error:  # the user's code may raise anything
            raise FamilyInvalid(
                f"--family {name} cannot be used: {type(error).__name__}: {error}", f"see {PAGE}"
            ) from error
        declared = [
            value
            for value in vars(module).values()
            if isinstance(value, Family) and not any(value is other for other in built_in)
        ]
        if not declared:
            raise FamilyInvalid(f"--family {name} declares no Family", f"see {PAGE}")
        for family in declared:
            yield replace(family, digest=digest)


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

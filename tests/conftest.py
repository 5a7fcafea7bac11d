"""Fixtures and paths for the tests of both environments."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from snapshot_tool.cli import main

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "tests" / "checkpoints" / "tiny-idefics3"
CHECKOUT = ROOT / "build" / "fms-checkout"
GOLDENS = ROOT / "goldens"
# They need packages that only the check environment has, or only the record environment.
collect_ignore = ["check/test_html_report.py", "check/test_json_report.py", "sharing"]
if importlib.util.find_spec("transformers") is None:
    collect_ignore = ["record/test_oracle.py", "record/test_recorded_again.py"]


# A file runs on one of two workers: at the end, one would wait for the other's long file.
LONG_FILES = (
    "test_bisect.py", "test_own_families.py", "test_record.py", "test_docs.py", "test_mutants.py",
    "test_families.py", "test_dtypes.py", "test_torchrun.py", "test_launch.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run of `snap`."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> Any:
        """The JSON that `--json -` printed."""
        return json.loads(self.out)


Snap = Callable[..., Run]


def run_snap(*arguments: object, cwd: Path = ROOT, **environment: str) -> Run:
    """Run `snap` in a process of its own, with further variables in its environment."""
    answer = subprocess.run(
        [sys.executable, "-m", "snapshot_tool", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert "Traceback" not in answer.stderr, answer.stderr
    return Run(answer.returncode, answer.stdout, answer.stderr)


def run_snap_here(*arguments: object, cwd: Path = ROOT) -> Run:
    """Run `snap` in this process, with the FMS that it names and modules of the folder `cwd`."""
    given = [str(argument) for argument in arguments]
    out, err = io.StringIO(), io.StringIO()
    variables = {"HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    with (
        contextlib.chdir(cwd),
        mock.patch.dict(os.environ, variables),
        imported_fms(fms_of(given)),
        _imports_forgotten(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main(given)
    return Run(int(ended.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def snap() -> Snap:
    """Run `snap` in this process; with further variables, which are read on import, in another."""

    def run(*arguments: object, cwd: Path = ROOT, **environment: str) -> Run:
        if environment:
            return run_snap(*arguments, cwd=cwd, **environment)
        return run_snap_here(*arguments, cwd=cwd)

    return run


# The version that snap's finder gives a plain checkout.
_PLAIN = "0+checkout"


def fms_of(arguments: list[str]) -> Path | None:
    """Return the folder of the FMS that a command imports; None if there is none."""
    if "--fms-path" in arguments:
        return Path(arguments[arguments.index("--fms-path") + 1]).resolve()
    if "--candidate" in arguments:
        return CHECKOUT.resolve()
    installed = [d for d in metadata.distributions(name="ibm-fms") if d.version != _PLAIN]
    return Path(str(installed[0].locate_file(""))) if installed else None


# FMS's modules by their folder, of the two that many tests use: the checkout, and the installed.
_FMS: dict[Path | None, dict[str, ModuleType]] = {}


@contextmanager
def imported_fms(folder: Path | None) -> Iterator[None]:
    """Import FMS from this folder inside the block: a process refuses a second one."""
    outside = _pop_fms()
    if outside and Path(str(outside["fms"].__file__)).resolve().parent.parent == folder:
        sys.modules.update(outside)
        yield
        return
    sys.modules.update(_FMS.get(folder, {}))
    path, finders = list(sys.path), list(sys.meta_path)
    # A test that loaded another FMS by a function of snap leaves its folder and a finder.
    wanted = (folder, fms_of([]))
    others = [entry for entry in path if Path(entry, "fms").is_dir() and Path(entry) not in wanted]
    sys.path[:] = [entry for entry in path if entry not in others]
    sys.meta_path[:] = [f for f in finders if not type(f).__module__.startswith("snapshot_tool.")]
    try:
        yield
    finally:
        sys.path[:], sys.meta_path[:] = path, finders
        inside = _pop_fms()
        if folder in (CHECKOUT.resolve(), fms_of([])):
            _FMS[folder] = inside
        sys.modules.update(outside)


def _pop_fms() -> dict[str, ModuleType]:
    """Take FMS's modules out of the imported ones."""
    names = [name for name in sys.modules if name == "fms" or name.startswith("fms.")]
    return {name: sys.modules.pop(name) for name in names}


@contextmanager
def _imports_forgotten(folder: Path) -> Iterator[None]:
    """Forget modules that are imported from a test's own folder: the next test has others."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    if folder != ROOT:
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", "")).startswith(f"{folder}{os.sep}"):
                del sys.modules[name]


@pytest.fixture
def goldens_copy(tmp_path: Path) -> Path:
    """Copy the committed goldens, and the checkpoint to the place in their manifest."""
    shutil.copytree(GOLDENS, tmp_path / "goldens", ignore=shutil.ignore_patterns(".snap"))
    shutil.copytree(CHECKPOINT, tmp_path / CHECKPOINT.relative_to(ROOT))
    return tmp_path / "goldens"


def set_folder(goldens: Path) -> Path:
    """Return the folder of the one golden set."""
    (manifest,) = goldens.glob("*/*/*/manifest.json")
    return manifest.parent


def contents(goldens: Path) -> dict[str, bytes]:
    """Return every file of the golden sets, by relative path."""
    return {
        path.relative_to(goldens).as_posix(): path.read_bytes()
        for path in sorted(goldens.rglob("*"))
        if path.is_file() and ".snap" not in path.parts
    }


def error_lines(run: Run) -> list[str]:
    """Return the error message of a failed run, which must have one or two lines."""
    lines = run.err.strip().splitlines()
    assert 1 <= len(lines) <= 2, run.err
    return lines

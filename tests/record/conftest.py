"""Golden sets that several test files read, and `snap` without a new process for each call."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

import pytest

from snapshot_tool.cli import main
from tests.conftest import Run, Snap
from tests.record.checkpoints import IDEFICS3, LLAMA, record_here

# Commands that leave nothing behind in a process. Others load FMS, or code of the user's.
HERE = ("record", "show", "list", "verify", "diff")


@pytest.fixture(scope="session")
def snap(snap: Snap) -> Snap:
    """Run `snap` here, or in a process of its own if it needs one."""

    def run(*arguments: object, **environment: str) -> Run:
        given = [str(argument) for argument in arguments]
        if environment or given[0] not in HERE or "--family" in given:
            return snap(*arguments, **environment)
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(given)
            except SystemExit as ended:
                code = int(ended.code or 0)
        return Run(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def llama_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record a small set of the tiny Llama."""
    goldens = tmp_path_factory.mktemp("llama") / "goldens"
    record_here(LLAMA, goldens)
    return goldens


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record a small set of the embedded checkpoint."""
    goldens = tmp_path_factory.mktemp("small") / "goldens"
    record_here(IDEFICS3, goldens)
    return goldens


@pytest.fixture
def llama_copy(llama_set: Path, tmp_path: Path) -> Path:
    """Copy the Llama's set, to be changed."""
    return Path(shutil.copytree(llama_set, tmp_path / "goldens"))


@pytest.fixture
def small_copy(small: Path, tmp_path: Path) -> Path:
    """Copy the embedded checkpoint's set, to be changed."""
    return Path(shutil.copytree(small, tmp_path / "goldens"))

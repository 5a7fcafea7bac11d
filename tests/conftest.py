"""What the tests of both environments share: paths of the repository, and `snap` as a process."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "tests" / "checkpoints" / "tiny-idefics3"
CHECKOUT = ROOT / "build" / "fms-checkout"
GOLDENS = ROOT / "goldens"
# They have no tests for the record environment, and need packages that only the other one has.
collect_ignore = ["check/test_html_report.py", "check/test_json_report.py", "sharing"]
if importlib.util.find_spec("transformers") is None:
    collect_ignore = []


@dataclass(frozen=True, slots=True)
class Run:
    """A finished `snap` process."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> Any:
        """The JSON that `--json -` printed."""
        return json.loads(self.out)


Snap = Callable[..., Run]


@pytest.fixture(scope="session")
def snap() -> Snap:
    """Run `snap` in a process of its own, as a user does."""

    def run(*arguments: object, cwd: Path = ROOT, **environment: str) -> Run:
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

    return run


@pytest.fixture
def goldens_copy(tmp_path: Path) -> Path:
    """Copy the committed goldens, and the checkpoint to where they expect it, to be spoilt."""
    shutil.copytree(GOLDENS, tmp_path / "goldens", ignore=shutil.ignore_patterns(".snap"))
    shutil.copytree(CHECKPOINT, tmp_path / CHECKPOINT.relative_to(ROOT))
    return tmp_path / "goldens"


def set_folder(goldens: Path) -> Path:
    """Return the folder of the one golden set."""
    (manifest,) = goldens.glob("*/*/*/manifest.json")
    return manifest.parent


def error_lines(run: Run) -> list[str]:
    """Return what a failed run said, which must be one or two lines."""
    lines = run.err.strip().splitlines()
    assert 1 <= len(lines) <= 2, run.err
    return lines

"""Fixtures and paths for the tests of both environments."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "tests" / "checkpoints" / "tiny-idefics3"
CHECKOUT = ROOT / "build" / "fms-checkout"
GOLDENS = ROOT / "goldens"
# They need packages that only the check environment has.
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


def run_snap(*arguments: object, cwd: Path = ROOT, **environment: str) -> Run:
    """Run `snap` as a user does, with further variables in its environment."""
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


@pytest.fixture(scope="session")
def snap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Snap]:
    """Run `snap` in a process forked from tests/snap_server.py, which saves most of its imports.

    With further variables, some of which are read on importing, it is `run_snap`.
    """
    out, err = (tmp_path_factory.mktemp("snap") / name for name in ("out", "err"))
    with subprocess.Popen(
        [sys.executable, "-m", "tests.snap_server"],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        requests, answers = server.stdin, server.stdout
        assert requests is not None
        assert answers is not None

        def run(*arguments: object, cwd: Path = ROOT, **environment: str) -> Run:
            if environment:
                return run_snap(*arguments, cwd=cwd, **environment)
            out.write_bytes(b"")
            err.write_bytes(b"")
            request = {
                "arguments": list(map(str, arguments)),
                "folder": str(cwd),
                "environment": {**os.environ, "HF_HUB_OFFLINE": "1"},
                "out": str(out),
                "err": str(err),
            }
            print(json.dumps(request), file=requests, flush=True)
            found = Run(int(answers.readline()), out.read_text("utf-8"), err.read_text("utf-8"))
            assert "Traceback" not in found.err, found.err
            return found

        yield run
        requests.close()


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


def error_lines(run: Run) -> list[str]:
    """Return the error message of a failed run, which must have one or two lines."""
    lines = run.err.strip().splitlines()
    assert 1 <= len(lines) <= 2, run.err
    return lines

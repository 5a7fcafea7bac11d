"""Several processes at one golden set: everybody reads one whole version, or is told to wait."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import GOLDENS, ROOT
from tests.torture.concurrency import meet


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_readers_see_one_whole_version_while_a_recorder_replaces_it(
    tmp_path: Path, way: str
) -> None:
    """Never a mixture, never a false alarm of damage, also where folders cannot be exchanged."""
    meeting = meet(tmp_path, readers=2, rounds=60, way=way)
    assert meeting.failures == []
    assert meeting.replaced == 60
    assert meeting.versions["1"] > 0
    assert meeting.versions["2"] > 0


def test_many_readers_at_once_disturb_nobody() -> None:
    """Each of them verifies the whole of the committed set."""
    command = [sys.executable, "-m", "snapshot_tool", "verify"]
    before = {path: path.stat().st_mtime_ns for path in GOLDENS.rglob("*")}
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(8)
    ]
    answers = [process.communicate(timeout=120)[0] for process in processes]
    assert {process.returncode for process in processes} == {0}
    assert len(set(answers)) == 1
    assert {path: path.stat().st_mtime_ns for path in GOLDENS.rglob("*")} == before

"""Whole `snap record` processes, killed for real: nothing forked, nothing remembered."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.conftest import CHECKPOINT, ROOT
from tests.torture.kill_points import Contents, contents

_COMMAND = ("record", "--checkpoint", str(CHECKPOINT), "--goldens", "goldens")
_SMALL = ("--variants", "0", "--max-new-tokens", "2")
_POINTS = 200  # within the writes of this small recording
_DAY = {"SOURCE_DATE_EPOCH": "1735689600", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _snap(root: Path, *options: str, point: int = 0) -> int:
    module = ["tests.torture.saboteur", str(root), str(point), "kill"]
    answer = subprocess.run(
        [sys.executable, "-m", *module, *_COMMAND, *_SMALL, *options],
        cwd=root, env={**os.environ, **_DAY}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return answer.returncode


def kill_real_recordings(count: int) -> dict[str, Any]:
    """Kill recordings at seeded points; each must leave nothing or all, and be completed."""
    failures = []
    points = sorted(random.Random(7).sample(range(1, _POINTS), count))
    with TemporaryDirectory() as folder:
        whole = _record_whole(Path(folder) / "whole")
        for point in points:
            root = Path(folder) / f"at-{point}"
            (root / "goldens").mkdir(parents=True)
            code = _snap(root, point=point)
            if code != -signal.SIGKILL:
                failures.append(f"point {point}: it ended with {code}")
            if contents(root) not in ({}, whole):
                failures.append(f"point {point}: a mixture")
            if contents(root) != whole:
                unfinished = any(root.glob("goldens/.snap/*/*/cpu-float32"))
                _snap(root, *(("--resume",) if unfinished else ()))
            if contents(root) != whole:
                failures.append(f"point {point}: completed to other bytes")
            shutil.rmtree(root)
            print(f"killed at {point}", file=sys.stderr, flush=True)
    return {"tried": len(points), "survived": len(points) - len(failures), "failures": failures}


def _record_whole(root: Path) -> Contents:
    (root / "goldens").mkdir(parents=True)
    assert _snap(root) == 0
    return contents(root)

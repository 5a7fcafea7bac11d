"""Live `snap record` processes at one set, two at a time, beside processes that read it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.conftest import CHECKPOINT, ROOT
from tests.torture.concurrency import DONE

_COMMAND = ("-m", "snapshot_tool", "record", "--checkpoint", str(CHECKPOINT), "--variants", "0")
_UPDATE = ("--update", "--yes", "--reason", "another length")
_READERS = 2
_TOLD = "another process is recording"
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def record_beside_readers(rounds: int) -> dict[str, Any]:
    """Update a set `rounds` times by two recorders at once, while others read it.

    One recorder of a pair must write the set, the other wait for its turn elsewhere: exit 3 and a
    line that says why. Readers must see one whole version or another.
    """
    failures: list[str] = []
    told = 0
    with TemporaryDirectory() as folder:
        root = Path(folder)
        first = _start(root, "--max-new-tokens", "2")
        said, _ = first.communicate()
        if first.returncode != 0:
            return {"updates": 0, "told": 0, "reads": 0, "failures": [said]}
        readers = [_reader(root) for _ in range(_READERS)]
        for turn in range(rounds):
            tokens = str(3 - turn % 2)
            pair = [_start(root, *_UPDATE, "--max-new-tokens", tokens) for _ in range(2)]
            words = [process.communicate()[0] for process in pair]
            codes = [process.returncode for process in pair]
            told += sum(_TOLD in text for text in words)
            if 0 not in codes or any(
                code != 0 and (code != 3 or _TOLD not in text)
                for code, text in zip(codes, words, strict=True)
            ):
                failures.append(f"round {turn}: {codes} {words}"[:900])
        (root / DONE).touch()
        answers = [json.loads(reader.communicate()[0]) for reader in readers]
    reads = sum(sum(answer["versions"].values()) for answer in answers)
    failures += [failure for answer in answers for failure in answer["failures"]]
    return {"updates": rounds, "told": told, "reads": reads, "failures": failures}


def _start(root: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *_COMMAND, *options, "--goldens", str(root / "goldens")],
        cwd=ROOT, env={**os.environ, **_ENVIRONMENT}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _reader(root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.torture.concurrency", "read", str(root)],
        cwd=ROOT, env={**os.environ, **_ENVIRONMENT}, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip

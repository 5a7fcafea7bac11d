"""A recorder that keeps replacing a golden set, and processes that read it meanwhile.

python -m tests.torture.concurrency ROOT    read the set until ROOT/done is there
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch

from snapshot_tool.base.errors import SnapError
from snapshot_tool.goldens.find import Selection, select_golden
from snapshot_tool.goldens.layout import INPUTS, SetLocation
from snapshot_tool.goldens.manifest import load_manifest
from snapshot_tool.goldens.tensors import describe_file
from snapshot_tool.goldens.transaction import commit, recording_lock
from snapshot_tool.goldens.verify import set_file
from tests.conftest import ROOT
from tests.unit.factory import CHECKPOINT, REVISION, flip_bit, write_golden, write_manifest

_PAUSE = 0.02  # seconds between replacements: about as long as one read takes
_PATIENCE = 100


@dataclass(slots=True)
class Meeting:
    """What came of it: replacements, whole reads of each version, and what must not be."""

    replaced: int = 0
    versions: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def meet(root: Path, *, readers: int, rounds: int) -> Meeting:
    """Let readers read while a recorder replaces the set."""
    write_golden(root / "goldens")
    _write_other(root)
    command = [sys.executable, "-m", "tests.torture.concurrency", str(root)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(readers)
    ]
    while len(list(root.glob("ready-*"))) < readers:
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("a reader ended before it read anything")
        time.sleep(0.05)
    meeting = Meeting(replaced=_replace(root, rounds))
    (root / "done").touch()
    for process in processes:
        found = json.loads(process.communicate(timeout=300)[0])
        meeting.versions += Counter(found["versions"])
        meeting.failures += found["failures"]
    return meeting


def _write_other(root: Path) -> None:
    """Make the set's second version: in every file, one bit differs."""
    folder = write_golden(root / "other")
    manifest = load_manifest(folder)
    files = {}
    for name in manifest.files:
        path = set_file(folder, name)
        if name != INPUTS:
            flip_bit(path, byte=-4)
        files[name] = describe_file(path)
    write_manifest(folder, msgspec.structs.replace(manifest, golden_version=2, files=files))


def _replace(root: Path, rounds: int) -> int:
    """Put one version and the other in place, as a recording does; return how often.

    On a busy machine readers may sleep meanwhile: it goes on until they have seen both.
    """
    location = SetLocation(root / "goldens", CHECKPOINT, REVISION, "cpu", "float32")
    versions = [root / "first", root / "second"]
    shutil.copytree(location.revision_folder, versions[0])
    (second,) = (root / "other").glob("*/*")
    shutil.copytree(second, versions[1])
    for turn in range(rounds * _PATIENCE):
        if turn >= rounds and len(list(root.glob("seen-*"))) == len(versions):
            return turn
        staged = location.work_folder / "cpu-float32" / "tree"
        with recording_lock(location):
            shutil.copytree(versions[(turn + 1) % 2], staged)
            commit(staged, location)
        time.sleep(_PAUSE)
    return rounds * _PATIENCE


def read(root: Path) -> None:
    """Open the set again and again, and compare every tensor's bytes with its manifest."""
    torch.set_num_threads(1)
    versions: Counter[int] = Counter()
    failures: list[str] = []
    while not (root / "done").exists() or not versions:
        try:
            version = _read_once(root / "goldens")
            versions[version] += 1
            (root / f"seen-{version}").touch()
            # The first time imports what reading needs, which takes longer than many replacements.
            (root / f"ready-{os.getpid()}").touch()
        except SnapError as error:
            failures.append(str(error))
            if len(failures) > 5:
                break
    print(json.dumps({"versions": versions, "failures": failures}))


def _read_once(goldens: Path) -> int:
    golden = select_golden(goldens, Selection())
    for name, entry in golden.manifest.files.items():
        for key, tensor in entry.tensors.items():
            found = golden.read_file(name, key).contiguous()
            data = found.reshape(-1).view(torch.uint8) if found.dim() else found
            if hashlib.sha256(data.numpy().tobytes()).hexdigest() != tensor.sha256:
                raise SnapError(f"version {golden.manifest.golden_version} has another's {key}")
    return golden.manifest.golden_version


if __name__ == "__main__":
    read(Path(sys.argv[1]))

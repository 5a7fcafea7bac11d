"""Real processes at one golden set at once: a recorder that keeps replacing it, and its readers.

python -m tests.torture.concurrency write ROOT ROUNDS WAY    replace the set again and again
python -m tests.torture.concurrency read ROOT                read it until ROOT/done is there
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
from snapshot_tool.goldens import transaction
from snapshot_tool.goldens.find import Selection, select_golden
from snapshot_tool.goldens.layout import INPUTS, SetLocation
from snapshot_tool.goldens.manifest import load_manifest
from snapshot_tool.goldens.tensors import describe_file
from snapshot_tool.goldens.transaction import commit, recording_lock
from tests.conftest import CHECKOUT, ROOT
from tests.unit.factory import CHECKPOINT, REVISION, flip_bit, write_golden, write_manifest

DONE = "done"
_TOLD_TO_WAIT = "is replaced again and again"
_PAUSE = 0.02  # seconds between replacements: about as long as one read takes
_PATIENCE = 100


@dataclass(slots=True)
class Meeting:
    """What came of it: replacements, whole reads of each version, and what must not be."""

    replaced: int = 0
    reads: int = 0
    versions: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def meet(root: Path, *, readers: int, rounds: int, way: str = "exchange") -> Meeting:
    """Let readers read while a recorder replaces the set; `way`: "exchange" or "renames"."""
    write_golden(root / "goldens")
    _write_other(root)
    module = [sys.executable, "-m", "tests.torture.concurrency"]
    processes = [
        subprocess.Popen([*module, "read", str(root)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(readers)
    ]
    while len(list(root.glob("ready-*"))) < readers:
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("a reader ended before it read anything")
        time.sleep(0.05)
    writer = subprocess.run(
        [*module, "write", str(root), str(rounds), way],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    (root / DONE).touch()
    meeting = Meeting(replaced=rounds if writer.returncode == 0 else 0)
    if writer.returncode != 0:
        meeting.failures.append(f"the recorder: {writer.stderr[-600:]}")
    for process in processes:
        answer, _ = process.communicate(timeout=300)
        found = json.loads(answer)
        meeting.reads += sum(found["versions"].values())
        meeting.versions += Counter(found["versions"])
        meeting.failures += found["failures"]
    return meeting


def check_at_once(count: int) -> list[int]:
    """Run that many real checks of one case at the same time; return their exit codes."""
    command = [sys.executable, "-m", "snapshot_tool", "check", "--fms-path", str(CHECKOUT)]
    processes = [
        subprocess.Popen(
            [*command, "--case", "variant-02"],
            cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(count)
    ]  # fmt: skip
    return [process.wait(timeout=900) for process in processes]


def _write_other(root: Path) -> None:
    """Make the set's second version: in every file, one bit is another one."""
    folder = write_golden(root / "other")
    manifest = load_manifest(folder)
    files = {}
    for name in manifest.files:
        path = folder.parent / name if name == INPUTS else folder / name
        if name != INPUTS:
            flip_bit(path, byte=-4)
        files[name] = describe_file(path)
    write_manifest(folder, msgspec.structs.replace(manifest, golden_version=2, files=files))


def write(root: Path, rounds: int, way: str) -> None:
    """Put one version and the other in place, as a recording does.

    So many times, and on until readers have seen both: on a busy machine they may sleep meanwhile.
    """
    if way == "renames":
        setattr(transaction, "_exchange", lambda _one, _other: False)  # noqa: B010 - mypy knows its type
    location = SetLocation(root / "goldens", CHECKPOINT, REVISION, "cpu", "float32")
    versions = [root / "first", root / "second"]
    shutil.copytree(location.revision_folder, versions[0])
    (second,) = (root / "other").glob("*/*")
    shutil.copytree(second, versions[1])
    for turn in range(rounds * _PATIENCE):
        if turn >= rounds and len(list(root.glob("seen-*"))) == len(versions):
            break
        staged = location.work_folder / "cpu-float32" / "tree"
        with recording_lock(location):
            shutil.copytree(versions[(turn + 1) % 2], staged)
            commit(staged, location)
        time.sleep(_PAUSE)


def read(root: Path) -> None:
    """Open the set again and again, and compare every tensor's bytes with its manifest."""
    torch.set_num_threads(1)
    versions: Counter[int] = Counter()
    failures: list[str] = []
    while not (root / DONE).exists() or not versions:
        try:
            version = _read_once(root / "goldens")
            versions[version] += 1
            (root / f"seen-{version}").touch()
            # The first time imports what reading needs, which takes longer than many replacements.
            (root / f"ready-{os.getpid()}").touch()
        except SnapError as error:
            if _TOLD_TO_WAIT in str(error):
                continue
            failures.append(str(error))
            if len(failures) > 5:
                break
    print(json.dumps({"versions": versions, "failures": failures}))


def _read_once(goldens: Path) -> int:
    golden = select_golden(goldens, Selection())
    for name, entry in golden.manifest.files.items():
        part = name.removesuffix(".safetensors")
        for key, tensor in entry.tensors.items() if part != "taps" else ():
            found = golden.read(part, key).contiguous()
            data = found.reshape(-1).view(torch.uint8) if found.dim() else found
            if hashlib.sha256(data.numpy().tobytes()).hexdigest() != tensor.sha256:
                raise SnapError(f"version {golden.manifest.golden_version} has another's {key}")
    return golden.manifest.golden_version


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        read(Path(sys.argv[2]))

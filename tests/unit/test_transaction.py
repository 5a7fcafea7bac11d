"""Golden sets are put in place whole or not at all, whatever is killed, fails or competes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

import pytest

from snapshot_tool.base.errors import GoldenLocked, SnapError
from snapshot_tool.base.files import make_folder, write_atomically
from snapshot_tool.goldens.find import Selection, find_goldens, select_golden
from snapshot_tool.goldens.layout import SetLocation
from snapshot_tool.goldens.manifest import load_manifest
from snapshot_tool.goldens.transaction import commit, recording_lock
from snapshot_tool.goldens.verify import find_damage, verify_set
from tests.unit.factory import CHECKPOINT, REVISION, write_golden

HOLD = """
import sys, time
from pathlib import Path
from snapshot_tool.goldens.layout import SetLocation
from snapshot_tool.goldens.transaction import recording_lock
root, checkpoint, revision = sys.argv[1:]
with recording_lock(SetLocation(Path(root), checkpoint, revision, "cpu", "float32")):
    print("held", flush=True)
    time.sleep(600)
"""


def place(root: Path, *, revision: str = REVISION, device: str = "cpu") -> SetLocation:
    """Return the place of the factory's set."""
    return SetLocation(root, CHECKPOINT, revision, device, "float32")


def stage_golden(root: Path) -> Path:
    """Write a complete new revision folder below .snap, and return it."""
    tree = place(root).work_folder / "cpu-float32" / "tree"
    written = write_golden(root.parent / "elsewhere").parent
    tree.parent.mkdir(parents=True)
    written.rename(tree)
    return tree


def try_lock(location: SetLocation) -> None:
    """Take the lock and give it back."""
    with recording_lock(location):
        pass


@contextmanager
def holder(root: Path, revision: str = REVISION) -> Iterator[subprocess.Popen[str]]:
    """Hold the lock in another process while the block runs."""
    command = [sys.executable, "-c", HOLD, str(root), CHECKPOINT, revision]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_commit_replaces_the_set_and_keeps_the_other_devices(tmp_path: Path) -> None:
    """First into an empty place, then over the old set; nothing is left in .snap."""
    root = tmp_path / "goldens"
    write_golden(root, device="cuda")
    for _ in range(2):
        commit(stage_golden(root), place(root))
        found = [item.folder for item in find_goldens(root)]
        assert [folder.name for folder in found] == ["cpu-float32", "cuda-float32"]
        for folder in found:
            assert find_damage(folder, load_manifest(folder)) == []
        assert [path for path in (root / ".snap").rglob("*") if path.is_file()] == []
        place(root).work_folder.joinpath("cpu-float32").rmdir()


def test_siblings_are_copied_if_links_are_not_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without hard links keeps the other devices' sets too."""
    root = tmp_path / "goldens"
    write_golden(root, device="cuda")

    def refuse(_source: object, _target: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    staged = stage_golden(root)
    monkeypatch.setattr(os, "link", refuse)
    commit(staged, place(root))
    assert [verify_set(found.folder)[1] for found in find_goldens(root)] == [[], []]


def test_a_set_that_is_replaced_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    """The reader waits for the recorder's lock; here the set comes back a moment later."""
    root = tmp_path / "goldens"
    folder = write_golden(root)
    location = place(root)
    try_lock(location)
    away = location.work_folder / "replaced"

    def end(recorder: subprocess.Popen[str]) -> None:
        away.rename(location.revision_folder)
        recorder.kill()

    for read in (lambda: select_golden(root, Selection()), lambda: verify_set(folder)):
        with holder(root) as recorder:
            location.revision_folder.rename(away)
            Timer(0.3, end, (recorder,)).start()
            read()


def test_a_leftover_of_an_old_replacement_does_not_undo_a_new_one(tmp_path: Path) -> None:
    """If the set is in its place, what was renamed away is not put over it."""
    folder = write_golden(tmp_path)
    aside = place(tmp_path).work_folder / "replaced" / "cpu-float32"
    aside.mkdir(parents=True)
    (aside / "manifest.json").write_text("old", encoding="utf-8")
    try_lock(place(tmp_path))
    (found,) = find_goldens(tmp_path)
    assert (found.folder, found.problem) == (folder, "")


def test_one_recorder_at_a_time_and_a_dead_one_does_not_count(tmp_path: Path) -> None:
    """All devices of a revision share the lock; other revisions do not."""
    with holder(tmp_path) as process:
        try_lock(place(tmp_path, revision="f" * 40))
        with pytest.raises(GoldenLocked) as caught:
            try_lock(place(tmp_path, device="cuda"))
        assert str(caught.value) == (
            f"another process is recording local/tiny at 0123456789ab in {tmp_path}\n"
            "wait until it has ended"
        )
        process.send_signal(signal.SIGKILL)
        process.wait()
        try_lock(place(tmp_path))


def test_the_lock_is_released_when_a_recording_fails(tmp_path: Path) -> None:
    """The error comes out as it is, also a time-out, which is not one of the lock."""
    with pytest.raises(TimeoutError, match="the hub"), recording_lock(place(tmp_path)):
        raise TimeoutError("the hub does not answer")
    with holder(tmp_path):
        pass


def test_work_in_progress_is_kept_out_of_version_control_and_of_the_list(tmp_path: Path) -> None:
    """Locks and unfinished recordings are not golden sets and are not committed."""
    try_lock(place(tmp_path))
    assert (tmp_path / ".snap" / ".gitignore").read_text(encoding="utf-8") == "*\n"
    assert find_goldens(tmp_path) == []


def test_a_failed_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up after the data is written and before it is safe."""
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert [(child.name, child.read_bytes()) for child in tmp_path.iterdir()] == [("file", b"new")]


def test_a_folder_that_cannot_be_made_is_reported_in_one_line(tmp_path: Path) -> None:
    """A file in a folder's place is the user's to remove."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SnapError) as caught:
        make_folder(tmp_path / "file" / "goldens")
    assert str(caught.value) == f"cannot create {tmp_path / 'file' / 'goldens'}: Not a directory"

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
from snapshot_tool.goldens import transaction
from snapshot_tool.goldens.find import Selection, find_goldens, select_golden
from snapshot_tool.goldens.layout import SetLocation
from snapshot_tool.goldens.manifest import load_manifest
from snapshot_tool.goldens.transaction import (
    commit,
    make_folder,
    recording_lock,
    recover,
    write_atomically,
)
from snapshot_tool.goldens.verify import find_damage
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
WRITE_TOO_MUCH = """
import resource, signal, sys
from pathlib import Path
from snapshot_tool.goldens.transaction import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_atomically(Path(sys.argv[1]), b"new" * 100_000)
except OSError as error:
    print(error.errno)
"""
COMMIT_AND_DIE = """
import os, signal, sys
from pathlib import Path
from snapshot_tool.goldens import transaction
from snapshot_tool.goldens.layout import SetLocation
root, checkpoint, revision = sys.argv[1:]
location = SetLocation(Path(root), checkpoint, revision, "cpu", "float32")
transaction._exchange = lambda one, other: False
renames = []
rename = Path.rename
def rename_once(self, target):
    if renames:
        os.kill(os.getpid(), signal.SIGKILL)
    renames.append(self)
    return rename(self, target)
Path.rename = rename_once
transaction.commit(location.work_folder / "cpu-float32" / "tree", location)
"""


def place(root: Path, *, revision: str = REVISION, device: str = "cpu") -> SetLocation:
    """Return the place of the factory's set."""
    return SetLocation(root, CHECKPOINT, revision, device, "float32")


def stage_text(root: Path, text: str) -> Path:
    """Make a small complete revision folder to commit."""
    staged = place(root).work_folder / "cpu-float32" / "tree"
    (staged / "cpu-float32").mkdir(parents=True)
    (staged / "inputs.safetensors").write_text(text, encoding="utf-8")
    (staged / "cpu-float32" / "manifest.json").write_text(text, encoding="utf-8")
    return staged


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


def contents(folder: Path) -> dict[str, str]:
    """Return a folder's files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in files}


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_commit_replaces_the_set_and_keeps_the_other_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, exchange: bool
) -> None:
    """First into an empty place, then over the old set, beside a set of another device."""
    if not exchange:
        monkeypatch.setattr(transaction, "_exchange", lambda _one, _other: False)
    location = place(tmp_path)
    commit(stage_text(tmp_path, "first"), location)
    other = location.revision_folder / "cuda-float32"
    other.mkdir()
    (other / "manifest.json").write_text("other", encoding="utf-8")
    commit(stage_text(tmp_path, "second"), location)
    assert contents(location.revision_folder) == {
        "inputs.safetensors": "second",
        "cpu-float32/manifest.json": "second",
        "cuda-float32/manifest.json": "other",
    }
    assert contents(location.work_folder) == {}


def test_linux_exchanges_folders_in_one_step(tmp_path: Path) -> None:
    """The old set is never absent: this machine takes the way that has no gap."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name, encoding="utf-8")
    assert transaction._exchange(tmp_path / "one", tmp_path / "other") is sys.platform.startswith(
        "linux"
    )
    assert (tmp_path / "one" / "file").read_text(encoding="utf-8") == "other"


def test_a_crash_between_two_renames_is_set_right_by_the_next_reader(tmp_path: Path) -> None:
    """The old set was taken away and the new one not put in its place yet."""
    folder = write_golden(tmp_path)
    location = place(tmp_path)
    location.work_folder.mkdir(parents=True)
    folder.parent.rename(location.work_folder / "replaced")
    assert not folder.exists()
    (found,) = find_goldens(tmp_path)
    assert found.folder == folder
    assert found.manifest is not None
    recover(tmp_path)
    assert folder.exists()


def test_a_failed_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up after the data is written and before it is safe."""
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_one_recorder_at_a_time_and_a_dead_one_does_not_count(tmp_path: Path) -> None:
    """The lock is held by another process, and gone with it."""
    with holder(tmp_path) as process:
        with pytest.raises(GoldenLocked, match="another process is recording local/tiny"):
            try_lock(place(tmp_path))
        process.send_signal(signal.SIGKILL)
        process.wait()
        try_lock(place(tmp_path))


def test_the_second_recorder_is_told_what_is_being_recorded_and_where(tmp_path: Path) -> None:
    """The message names checkpoint, revision and folder, and says what to do."""
    with holder(tmp_path), pytest.raises(GoldenLocked) as caught:
        try_lock(place(tmp_path))
    assert str(caught.value) == (
        f"another process is recording local/tiny at 0123456789ab in {tmp_path}\n"
        "wait until it has ended"
    )


def test_devices_of_one_revision_share_the_lock_and_other_revisions_do_not(tmp_path: Path) -> None:
    """A commit changes the revision's whole folder, so that is what one recorder holds."""
    with holder(tmp_path):
        with pytest.raises(GoldenLocked):
            try_lock(place(tmp_path, device="cuda"))
        try_lock(place(tmp_path, revision="f" * 40))


def test_the_lock_is_given_back_when_a_recording_fails(tmp_path: Path) -> None:
    """An error inside releases the lock, and comes out as it is."""
    with pytest.raises(ZeroDivisionError), recording_lock(place(tmp_path)):
        raise ZeroDivisionError
    with holder(tmp_path):
        pass


def test_a_reader_that_holds_the_lock_for_an_instant_is_waited_for(tmp_path: Path) -> None:
    """It puts back what a killed recorder took away, and is no recorder itself."""
    with holder(tmp_path) as reader:
        Timer(0.3, reader.kill).start()
        try_lock(place(tmp_path))


def test_time_that_runs_out_in_a_recording_is_no_lock_that_is_held(tmp_path: Path) -> None:
    """A hub that does not answer, say."""
    with pytest.raises(TimeoutError, match="the hub"), recording_lock(place(tmp_path)):
        raise TimeoutError("the hub does not answer")


def test_work_in_progress_is_kept_out_of_version_control_and_of_the_list(tmp_path: Path) -> None:
    """Locks and unfinished recordings are no golden sets and are not committed."""
    try_lock(place(tmp_path))
    assert (tmp_path / ".snap" / ".gitignore").read_text(encoding="utf-8") == "*\n"
    assert find_goldens(tmp_path) == []


def test_a_recorder_killed_between_two_renames_leaves_the_old_set_to_be_found(
    tmp_path: Path,
) -> None:
    """Killed for real at the worst moment: the old set is whole, and selected as before."""
    root = tmp_path / "goldens"
    folder = write_golden(root)
    stage_golden(root)
    command = [sys.executable, "-c", COMMIT_AND_DIE, str(root), CHECKPOINT, REVISION]
    answer = subprocess.run(command, capture_output=True, check=False)
    assert answer.returncode == -signal.SIGKILL, answer.stderr
    assert not folder.exists()
    golden = select_golden(root, Selection())
    assert golden.folder == folder
    assert find_damage(folder, golden.manifest) == []


def test_a_set_that_is_taken_away_after_it_was_found_is_opened_all_the_same(
    tmp_path: Path,
) -> None:
    """Looking for sets and opening one are two steps, and a recorder may come between them."""
    folder = write_golden(tmp_path)
    found = find_goldens(tmp_path)
    location = place(tmp_path)
    location.work_folder.mkdir(parents=True)
    location.revision_folder.rename(location.work_folder / "replaced")
    assert select_golden(tmp_path, Selection(), found).folder == folder


def test_a_recorder_finds_the_set_that_a_killed_one_took_away(tmp_path: Path) -> None:
    """Whoever holds the lock sees the old set in its place, before asking whether there is one."""
    folder = write_golden(tmp_path)
    location = place(tmp_path)
    location.work_folder.mkdir(parents=True)
    location.revision_folder.rename(location.work_folder / "replaced")
    with recording_lock(location):
        assert (folder / "manifest.json").is_file()


def test_a_leftover_of_an_old_replacement_does_not_undo_a_new_one(tmp_path: Path) -> None:
    """Where the set is in its place, what was set aside is not put over it."""
    folder = write_golden(tmp_path)
    aside = place(tmp_path).work_folder / "replaced" / "cpu-float32"
    aside.mkdir(parents=True)
    (aside / "manifest.json").write_text("old", encoding="utf-8")
    (found,) = find_goldens(tmp_path)
    assert found.folder == folder
    assert found.manifest is not None


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_commit_leaves_whole_sets_of_every_device_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, exchange: bool
) -> None:
    """After replacing, both devices' files are as recorded, and nothing is left in .snap."""
    if not exchange:
        monkeypatch.setattr(transaction, "_exchange", lambda _one, _other: False)
    root = tmp_path / "goldens"
    write_golden(root, device="cuda")
    commit(stage_golden(root), place(root))
    found = [item.folder for item in find_goldens(root)]
    assert [folder.name for folder in found] == ["cpu-float32", "cuda-float32"]
    for folder in found:
        assert find_damage(folder, load_manifest(folder)) == []
    assert [path for path in (root / ".snap").rglob("*") if path.is_file()] == []


def test_siblings_are_copied_where_links_are_not_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without hard links keeps the other devices' sets all the same."""
    root = tmp_path / "goldens"
    write_golden(root, device="cuda")

    def refuse(_source: object, _target: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    staged = stage_golden(root)
    monkeypatch.setattr(os, "link", refuse)
    commit(staged, place(root))
    for found in find_goldens(root):
        assert find_damage(found.folder, load_manifest(found.folder)) == []
    assert len(find_goldens(root)) == 2


def test_a_write_that_the_system_cuts_short_leaves_the_old_content(tmp_path: Path) -> None:
    """The file may not grow beyond a limit: the write fails midway, and the old bytes stay."""
    path = tmp_path / "manifest.json"
    path.write_bytes(b"old")
    command = [sys.executable, "-c", WRITE_TOO_MUCH, str(path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout == "27\n"  # EFBIG
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [child.name for child in tmp_path.iterdir()] == ["manifest.json"]


def test_a_folder_that_cannot_be_made_is_said_in_one_line(tmp_path: Path) -> None:
    """A file in a folder's place is the user's to remove."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SnapError) as caught:
        make_folder(tmp_path / "file" / "goldens")
    assert str(caught.value) == f"cannot create {tmp_path / 'file' / 'goldens'}: Not a directory"

"""Golden sets are put in place whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from snapshot_tool.core.errors import GoldenLocked
from snapshot_tool.store import transaction
from snapshot_tool.store.golden import find_goldens
from snapshot_tool.store.layout import SetLocation
from snapshot_tool.store.transaction import commit, recording_lock, recover, write_atomically
from tests.unit.factory import CHECKPOINT, REVISION, write_golden

LOCATION_ARGUMENTS = (CHECKPOINT, REVISION, "cpu", "float32")


def location_in(root: Path) -> SetLocation:
    """Return the place of the factory's set."""
    return SetLocation(root, *LOCATION_ARGUMENTS)


def stage(root: Path, text: str) -> Path:
    """Make a small complete revision folder to commit."""
    staged = location_in(root).work_folder / "cpu-float32" / "tree"
    (staged / "cpu-float32").mkdir(parents=True)
    (staged / "inputs.safetensors").write_text(text, encoding="utf-8")
    (staged / "cpu-float32" / "manifest.json").write_text(text, encoding="utf-8")
    return staged


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
    location = location_in(tmp_path)
    commit(stage(tmp_path, "first"), location)
    other = location.revision_folder / "cuda-float32"
    other.mkdir()
    (other / "manifest.json").write_text("other", encoding="utf-8")
    commit(stage(tmp_path, "second"), location)
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
    location = location_in(tmp_path)
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
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from snapshot_tool.store.layout import SetLocation\n"
        "from snapshot_tool.store.transaction import recording_lock\n"
        f"with recording_lock(SetLocation(Path(sys.argv[1]), *{LOCATION_ARGUMENTS!r})):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(GoldenLocked, match="another process is recording local/tiny"):  # noqa: SIM117
            with recording_lock(location_in(tmp_path)):
                pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with recording_lock(location_in(tmp_path)):
        pass

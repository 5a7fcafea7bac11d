"""Commands that only read leave a goldens folder exactly as they found it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from snapshot_tool.goldens.layout import SetLocation
from snapshot_tool.goldens.manifest import load_manifest
from snapshot_tool.goldens.transaction import recording_lock
from tests.conftest import CHECKOUT, Snap, set_folder
from tests.unit.factory import write_golden

State = dict[str, tuple[int, int, bytes]]
CHECK = ("check", "--case", "one-image", "--phase", "connector", "--fms-path", str(CHECKOUT))


def state(root: Path) -> State:
    """Return mode, time of change and bytes of everything in a folder, by name."""
    found = {}
    for path in (root, *sorted(root.rglob("*"))):
        status = path.lstat()
        data = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (status.st_mode, status.st_mtime_ns, data)
    return found


def location(goldens: Path) -> SetLocation:
    """Return where the copied set is."""
    manifest = load_manifest(set_folder(goldens))
    entry = manifest.checkpoint
    return SetLocation(goldens, entry.name, entry.revision, manifest.device, manifest.dtype)


def read_only(goldens: Path) -> None:
    """Take away all permissions to write."""
    for path in (goldens, *goldens.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)


def unfinished(goldens: Path) -> None:
    """Leave what a recording has staged when it is killed."""
    with recording_lock(location(goldens)):
        staged = location(goldens).work_folder / "cpu-float32"
        staged.mkdir()
        (staged / "plan.json").write_text("{}", encoding="utf-8")
        write_golden(staged / "tree")


def interrupted(goldens: Path) -> None:
    """Leave a recording killed between its two renames: the old set is away, the new one not in."""
    place = location(goldens)
    unfinished(goldens)
    place.revision_folder.rename(place.work_folder / "replaced")


@pytest.mark.parametrize(("prepare", "code"), [(read_only, 0), (unfinished, 0), (interrupted, 3)])
@pytest.mark.parametrize(
    "command", [("list",), ("show",), ("verify",), ("diff", "cpu-float32", "cpu-float32"), CHECK]
)
def test_readers_write_nothing(
    snap: Snap,
    goldens_copy: Path,
    command: tuple[str, ...],
    prepare: Callable[[Path], None],
    code: int,
) -> None:
    """Neither in a folder that is read-only nor beside a recording that was killed."""
    prepare(goldens_copy)
    before = state(goldens_copy)
    run = snap(*command, "--goldens", goldens_copy)
    assert state(goldens_copy) == before
    assert run.code == code, run.out + run.err
    if prepare is interrupted:
        assert "a recording was interrupted while it replaced" in run.out + run.err
        assert len(run.err.splitlines()) <= 2
    if prepare is interrupted and command[0] not in ("list", "verify"):
        assert "go on with snap record --resume or snap pull" in run.err


def test_a_writer_puts_an_interrupted_set_back(snap: Snap, goldens_copy: Path) -> None:
    """After that, the set is whole and listed again."""
    place = location(goldens_copy)
    interrupted(goldens_copy)
    with recording_lock(place):
        assert place.folder.is_dir()
    assert snap("verify", "--goldens", goldens_copy).code == 0

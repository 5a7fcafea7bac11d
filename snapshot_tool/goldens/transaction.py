"""Writing a golden set so that it is there whole or not at all, and reading one meanwhile.

All sets of a revision share inputs.safetensors, so a commit replaces the revision's folder: a
recording builds a complete new folder below goldens/.snap, renames the old one away and the new one
into its place. If a recording is killed between these two renames, the next writer puts the old
folder back (`recording_lock`). Readers never write: they wait and read again (`read_undisturbed`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from snapshot_tool.base.errors import GoldenDamaged, GoldenLocked, SnapError
from snapshot_tool.base.files import leaves_root, link_or_copy, make_folder, open_plain, sync_folder
from snapshot_tool.goldens.layout import (
    WORK_FOLDER,
    SetLocation,
    revision_folders,
    set_folders,
    work_folder,
)

_T = TypeVar("_T")

_REPLACED = "replaced"
_LOCK = "lock"
_GRACE = 5.0  # seconds for which a recorder waits for a reader
_PATIENCE = 2.0  # seconds for which a reader waits for a recorder; a commit takes far less


@contextmanager
def recording_lock(location: SetLocation) -> Iterator[None]:
    """Hold the revision for one recorder; raise GoldenLocked if another process holds it.

    What an interrupted recording renamed away is put back first. The system drops the lock when its
    owner dies, so nothing has to be cleaned up by hand.
    """
    for folder in (location.work_folder, location.revision_folder):
        if leaves_root(folder, location.root):
            raise SnapError(
                f"{folder} is a link out of {location.root}",
                "remove the link: a recording writes only below its goldens folder",
            )
    make_folder(location.work_folder)
    ignore = location.root / WORK_FOLDER / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n", encoding="utf-8")
    try:
        held = FileLock(location.work_folder / _LOCK, timeout=_GRACE).acquire()
    except TimeoutError:
        raise GoldenLocked(
            f"another process is recording {location.checkpoint} at "
            f"{location.revision[:12]} in {location.root}",
            "wait until it has ended",
        ) from None
    with held:
        _put_back(location.revision_folder)
        yield


def commit(staged: Path, location: SetLocation) -> None:
    """Put the complete folder `staged` in the place of the revision's folder.

    Sets of other devices are carried over by hard links (copies if links are not possible).
    """
    target, replaced = location.revision_folder, location.work_folder / _REPLACED
    make_folder(target.parent)
    if target.exists():
        for child in sorted(target.iterdir()):
            if (staged / child.name).exists():
                continue
            if child.is_dir():
                shutil.copytree(child, staged / child.name, copy_function=link_or_copy)
            else:
                link_or_copy(child, staged / child.name)
        sync_folder(staged)
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    try:
        staged.rename(target)
    except BaseException:  # Ctrl-C included
        _put_back(target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def committed_revisions(root: Path) -> list[Path]:
    """Return all revision folders below a goldens folder, also one that is replaced right now."""
    visible = revision_folders(root)
    # Of all revisions that have a folder below goldens/.snap.
    worked_on = (root / w.parent.name / w.name for w in revision_folders(root / WORK_FOLDER))
    hidden = [r for r in worked_on if r not in visible and (_is_away(r) or r.is_dir())]
    return sorted([*visible, *hidden])


def replaced_sets(revision_folder: Path) -> list[Path]:
    """Return where the sets of a revision were before an interrupted recording moved them."""
    moved = set_folders(work_folder(revision_folder) / _REPLACED)
    return [revision_folder / folder.name for folder in moved]


def read_undisturbed(
    revision_folder: Path, read: Callable[[], _T], *, is_whole: Callable[[_T], bool]
) -> _T:
    """Return what `read` returns; read once more if that is not whole and a recorder may be why.

    The second time, recorders of the revision are held off by a shared lock. Nothing is written.

    Raises GoldenDamaged if an interrupted recording left the revision's folder renamed away, else
    what `read` raises.
    """
    lock = work_folder(revision_folder) / _LOCK
    try:
        found = read()
        if is_whole(found) or not lock.exists():
            return found
    except SnapError:
        if not lock.exists():
            raise
    with _recorders_held_off(lock):
        if _is_away(revision_folder):
            raise GoldenDamaged(
                f"a recording was interrupted while it replaced {revision_folder}",
                "go on with snap record --resume or snap pull; either puts the old set back first",
            )
        return read()


@contextmanager
def _recorders_held_off(lock: Path) -> Iterator[None]:
    """Hold a recorder's lock file for reading; do without it if that takes seconds."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(GoldenDamaged):
            file = held.enter_context(open_plain(lock))
            end = time.monotonic() + _PATIENCE
            while time.monotonic() < end:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    break
                except OSError:
                    time.sleep(0.005)
        yield


def _is_away(revision_folder: Path) -> bool:
    """Return whether a revision's folder was renamed away and nothing is in its place."""
    replaced = work_folder(revision_folder) / _REPLACED
    return replaced.is_dir() and not os.path.lexists(revision_folder)


def _put_back(revision_folder: Path) -> None:
    """Rename a revision's folder back to its place, unless something is there or a link leads out.

    The caller holds the lock.
    """
    replaced, root = work_folder(revision_folder) / _REPLACED, revision_folder.parent.parent
    if not _is_away(revision_folder) or leaves_root(replaced, root):
        return
    if not leaves_root(revision_folder.parent, root):
        replaced.rename(revision_folder)
        sync_folder(revision_folder.parent)

"""Writing a golden set so that it is there whole or not at all.

All sets of a revision share inputs.safetensors, so the revision's folder is what changes hands: a
recording builds a complete new folder under goldens/.snap and puts it in the old one's place with a
single rename. Where the system can exchange two folders (Linux: renameat2) the old set is never
absent, not even for an instant; elsewhere a recording killed between two renames is set right by
`recover`, which every reader calls.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.base.errors import GoldenLocked, SnapError
from snapshot_tool.base.files import leaves_root
from snapshot_tool.goldens.exchange import function_of_c
from snapshot_tool.goldens.layout import WORK_FOLDER, SetLocation

if TYPE_CHECKING:
    from filelock import FileLock

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_REPLACED = "replaced"
_LOCK = "lock"
_GRACE = 1.0  # seconds; a reader that puts a set back (see `recover`) holds the lock for an instant
_PATIENCE = 5.0  # seconds; a reader waits for a commit, which is over in much less


@contextmanager
def recording_lock(location: SetLocation) -> Iterator[None]:
    """Hold the revision for one recorder; raise GoldenLocked where another one holds it.

    The system drops the lock when its owner dies, so nothing has to be cleaned up by hand.
    """
    for folder in (location.work_folder, location.revision_folder):
        if leaves_root(folder, location.root):
            raise SnapError(
                f"{folder} is a link out of {location.root}",
                "remove the link: a recording writes below its goldens folder alone",
            )
    make_folder(location.work_folder)
    ignore = location.root / WORK_FOLDER / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n", encoding="utf-8")
    try:
        held = _revision_lock(location.work_folder, seconds=_GRACE).acquire()
    except TimeoutError:
        raise GoldenLocked(
            f"another process is recording {location.checkpoint} at "
            f"{location.revision[:12]} in {location.root}",
            "wait until it has ended",
        ) from None
    with held:
        # Before anyone asks whether the set is recorded already.
        _put_back(location.work_folder / _REPLACED, location.root)
        yield


def _revision_lock(work_folder: Path, *, seconds: float) -> FileLock:
    from filelock import FileLock  # readers hardly ever need it

    return FileLock(work_folder / _LOCK, timeout=seconds)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents; raise SnapError where that is not allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SnapError(f"cannot create {folder}: {error.strerror}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it holds all of `data` or what it held before."""
    partial = path.with_name(f".{path.name}.partial")
    # What a killed write left; and "x" follows no link that somebody put there.
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the system lets folders be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def commit(staged: Path, location: SetLocation) -> None:
    """Put the complete folder `staged` in the place of the revision's folder.

    Sets of other devices are carried over by hard links (copies where links are not possible).
    """
    target = location.revision_folder
    make_folder(target.parent)
    if not target.exists():
        staged.rename(target)
        sync_folder(target.parent)
        return
    for child in sorted(target.iterdir()):
        if not (staged / child.name).exists():
            _carry_over(child, staged / child.name)
    sync_folder(staged)
    if not _exchange(staged, target):
        replaced = location.work_folder / _REPLACED
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
        staged.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    sync_folder(target.parent)
    shutil.rmtree(staged, ignore_errors=True)


def recover(root: Path) -> None:
    """Put back what a recording took away and did not live to replace.

    A recorder that lives holds the lock: what it took away it puts there itself, in an instant, and
    a reader waits for it. Where nothing can be written, the set is reported as missing.
    """
    for replaced in root.glob(f"{WORK_FOLDER}/*/*/{_REPLACED}"):
        if _place_of(replaced, root).exists() or leaves_root(replaced.parent / _LOCK, root):
            continue
        with (
            contextlib.suppress(OSError),  # the time that runs out is one as well
            _revision_lock(replaced.parent, seconds=_PATIENCE),
        ):
            _put_back(replaced, root)


def is_being_replaced(root: Path) -> bool:
    """Tell whether a recorder has taken a set away and not put the other one in its place yet."""
    replaced = root.glob(f"{WORK_FOLDER}/*/*/{_REPLACED}")
    return any(not _place_of(folder, root).exists() for folder in replaced)


def _place_of(replaced: Path, root: Path) -> Path:
    """Return where a replaced folder came from."""
    return root / replaced.parent.parent.name / replaced.parent.name


def _put_back(replaced: Path, root: Path) -> None:
    """Rename a replaced folder back to its place, unless something is there, or links lead away."""
    target = _place_of(replaced, root)
    if not replaced.is_dir() or os.path.lexists(target):
        return
    if leaves_root(replaced, root) or leaves_root(target.parent, root):
        return
    replaced.rename(target)
    sync_folder(target.parent)


def _carry_over(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, copy_function=link_or_copy)
    else:
        link_or_copy(source, target)


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Give a file a second place; its bytes are written again only where links are impossible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; return False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = function_of_c("renameat2")
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)

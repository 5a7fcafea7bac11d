"""Writing a golden set so that it is there whole or not at all.

All sets of a revision share inputs.safetensors, so the revision's folder is what changes hands: a
recording builds a complete new folder under goldens/.snap and puts it in the old one's place with a
single rename. Where the system can exchange two folders (Linux: renameat2) the old set is never
absent, not even for an instant; elsewhere a recording killed between two renames is set right by
`recover`, which every reader calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from snapshot_tool.base.errors import GoldenLocked, GoldenNotFound, LockInvalid, SnapError
from snapshot_tool.base.files import file_sha256, leaves_root
from snapshot_tool.goldens.layout import INPUTS, MANIFEST, WORK_FOLDER, SetLocation
from snapshot_tool.goldens.manifest import (
    CheckpointName,
    Count,
    Digest,
    ManifestSummary,
    Positive,
    Revision,
)
from snapshot_tool.goldens.manifest import encode as encode_json

if TYPE_CHECKING:
    from filelock import FileLock


@functools.cache
def function_of_c(name: str) -> ctypes._NamedFuncPointer | None:
    """Return a function of the C library; None where it has none of that name."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except OSError:  # a Python that is linked statically opens no library
        return None


# A name in the set's own folder (or inputs beside it): no folders, nothing hidden.
FileName = Annotated[
    str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_-]*\.(json|safetensors)\Z", max_length=64)
]


class LockedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file: its size in bytes and the SHA-256 of them all."""

    size: Count
    sha256: Digest

    def object_name(self, name: str) -> str:
        """Return what the file is called on a remote: its digest, and the suffix of its name."""
        return self.sha256 + Path(name).suffix


class LockedSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One golden set; `files` has its manifest, too."""

    checkpoint: CheckpointName
    revision: Revision
    device: Annotated[str, msgspec.Meta(pattern=r"^(cpu|cuda)\Z")]
    dtype: Annotated[str, msgspec.Meta(pattern=r"^(float32|float64|bfloat16|float16)\Z")]
    golden_version: Positive
    files: dict[FileName, LockedFile]

    def __post_init__(self) -> None:
        """Refuse a set without the files that every set has."""
        for name in (MANIFEST, INPUTS):
            if name not in self.files:
                raise ValueError(f"a set without {name}")

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """What tells the set from all others, whatever its version."""
        return self.checkpoint, self.revision, self.device, self.dtype

    @property
    def title(self) -> str:
        """Name the set as people read it."""
        return f"{self.location(Path())}, golden version {self.golden_version}"

    def location(self, root: Path) -> SetLocation:
        """Return where the set lies below a goldens folder."""
        return SetLocation(root, *self.identity)

    def is_meant(self, part: str) -> bool:
        """Tell whether the set's name, owner/name/revision/device-dtype, contains `part`."""
        return part in f"{self.checkpoint}/{self.revision}/{self.device}-{self.dtype}"

    def describes(self, manifest: ManifestSummary) -> bool:
        """Tell whether a manifest is this set's, and names the same files."""
        entry = manifest.checkpoint
        files = {
            name: LockedFile(size=e.size, sha256=e.sha256) for name, e in manifest.files.items()
        }
        return (
            self.identity == (entry.name, entry.revision, manifest.device, manifest.dtype)
            and self.golden_version == manifest.golden_version
            and files == {name: file for name, file in self.files.items() if name != MANIFEST}
        )


class Lock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole of goldens.lock."""

    schema: Literal["snap-lock/1"] = "snap-lock/1"
    remote: str
    sets: tuple[LockedSet, ...]

    def __post_init__(self) -> None:
        """Refuse a set that is named twice: which of both is meant?"""
        if len({item.identity for item in self.sets}) < len(self.sets):
            raise ValueError("a set is named twice")

    def merged(self, sets: list[LockedSet], *, remote: str) -> Lock:
        """Return the lock with some sets added or replaced, in a fixed order."""
        by_identity = {item.identity: item for item in (*self.sets, *sets)}
        return Lock(remote=remote, sets=tuple(by_identity[key] for key in sorted(by_identity)))


def lock_set(folder: Path, manifest: ManifestSummary) -> LockedSet:
    """Return the entry of a set whose files are known to be as recorded."""
    path = folder / MANIFEST
    own = LockedFile(size=path.stat().st_size, sha256=file_sha256(path))
    files = {name: LockedFile(size=e.size, sha256=e.sha256) for name, e in manifest.files.items()}
    return LockedSet(
        checkpoint=manifest.checkpoint.name,
        revision=manifest.checkpoint.revision,
        device=manifest.device,
        dtype=manifest.dtype,
        golden_version=manifest.golden_version,
        files={MANIFEST: own, **files},
    )


def lock_path(goldens: Path) -> Path:
    """Return where the lock of a goldens folder lies: beside it, so that git can have the one."""
    folder = goldens if goldens.name else goldens.resolve()
    return folder.with_name(f"{folder.name}.lock")


def load_lock(path: Path) -> Lock:
    """Read and validate a lock; raise LockInvalid, naming the field, where it breaks the schema."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Lock)
    except FileNotFoundError:
        raise GoldenNotFound(
            f"{path} is missing", "snap push writes it; it belongs into git"
        ) from None
    except (OSError, msgspec.DecodeError, RecursionError, ValueError) as error:
        raise LockInvalid(
            f"{path} is no valid lock: {error}", "restore it from version control"
        ) from error


def encode_lock(lock: Lock) -> bytes:
    """Return the lock as JSON with sorted keys: small differences make small diffs in git."""
    return encode_json(lock)


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

"""Pushing golden sets to a remote, and writing what lies there into goldens.lock. No torch."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from snapshot_tool.base.errors import GoldenDamaged, GoldenNotFound, UsageError
from snapshot_tool.base.protocol import Progress
from snapshot_tool.goldens.find import find_goldens
from snapshot_tool.goldens.lock import (
    Lock,
    LockedFile,
    LockedSet,
    encode_lock,
    load_lock,
    lock_path,
    lock_set,
)
from snapshot_tool.goldens.manifest import load_manifest
from snapshot_tool.goldens.remote import Shared, clean_remote, count_megabytes, open_remote
from snapshot_tool.goldens.transaction import recording_lock, write_atomically
from snapshot_tool.goldens.verify import require_whole, set_file


@dataclass(frozen=True, slots=True)
class PushRequest:
    """What to push.

    Args:
        goldens: the goldens folder; its lock lies beside it.
        remote: the remote's address; None means the lock's.
        only: a part of the names ("owner/name/revision/device-dtype") of the sets that are meant.
        again: send also what is there.
    """

    goldens: Path
    remote: str | None = None
    only: str = ""
    again: bool = False


@dataclass(frozen=True, slots=True)
class _Object:
    """One file of a set: its name on the remote, its digest and size, and where it lies here."""

    name: str
    file: LockedFile
    path: Path


def push(request: PushRequest, progress: Progress) -> Shared:
    """Send what the remote lacks of the sets here, then write the lock."""
    path = lock_path(request.goldens)
    old = load_lock(path) if path.exists() else None
    url = _choose_remote(request, old)
    remote = open_remote(url)
    with ExitStack() as held:
        sets = _whole_sets(request, held)
        lock = (old or Lock(remote=url, sets=())).merged(list(sets.values()), remote=url)
        there = remote.sizes()
        _require_complete(lock, list(sets.values()), there)
        objects = {o.name: o for folder, item in sets.items() for o in _objects(folder, item)}
        missing = [o for o in objects.values() if request.again or there.get(o.name) != o.file.size]
        with count_megabytes(progress, "pushing (MB)", [o.file.size for o in missing]) as advance:
            for item in missing:
                remote.upload(item.path, item.name, advance)
        write_atomically(path, encode_lock(lock))
    known = old.sets if old else ()
    moved = tuple(item for item in sets.values() if item not in known)
    return Shared(url, tuple(sets.values()), moved, sum(item.file.size for item in missing))


def _choose_remote(request: PushRequest, lock: Lock | None) -> str:
    if request.remote is not None:
        return clean_remote(request.remote)
    if lock is None:
        raise UsageError(
            f"there is no {lock_path(request.goldens)} to say where to push to",
            "name the place: snap push hf://datasets/OWNER/NAME",
        )
    return clean_remote(lock.remote)


def _whole_sets(request: PushRequest, held: ExitStack) -> dict[Path, LockedSet]:
    """Return the sets that are meant, every byte verified; keep recorders away from them."""
    sets = {}
    revisions = set()
    for found in find_goldens(request.goldens):
        if found.manifest is None:
            raise GoldenDamaged(found.problem, "see snap verify")
        item = lock_set(found.folder, found.manifest)
        if not item.is_meant(request.only):
            continue
        location = item.location(request.goldens)
        if location.revision_folder not in revisions:
            held.enter_context(recording_lock(location))
            revisions.add(location.revision_folder)
        require_whole(found.folder, load_manifest(found.folder))
        sets[found.folder] = item
    if not sets:
        raise GoldenNotFound(
            f"no golden set {request.only} in {request.goldens}".replace("  ", " "),
            "snap list shows what is there; snap record makes one",
        )
    return sets


def _require_complete(lock: Lock, sent: list[LockedSet], there: dict[str, int]) -> None:
    """Refuse a lock that names sets which the remote would not have."""
    for item in lock.sets:
        if item in sent:
            continue
        if any(there.get(file.object_name(n)) != file.size for n, file in item.files.items()):
            raise GoldenNotFound(
                f"goldens.lock also names {item.title}, which {lock.remote} does not have",
                "pull it first, or take it out of goldens.lock",
            )


def _objects(folder: Path, item: LockedSet) -> list[_Object]:
    return [
        _Object(file.object_name(name), file, set_file(folder, name))
        for name, file in sorted(item.files.items())
    ]

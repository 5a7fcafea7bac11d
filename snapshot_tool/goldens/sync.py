"""Sending golden sets to a remote, and fetching them. goldens.lock lists what the remote has.

A remote is a dataset of the hub, a prefix on S3, or a folder. Its files are
`<remote>/objects/<SHA-256>.<suffix>`: the same bytes are sent once, all versions of a set can be
side by side, and an object is never overwritten by another one.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback

from snapshot_tool.base.errors import (
    GoldenDamaged,
    GoldenExists,
    GoldenNotFound,
    RemoteUnavailable,
    SnapError,
    UsageError,
)
from snapshot_tool.base.files import file_sha256, link_or_copy, make_folder, write_atomically
from snapshot_tool.base.protocol import Progress
from snapshot_tool.goldens.find import find_goldens, read_revision
from snapshot_tool.goldens.layout import INPUTS, MANIFEST, SetLocation
from snapshot_tool.goldens.lock import Lock, LockedFile, LockedSet, load_lock, lock_path, lock_set
from snapshot_tool.goldens.manifest import Manifest, encode, load_manifest
from snapshot_tool.goldens.transaction import commit, recording_lock
from snapshot_tool.goldens.verify import find_damage, refuse_damage, set_file

_BLOCK = 8 * 2**20  # bytes
_MEGABYTE = 10**6
_SEGMENT = r"(?!\.{1,2}(/|\Z))[A-Za-z0-9._-]+"
_PREFIX = rf"(/{_SEGMENT})*/?"
_REMOTES = (
    re.compile(rf"hf://datasets/[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*{_PREFIX}"),
    re.compile(rf"s3://[a-z0-9][a-z0-9.-]+[a-z0-9]{_PREFIX}"),
    # Any folder without "..", control characters, or what URLs give a meaning.
    re.compile(r"file:///(?!(.*/)?\.\.(/|\Z))[^\x00-\x1f\x7f:?#]*"),
)
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Remote:
    """An open remote; every error of its client becomes RemoteUnavailable."""

    url: str
    _files: Any = field(repr=False)
    _objects: str = field(repr=False)

    @classmethod
    def open(cls, url: str) -> Remote:
        """Open a remote by its address; no request is sent yet."""
        from fsspec.core import url_to_fs

        url = clean_remote(url)
        if url.startswith("hf:"):
            # The hub's client draws progress bars of its own, and logs each retry.
            from huggingface_hub.utils.tqdm import disable_progress_bars

            disable_progress_bars()
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        options = {"auto_mkdir": True} if url.startswith("file:") else {}
        try:
            # No caches, since others may push meanwhile.
            files, root = url_to_fs(
                url, skip_instance_cache=True, use_listings_cache=False, **options
            )
        except ImportError as error:
            raise RemoteUnavailable(
                f"{url} needs a package that is not installed here: {error.name}",
                "in a checkout of snap: pip install '.[s3]'",
            ) from error
        return cls(url, files, f"{root.rstrip('/')}/objects")

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every object that is there, by name."""
        from huggingface_hub.errors import EntryNotFoundError

        with self._reach("list"):
            try:
                found = self._files.find(self._objects, detail=True)
            except EntryNotFoundError:  # nothing was pushed yet
                return {}
            return {path.rpartition("/")[2]: int(info["size"]) for path, info in found.items()}

    def upload(self, path: Path, name: str, advance: Advance) -> None:
        """Write a file as the object `name`."""
        target = f"{self._objects}/{name}"
        with self._reach("write to"):
            if self.url.startswith("file:"):
                self._files.put_file(str(path), f"{target}.partial")
                self._files.mv(f"{target}.partial", target)
                advance(path.stat().st_size)
            else:
                self._files.put_file(str(path), target, callback=_Advancing(advance))

    def blocks(self, name: str, *, start: int, size: int) -> Iterator[bytes]:
        """Yield an object's bytes from `start` on, until there are `size` of them or it ends."""
        with self._reach("read from"):
            path = f"{self._objects}/{name}"
            with self._files.open(path, "rb", block_size=_BLOCK) as source:
                source.seek(start)
                left = size - start
                while left and (block := source.read(min(_BLOCK, left))):
                    left -= len(block)
                    yield block

    @contextmanager
    def _reach(self, deed: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each file system raises its own client's errors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RemoteUnavailable(
                f"cannot {deed} {self.url}: {reason}",
                "check that it exists, and that the credentials in the environment may do this",
            ) from error


def clean_remote(url: str) -> str:
    """Return a remote's address without a slash at its end; raise UsageError for any other form.

    No passwords, no chained protocols, no "..": goldens.lock, which has the address, may come from
    a stranger.
    """
    if not any(form.fullmatch(url) for form in _REMOTES):
        raise UsageError(
            f"unsupported remote URL {url!r}",
            "use hf://datasets/OWNER/NAME, s3://BUCKET/PREFIX or file:///FOLDER",
        )
    return url.rstrip("/")


class _Advancing(Callback):  # type: ignore[misc]
    """Counts the bytes of each block that was written."""

    def __init__(self, advance: Advance) -> None:
        super().__init__()
        self._advance = advance

    def relative_update(self, inc: int = 1) -> None:
        """Count `inc` bytes."""
        self._advance(inc)


@contextmanager
def _count_megabytes(progress: Progress, title: str, size: int) -> Iterator[Advance]:
    """Open a stage whose steps are megabytes, of `size` bytes; yield what counts the bytes."""
    done = counted = 0
    with progress.stage(title, math.ceil(size / _MEGABYTE)) as steps:

        def advance(more: int) -> None:
            nonlocal done, counted
            done += more
            while counted < math.ceil(done / _MEGABYTE):
                next(steps)
                counted += 1

        yield advance


@dataclass(frozen=True, slots=True)
class Shared:
    """What a push or a pull did: all sets that are shared now, the new ones, the bytes sent."""

    remote: str
    sets: tuple[LockedSet, ...]
    moved: tuple[LockedSet, ...]
    sent: int


def pull(
    goldens: Path,
    progress: Progress,
    *,
    remote: str | None = None,
    only: str = "",
    replace: bool = False,
) -> Shared:
    """Fetch what is missing here of the locked sets, and put each revision in place at once.

    Args:
        goldens: the goldens folder; its lock is beside it.
        progress: where megabytes are reported.
        remote: the remote's address; None means the lock's.
        only: a part of the names ("owner/name/revision/device-dtype") of the sets to pull.
        replace: replace sets that were changed here, too.
    """
    path = lock_path(goldens)
    lock = load_lock(path)
    source = Remote.open(remote or lock.remote)
    sets = sorted((s for s in lock.sets if s.is_meant(only)), key=lambda item: item.identity)
    if not sets:
        raise GoldenNotFound(
            f"{path} names no golden set {only}".rstrip(),
            f"it names: {', '.join(item.title for item in lock.sets) or 'none at all'}",
        )
    moved: list[LockedSet] = []
    sent = 0
    for _, group in itertools.groupby(sets, key=lambda item: item.identity[:2]):
        revision = list(group)
        location = revision[0].location(goldens)
        with recording_lock(location):
            missing = [item for item in revision if not _is_here(item, goldens)]
            if missing:
                sent += _pull_revision(missing, location, source, progress, replace=replace)
                moved += missing
    return Shared(source.url, tuple(sets), tuple(moved), sent)


def _is_here(item: LockedSet, root: Path) -> bool:
    """Return whether a set is here, whole, as it is locked."""
    folder = item.location(root).folder
    path = folder / MANIFEST
    if not path.is_file() or file_sha256(path) != item.files[MANIFEST].sha256:
        return False
    manifest = load_manifest(folder)
    return lock_set(folder, manifest) == item and not find_damage(folder, manifest)


def _pull_revision(
    sets: list[LockedSet],
    location: SetLocation,
    remote: Remote,
    progress: Progress,
    *,
    replace: bool,
) -> int:
    """Fetch sets of one revision, verify them, put them in place; return how many bytes came.

    The revision is locked.
    """
    here = {
        found.folder: found.manifest
        for found in read_revision(location.revision_folder)
        if found.manifest and INPUTS in found.manifest.files
    }
    _require_one_inputs_file(sets, location, here)
    work = location.work_folder / "pull"
    store, tree = work / "objects", work / "tree"
    # Whole objects that an interrupted pull fetched are kept.
    make_folder(store)
    shutil.rmtree(tree, ignore_errors=True)
    wanted = {file.object_name(n): file for item in sets for n, file in item.files.items()}
    manifests = {item.files[MANIFEST].object_name(MANIFEST) for item in sets}
    for folder, manifest in here.items():
        for name, file in lock_set(folder, manifest).files.items():
            path, target = set_file(folder, name), store / file.object_name(name)
            is_missing = target.name in wanted and not target.exists()
            if is_missing and path.is_file() and file_sha256(path) == file.sha256:
                link_or_copy(path, target)
    fetched = _fetch({name: wanted[name] for name in manifests}, store, remote, progress)
    for item in sets:
        folder = _place(item, [MANIFEST], store=store, tree=tree)
        _require_successor(item, load_manifest(folder), folder, location.root, replace=replace)
    fetched += _fetch(wanted, store, remote, progress)
    for item in sets:
        folder = _place(item, list(item.files), store=store, tree=tree)
        refuse_damage(find_damage(folder, load_manifest(folder)))
    commit(tree, location)
    shutil.rmtree(work, ignore_errors=True)
    return fetched


def _require_one_inputs_file(
    sets: list[LockedSet], location: SetLocation, here: dict[Path, Manifest]
) -> None:
    """Raise GoldenExists unless all sets of the revision, pulled or not, share their inputs."""
    pulled = {item.location(location.root).folder for item in sets}
    digests = {item.files[INPUTS].sha256 for item in sets}
    digests |= {m.files[INPUTS].sha256 for folder, m in here.items() if folder not in pulled}
    if len(digests) > 1:
        raise GoldenExists(
            f"the golden sets of {location.checkpoint} in {location.revision_folder} would have "
            "different inputs",
            "pull all sets of the revision, or remove the ones here",
        )


def _fetch(wanted: dict[str, LockedFile], store: Path, remote: Remote, progress: Progress) -> int:
    """Fetch those objects that `store` lacks, by name; return how many bytes came."""
    missing = {name: file for name, file in wanted.items() if not (store / name).exists()}
    fetched, size = 0, sum(file.size for file in missing.values())
    with _count_megabytes(progress, "pulling (MB)", size) as advance:
        for name, file in missing.items():
            partial = store / f"{name}.partial"
            start = partial.stat().st_size if partial.exists() else 0
            if start > file.size:
                partial.unlink()
                start = 0
            advance(start)
            try:
                with partial.open("ab") as sink:
                    for block in remote.blocks(name, start=start, size=file.size):
                        fetched += sink.write(block)
                        advance(len(block))
            except OSError as error:
                raise SnapError(
                    f"cannot write {partial}: {error.strerror}", "free disk space, then pull again"
                ) from error
            if file_sha256(partial) != file.sha256:
                partial.unlink()
                raise GoldenDamaged(
                    f"{remote.url} has other bytes under {name} than goldens.lock names",
                    "nothing was changed here; send whole files with: snap push --again",
                )
            partial.replace(store / name)
    return fetched


def _require_successor(
    item: LockedSet, pulled: Manifest, folder: Path, root: Path, *, replace: bool
) -> None:
    """Refuse a manifest of another set, and one that would undo a version made here."""
    if lock_set(folder, pulled) != item:
        raise GoldenDamaged(
            f"the manifest that goldens.lock names for {item.title} is another set's",
            "push the set again, and commit goldens.lock",
        )
    try:
        here = load_manifest(item.location(root).folder)
    except SnapError:  # missing or damaged: the pull replaces it
        return
    if pulled.history[: len(here.history)] != here.history and not replace:
        raise GoldenExists(
            f"{here.title} was recorded here and is not an earlier version of the one to pull",
            "push it, or throw it away with --replace",
        )


def _place(item: LockedSet, names: list[str], *, store: Path, tree: Path) -> Path:
    """Link a set's files from `store` into its folder in `tree`; return that folder."""
    folder = tree / item.location(tree).set_name
    make_folder(folder)
    for name in names:
        target = set_file(folder, name)
        if not target.exists():
            link_or_copy(store / item.files[name].object_name(name), target)
    return folder


def push(
    goldens: Path,
    progress: Progress,
    *,
    remote: str | None = None,
    only: str = "",
    again: bool = False,
) -> Shared:
    """Send what the remote lacks of the sets here, then write the lock.

    The arguments are those of `pull`; `again` also sends what the remote has.
    """
    path = lock_path(goldens)
    old = load_lock(path) if path.exists() else None
    address = old.remote if remote is None and old else remote
    if address is None:
        raise UsageError(
            f"there is no {path}, which names the remote",
            "name it: snap push hf://datasets/OWNER/NAME",
        )
    target = Remote.open(address)
    known = old.sets if old else ()
    with ExitStack() as held:
        sets = _whole_sets(goldens, only, held)
        by_identity = {item.identity: item for item in (*known, *sets.values())}
        lock = Lock(remote=target.url, sets=tuple(by_identity[key] for key in sorted(by_identity)))
        there = target.sizes()
        for item in lock.sets:
            objects = [(file.object_name(n), file.size) for n, file in item.files.items()]
            is_sent = item in sets.values()
            if not is_sent and any(there.get(name) != size for name, size in objects):
                raise GoldenNotFound(
                    f"goldens.lock also names {item.title}, which {target.url} does not have",
                    "pull it first, or take it out of goldens.lock",
                )
        missing = {
            file.object_name(name): (set_file(folder, name), file.size)
            for folder, item in sets.items()
            for name, file in sorted(item.files.items())
            if again or there.get(file.object_name(name)) != file.size
        }
        sent = sum(size for _, size in missing.values())
        with _count_megabytes(progress, "pushing (MB)", sent) as advance:
            for name, (file, _) in missing.items():
                target.upload(file, name, advance)
        write_atomically(path, encode(lock))
    moved = tuple(item for item in sets.values() if item not in known)
    return Shared(target.url, tuple(sets.values()), moved, sent)


def _whole_sets(goldens: Path, only: str, held: ExitStack) -> dict[Path, LockedSet]:
    """Return the sets to push, every byte verified; keep recorders away from them."""
    sets = {}
    revisions = set()
    for found in find_goldens(goldens):
        item = lock_set(found.folder, found.require_manifest())
        if not item.is_meant(only):
            continue
        location = item.location(goldens)
        if location.revision_folder not in revisions:
            held.enter_context(recording_lock(location))
            revisions.add(location.revision_folder)
        manifest = load_manifest(found.folder)  # again, since it is locked only now
        refuse_damage(find_damage(found.folder, manifest))
        sets[found.folder] = lock_set(found.folder, manifest)
    if not sets:
        raise GoldenNotFound(
            f"no golden set {only} in {goldens}".replace("  ", " "),
            "snap list shows what is there; snap record makes one",
        )
    return sets

"""Sending golden sets to a remote, and fetching them."""

from __future__ import annotations

import itertools
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from snapshot_tool.base.errors import (
    GoldenDamaged,
    GoldenExists,
    GoldenNotFound,
    SnapError,
    UsageError,
)
from snapshot_tool.base.files import file_sha256
from snapshot_tool.base.protocol import Progress
from snapshot_tool.goldens.find import find_goldens
from snapshot_tool.goldens.layout import INPUTS, MANIFEST, SetLocation
from snapshot_tool.goldens.manifest import Manifest, ManifestSummary, load_manifest
from snapshot_tool.goldens.remote import (
    Advance,
    Remote,
    Shared,
    clean_remote,
    count_megabytes,
    open_remote,
)
from snapshot_tool.goldens.transaction import (
    Lock,
    LockedFile,
    LockedSet,
    commit,
    encode_lock,
    link_or_copy,
    load_lock,
    lock_path,
    lock_set,
    make_folder,
    recording_lock,
    write_atomically,
)
from snapshot_tool.goldens.verify import find_damage, require_whole, set_file


@dataclass(frozen=True, slots=True)
class PullRequest:
    """What to pull.

    Args:
        goldens: the goldens folder; its lock lies beside it.
        remote: the remote's address; None means the lock's.
        only: a part of the names ("owner/name/revision/device-dtype") of the sets that are meant.
        replace: replace sets that were changed here, too.
    """

    goldens: Path
    remote: str | None = None
    only: str = ""
    replace: bool = False


def pull(request: PullRequest, progress: Progress) -> Shared:
    """Fetch what is missing here of the locked sets, and put each revision in place at once."""
    path = lock_path(request.goldens)
    lock = load_lock(path)
    remote = open_remote(request.remote or lock.remote)
    meant = [item for item in lock.sets if item.is_meant(request.only)]
    sets = sorted(meant, key=lambda item: item.identity)
    if not sets:
        raise GoldenNotFound(
            f"{path} names no golden set {request.only}".rstrip(),
            f"it names: {', '.join(item.title for item in lock.sets) or 'none at all'}",
        )
    moved: list[LockedSet] = []
    sent = 0
    for _, group in itertools.groupby(sets, key=lambda item: item.identity[:2]):
        revision = list(group)
        with recording_lock(revision[0].location(request.goldens)):
            missing = [item for item in revision if not _is_here(item, request.goldens)]
            if missing:
                sent += _Pull(request, remote, progress, missing).run()
                moved += missing
    return Shared(remote.url, tuple(sets), tuple(moved), sent)


def _is_here(item: LockedSet, root: Path) -> bool:
    """Tell whether a set lies here, whole, as it is locked."""
    folder = item.location(root).folder
    path = folder / MANIFEST
    if not path.is_file() or file_sha256(path) != item.files[MANIFEST].sha256:
        return False
    manifest = load_manifest(folder)
    return item.describes(manifest) and not find_damage(folder, manifest)


@dataclass(frozen=True, slots=True)
class _Pull:
    """The sets of one revision on their way here."""

    request: PullRequest
    remote: Remote
    progress: Progress
    sets: list[LockedSet]

    def run(self) -> int:
        """Fetch, check, put in place; return how many bytes travelled."""
        self._require_one_inputs_file()
        work = self._location.work_folder / "pull"
        store, tree = work / "objects", work / "tree"
        # Objects that came whole before an earlier pull was cut short are kept.
        make_folder(store)
        shutil.rmtree(tree, ignore_errors=True)
        manifests = {item.files[MANIFEST].object_name(MANIFEST): item for item in self.sets}
        fetched = self._fetch({name: i.files[MANIFEST] for name, i in manifests.items()}, store)
        for item in self.sets:
            self._place(item, (MANIFEST,), store=store, tree=tree)
            self._require_successor(item, load_manifest(tree / item.location(tree).set_name))
        wanted = {f.object_name(n): f for item in self.sets for n, f in item.files.items()}
        fetched += self._fetch(wanted, store)
        for item in self.sets:
            self._place(item, tuple(item.files), store=store, tree=tree)
            folder = tree / item.location(tree).set_name
            require_whole(folder, load_manifest(folder))
        commit(tree, self._location)
        shutil.rmtree(work, ignore_errors=True)
        return fetched

    @property
    def _location(self) -> SetLocation:
        return self.sets[0].location(self.request.goldens)

    def _require_one_inputs_file(self) -> None:
        """All sets of a revision share their inputs: those that stay here, too."""
        pulled = {item.location(self.request.goldens).folder for item in self.sets}
        digests = {item.files[INPUTS].sha256 for item in self.sets}
        for found, manifest in self._neighbours():
            if found not in pulled and INPUTS in manifest.files:
                digests.add(manifest.files[INPUTS].sha256)
        if len(digests) > 1:
            raise GoldenExists(
                f"the golden sets of {self.sets[0].checkpoint} in "
                f"{self._location.revision_folder} would have different inputs",
                "pull all sets of the revision, or remove the ones here",
            )

    def _fetch(self, wanted: dict[str, LockedFile], store: Path) -> int:
        """Bring objects into `store`, from this machine where it has them; count bytes fetched."""
        for name, path in self._local_files().items():
            file = wanted.get(name)
            if file and not (store / name).exists() and file_sha256(path) == file.sha256:
                link_or_copy(path, store / name)
        missing = {name: file for name, file in wanted.items() if not (store / name).exists()}
        sizes = [file.size for file in missing.values()]
        fetched = 0
        with count_megabytes(self.progress, "pulling (MB)", sizes) as advance:
            for name, file in missing.items():
                fetched += _fetch_object(self.remote, name, file, store=store, advance=advance)
        return fetched

    def _local_files(self) -> dict[str, Path]:
        """Return the files that lie in the revision's folder, by the names of their objects."""
        files = {}
        for folder, manifest in self._neighbours():
            for name, file in lock_set(folder, manifest).files.items():
                path = set_file(folder, name)
                if path.is_file():
                    files[file.object_name(name)] = path
        return files

    def _neighbours(self) -> list[tuple[Path, ManifestSummary]]:
        """Return the readable sets that lie in the revision's folder now."""
        found = find_goldens(self.request.goldens)
        folder = self._location.revision_folder
        return [(f.folder, f.manifest) for f in found if f.manifest and f.folder.parent == folder]

    def _place(self, item: LockedSet, names: tuple[str, ...], *, store: Path, tree: Path) -> None:
        folder = tree / item.location(tree).set_name
        make_folder(folder)
        for name in names:
            target = set_file(folder, name)
            if not target.exists():
                link_or_copy(store / item.files[name].object_name(name), target)

    def _require_successor(self, item: LockedSet, pulled: Manifest) -> None:
        """Refuse a manifest that is another set's, and one that would undo a version made here."""
        if not item.describes(pulled):
            raise GoldenDamaged(
                f"the manifest that goldens.lock names for {item.title} is another set's",
                "push the set again, and commit goldens.lock",
            )
        folder = item.location(self.request.goldens).folder
        try:
            here = load_manifest(folder)
        except SnapError:  # missing, or damaged: both are what a pull sets right
            return
        known = pulled.history[: len(here.history)] == here.history
        if not known and not self.request.replace:
            raise GoldenExists(
                f"{here.title} was recorded here and is no earlier version of the one to pull",
                "push it, or throw it away with --replace",
            )


def _fetch_object(
    remote: Remote, name: str, file: LockedFile, *, store: Path, advance: Advance
) -> int:
    """Fetch one object, going on where an earlier try stopped; refuse it unless its digest fits."""
    partial = store / f"{name}.partial"
    start = partial.stat().st_size if partial.exists() else 0
    if start > file.size:
        partial.unlink()
        start = 0
    advance(start)
    fetched = 0
    try:
        with partial.open("ab") as sink:
            for block in remote.blocks(name, start=start, size=file.size):
                fetched += sink.write(block)
                advance(len(block))
    except OSError as error:
        raise SnapError(
            f"cannot write {partial}: {error.strerror}", "make room, then pull again"
        ) from error
    if file_sha256(partial) != file.sha256:
        partial.unlink()
        raise GoldenDamaged(
            f"{remote.url} has other bytes under {name} than goldens.lock says",
            "nothing was changed here; send whole files with: snap push --again",
        )
    partial.replace(store / name)
    return fetched


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

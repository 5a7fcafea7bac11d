"""Sending golden sets to a remote, and fetching them; goldens.lock says what the remote has."""

from __future__ import annotations

import itertools
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from snapshot_tool.base.errors import (
    GoldenDamaged,
    GoldenExists,
    GoldenNotFound,
    LockInvalid,
    SnapError,
    UsageError,
)
from snapshot_tool.base.files import file_sha256
from snapshot_tool.base.protocol import Progress
from snapshot_tool.goldens.find import find_goldens, read_revision
from snapshot_tool.goldens.layout import INPUTS, MANIFEST, SetLocation
from snapshot_tool.goldens.manifest import (
    CheckpointName,
    Count,
    Device,
    Digest,
    Dtype,
    Manifest,
    Positive,
    Revision,
    encode,
    load_manifest,
)
from snapshot_tool.goldens.remote import Remote, clean_remote, count_megabytes, open_remote
from snapshot_tool.goldens.transaction import (
    commit,
    link_or_copy,
    make_folder,
    recording_lock,
    write_atomically,
)
from snapshot_tool.goldens.verify import find_damage, require_whole, set_file

# A name in the set's own folder (or inputs beside it): no folders, nothing hidden.
FileName = Annotated[
    str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_-]*\.(json|safetensors)\Z", max_length=64)
]


class LockedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file: its size in bytes and the SHA-256 of them all."""

    size: Count
    sha256: Digest

    def object_name(self, name: str) -> str:
        """Return the file's name on a remote: its digest, and the suffix of its name here."""
        return self.sha256 + Path(name).suffix


class LockedSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One golden set; `files` includes its manifest."""

    checkpoint: CheckpointName
    revision: Revision
    device: Device
    dtype: Dtype
    golden_version: Positive
    files: dict[FileName, LockedFile]

    def __post_init__(self) -> None:
        """Refuse a set without the files that every set has."""
        for name in (MANIFEST, INPUTS):
            if name not in self.files:
                raise ValueError(f"a set without {name}")

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """What distinguishes the set from all others, in any version."""
        return self.checkpoint, self.revision, self.device, self.dtype

    @property
    def title(self) -> str:
        """The set's name for messages."""
        return f"{self.location(Path())}, golden version {self.golden_version}"

    def location(self, root: Path) -> SetLocation:
        """Return where the set lies below a goldens folder."""
        return SetLocation(root, *self.identity)

    def is_meant(self, part: str) -> bool:
        """Return whether the set's name, owner/name/revision/device-dtype, contains `part`."""
        return part in f"{self.checkpoint}/{self.revision}/{self.device}-{self.dtype}"


class Lock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole of goldens.lock."""

    schema: Literal["snap-lock/1"] = "snap-lock/1"
    remote: str
    sets: tuple[LockedSet, ...]

    def __post_init__(self) -> None:
        """Refuse a set that is named twice."""
        if len({item.identity for item in self.sets}) < len(self.sets):
            raise ValueError("a set is named twice")

    def merged(self, sets: list[LockedSet], *, remote: str) -> Lock:
        """Return the lock with some sets added or replaced, in a fixed order."""
        by_identity = {item.identity: item for item in (*self.sets, *sets)}
        return Lock(remote=remote, sets=tuple(by_identity[key] for key in sorted(by_identity)))


def lock_set(folder: Path, manifest: Manifest) -> LockedSet:
    """Return the entry of a set whose files are known to be as recorded."""
    if INPUTS not in manifest.files:
        raise GoldenDamaged(f"the manifest in {folder} names no {INPUTS}")
    path, checkpoint = folder / MANIFEST, manifest.checkpoint
    own = LockedFile(size=path.stat().st_size, sha256=file_sha256(path))
    files = {n: LockedFile(size=e.size, sha256=e.sha256) for n, e in manifest.files.items()}
    return LockedSet(
        checkpoint=checkpoint.name,
        revision=checkpoint.revision,
        device=manifest.device,
        dtype=manifest.dtype,
        golden_version=manifest.golden_version,
        files={MANIFEST: own, **files},
    )


def lock_path(goldens: Path) -> Path:
    """Return the path of a goldens folder's lock: beside it, so that git can keep it alone."""
    folder = goldens if goldens.name else goldens.resolve()
    return folder.with_name(f"{folder.name}.lock")


def load_lock(path: Path) -> Lock:
    """Read and validate a lock; raise LockInvalid, naming the field, if it breaks the schema."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Lock)
    except FileNotFoundError:
        raise GoldenNotFound(f"{path} is missing", "snap push writes it; keep it in git") from None
    except (OSError, msgspec.DecodeError, RecursionError, ValueError) as error:
        raise LockInvalid(
            f"{path} is not a valid lock: {error}", "restore it from version control"
        ) from error


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
    source = open_remote(remote or lock.remote)
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
        with recording_lock(revision[0].location(goldens)):
            missing = [item for item in revision if not _is_here(item, goldens)]
            if missing:
                sent += _Pull(goldens, source, progress, missing, replace).run()
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


@dataclass(frozen=True, slots=True)
class _Pull:
    """The sets of one revision that are being pulled. The revision is locked."""

    goldens: Path
    remote: Remote
    progress: Progress
    sets: list[LockedSet]
    replace: bool

    def run(self) -> int:
        """Fetch, verify, put in place; return how many bytes were fetched."""
        location = self.sets[0].location(self.goldens)
        here = {
            found.folder: found.manifest
            for found in read_revision(location.revision_folder)
            if found.manifest and INPUTS in found.manifest.files
        }
        self._require_one_inputs_file(here)
        work = location.work_folder / "pull"
        store, tree = work / "objects", work / "tree"
        # Whole objects that an interrupted pull fetched are kept.
        make_folder(store)
        shutil.rmtree(tree, ignore_errors=True)
        for folder, manifest in here.items():
            self._take_local_files(folder, manifest, store)
        fetched = self._fetch((MANIFEST,), store)
        for item in self.sets:
            folder = _place(item, (MANIFEST,), store=store, tree=tree)
            self._require_successor(item, folder)
        fetched += self._fetch(None, store)
        for item in self.sets:
            folder = _place(item, tuple(item.files), store=store, tree=tree)
            require_whole(folder, load_manifest(folder))
        commit(tree, location)
        shutil.rmtree(work, ignore_errors=True)
        return fetched

    def _require_one_inputs_file(self, here: dict[Path, Manifest]) -> None:
        """Raise GoldenExists unless all sets of the revision, pulled or not, share their inputs."""
        pulled = {item.location(self.goldens).folder for item in self.sets}
        digests = {item.files[INPUTS].sha256 for item in self.sets}
        for folder, manifest in here.items():
            if folder not in pulled:
                digests.add(manifest.files[INPUTS].sha256)
        if len(digests) > 1:
            item = self.sets[0]
            revision = item.location(self.goldens).revision_folder
            raise GoldenExists(
                f"the golden sets of {item.checkpoint} in {revision} would have different inputs",
                "pull all sets of the revision, or remove the ones here",
            )

    def _take_local_files(self, folder: Path, manifest: Manifest, store: Path) -> None:
        """Put those files of a set into `store` that are wanted and need not be fetched."""
        wanted = {file.sha256 for item in self.sets for file in item.files.values()}
        for name, file in lock_set(folder, manifest).files.items():
            path, target = set_file(folder, name), store / file.object_name(name)
            if file.sha256 not in wanted or target.exists() or not path.is_file():
                continue
            if file_sha256(path) == file.sha256:
                link_or_copy(path, target)

    def _fetch(self, names: tuple[str, ...] | None, store: Path) -> int:
        """Fetch the named files of all sets (None: all files) that `store` lacks; count bytes."""
        wanted = {
            file.object_name(name): file
            for item in self.sets
            for name, file in item.files.items()
            if names is None or name in names
        }
        missing = {name: file for name, file in wanted.items() if not (store / name).exists()}
        sizes = [file.size for file in missing.values()]
        fetched = 0
        with count_megabytes(self.progress, "pulling (MB)", sizes) as advance:
            for name, file in missing.items():
                partial = store / f"{name}.partial"
                start = partial.stat().st_size if partial.exists() else 0
                if start > file.size:
                    partial.unlink()
                    start = 0
                advance(start)
                try:
                    with partial.open("ab") as sink:
                        for block in self.remote.blocks(name, start=start, size=file.size):
                            fetched += sink.write(block)
                            advance(len(block))
                except OSError as error:
                    raise SnapError(
                        f"cannot write {partial}: {error.strerror}", "make room, then pull again"
                    ) from error
                if file_sha256(partial) != file.sha256:
                    partial.unlink()
                    raise GoldenDamaged(
                        f"{self.remote.url} has other bytes under {name} than goldens.lock says",
                        "nothing was changed here; send whole files with: snap push --again",
                    )
                partial.replace(store / name)
        return fetched

    def _require_successor(self, item: LockedSet, folder: Path) -> None:
        """Refuse a manifest of another set, and one that would undo a version made here."""
        pulled = load_manifest(folder)
        if lock_set(folder, pulled) != item:
            raise GoldenDamaged(
                f"the manifest that goldens.lock names for {item.title} is another set's",
                "push the set again, and commit goldens.lock",
            )
        try:
            here = load_manifest(item.location(self.goldens).folder)
        except SnapError:  # missing or damaged: the pull replaces it
            return
        known = pulled.history[: len(here.history)] == here.history
        if not known and not self.replace:
            raise GoldenExists(
                f"{here.title} was recorded here and is no earlier version of the one to pull",
                "push it, or throw it away with --replace",
            )


def _place(item: LockedSet, names: tuple[str, ...], *, store: Path, tree: Path) -> Path:
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
            f"there is no {path} to say where to push to",
            "name the place: snap push hf://datasets/OWNER/NAME",
        )
    url = clean_remote(address)
    target = open_remote(url)
    with ExitStack() as held:
        sets = _whole_sets(goldens, only, held)
        lock = (old or Lock(remote=url, sets=())).merged(list(sets.values()), remote=url)
        there = target.sizes()
        _require_complete(lock, list(sets.values()), there)
        objects = {
            file.object_name(name): (set_file(folder, name), file.size)
            for folder, item in sets.items()
            for name, file in sorted(item.files.items())
        }
        missing = {n: o for n, o in objects.items() if again or there.get(n) != o[1]}
        sizes = [size for _, size in missing.values()]
        with count_megabytes(progress, "pushing (MB)", sizes) as advance:
            for name, (file, _) in missing.items():
                target.upload(file, name, advance)
        write_atomically(path, encode(lock))
    known = old.sets if old else ()
    moved = tuple(item for item in sets.values() if item not in known)
    return Shared(url, tuple(sets.values()), moved, sum(sizes))


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
        require_whole(found.folder, manifest)
        sets[found.folder] = lock_set(found.folder, manifest)
    if not sets:
        raise GoldenNotFound(
            f"no golden set {only} in {goldens}".replace("  ", " "),
            "snap list shows what is there; snap record makes one",
        )
    return sets


def _require_complete(lock: Lock, sent: list[LockedSet], there: dict[str, int]) -> None:
    """Refuse a lock that names sets which the remote does not have."""
    for item in lock.sets:
        if item in sent:
            continue
        if any(there.get(file.object_name(n)) != file.size for n, file in item.files.items()):
            raise GoldenNotFound(
                f"goldens.lock also names {item.title}, which {lock.remote} does not have",
                "pull it first, or take it out of goldens.lock",
            )

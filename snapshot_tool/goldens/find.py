"""Finding golden sets in a folder: all of them, or the one that a command means. No torch."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.base.checkpoint import (
    Checkpoint,
    checkpoint_name,
    is_folder,
    is_folder_name,
    is_small_file,
    open_checkpoint,
    require_same_files,
)
from snapshot_tool.base.errors import (
    CheckpointUnavailable,
    GoldenDamaged,
    GoldenNotFound,
    ManifestInvalid,
    SnapError,
    UsageError,
)
from snapshot_tool.families.family import ANSWERS, PAGE
from snapshot_tool.goldens.layout import set_folders
from snapshot_tool.goldens.lock import lock_path
from snapshot_tool.goldens.manifest import Manifest, load_manifest
from snapshot_tool.goldens.transaction import committed_revisions, read_undisturbed, replaced_sets

if TYPE_CHECKING:
    from snapshot_tool.goldens.golden import Golden


@dataclass(frozen=True, slots=True)
class FoundSet:
    """A folder that holds a golden set, or looks like it: its manifest, or why there is none."""

    folder: Path
    manifest: Manifest | None
    error: SnapError | None = None

    @property
    def problem(self) -> str:
        """What is wrong with the set, on one line; empty if its manifest could be read."""
        return self.error.problem if self.error else ""

    @property
    def name(self) -> str:
        """The set's path below the goldens folder, which no other set has."""
        return "/".join(self.folder.parts[-3:])

    def require_manifest(self) -> Manifest:
        """Return the manifest; raise the error that kept it from being read."""
        if self.manifest is None:
            raise self.error or GoldenDamaged(f"{self.folder} has no manifest")
        return self.manifest


def named_sets(found: Sequence[FoundSet], name: str) -> list[FoundSet]:
    """Return the sets of the checkpoint of a name, or else those with the text in name or path."""
    checkpoints = [(s, s.manifest.checkpoint.name if s.manifest else "") for s in found]
    exact = [s for s, checkpoint in checkpoints if checkpoint == name]
    return exact or [s for s, checkpoint in checkpoints if name in f"{checkpoint} {s.name}"]


def how_to_get(root: Path, record: str = "record one with: snap record") -> str:
    """Return how to get a golden set that is not here: pulled if there is a lock, else recorded."""
    lock = lock_path(root)
    if not lock.is_file():
        return record
    folder = "" if root == Path("goldens") else f" --goldens {root}"
    return f"fetch the sets that {lock} names: snap pull{folder}"


def check_line(root: Path, *options: str) -> str:
    """Return the command that checks golden sets of a folder."""
    folder = () if root == Path("goldens") else ("--goldens", str(root))
    return shlex.join(("snap", "check", *options, *folder))


def find_goldens(root: Path) -> list[FoundSet]:
    """Return every golden set below `root`, sorted by folder, unreadable ones included."""
    return list(iterate_goldens(root))


def iterate_goldens(root: Path) -> Iterator[FoundSet]:
    """Yield what `find_goldens` returns, one revision after the other."""
    for revision in committed_revisions(root):
        try:
            yield from read_undisturbed(
                revision,
                functools.partial(read_revision, revision),
                is_whole=lambda sets: bool(sets) and all(s.manifest for s in sets),
            )
        except GoldenDamaged as interrupted:
            yield from (FoundSet(f, None, interrupted) for f in replaced_sets(revision))


def read_revision(revision: Path) -> list[FoundSet]:
    """Return the golden sets in a revision's folder as they are now."""
    found = []
    for folder in set_folders(revision):
        try:
            manifest = load_manifest(folder)
            right = manifest.location(revision.parent.parent).folder
            if right != folder:
                raise GoldenDamaged(f"{folder} holds the golden set that belongs in {right}")
            found.append(FoundSet(folder, manifest))
        except SnapError as error:
            found.append(FoundSet(folder, None, error))
    return found


@dataclass(frozen=True, slots=True)
class Selection:
    """What to look for; None means any."""

    checkpoint: str | None = None
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None

    def matches(self, manifest: Manifest) -> bool:
        """Return whether a set is one that is looked for; a revision may be shortened."""
        return (
            self.checkpoint in (None, manifest.checkpoint.name)
            and manifest.checkpoint.revision.startswith(self.revision or "")
            and self.device in (None, manifest.device)
            and self.dtype in (None, manifest.dtype)
        )

    def among(self, found: list[FoundSet]) -> list[FoundSet]:
        """Return the sets that are looked for; their checkpoint may be named as for `snap show`."""
        named = found if self.checkpoint is None else named_sets(found, self.checkpoint)
        rest = dataclasses.replace(self, checkpoint=None)
        return [s for s in named if s.manifest is not None and rest.matches(s.manifest)]

    def __str__(self) -> str:
        """Return what is looked for, for messages."""
        parts = [self.checkpoint or "any checkpoint"]
        if self.revision:
            parts.append(f"at {self.revision[:12]}")
        wanted = [part for part in (self.device, self.dtype) if part]
        return " ".join(parts) + (f" ({'-'.join(wanted)})" if wanted else "")


def select_golden(root: Path, selection: Selection, found: list[FoundSet] | None = None) -> Golden:
    """Open the one golden set that is selected; raise if there is none or several.

    found: what `find_goldens` returned for `root`, if it was called already.
    """
    found = find_goldens(root) if found is None else found
    matching = selection.among(found)
    if len(matching) == 1:
        from snapshot_tool.goldens.golden import open_golden  # not needed for listing

        return open_golden(matching[0].folder, matching[0].manifest)
    if matching:
        names = ", ".join(s.manifest.title for s in matching if s.manifest)
        raise UsageError(
            f"{len(matching)} golden sets in {root} match {selection}: {names}",
            f"choose one, for example --checkpoint {matching[0].name}, or check all: --all",
        )
    for unreadable in found:
        unreadable.require_manifest()
    there = ", ".join(s.manifest.title for s in found if s.manifest) or "no golden set at all"
    checkpoint = f" --checkpoint {selection.checkpoint}" if selection.checkpoint else ""
    raise GoldenNotFound(
        f"no golden for {selection} in {root} (there is: {there})",
        how_to_get(
            root,
            f"record it with: snap record{checkpoint} --revision {selection.revision or 'SHA'} "
            f"--device {selection.device or 'cpu'}",
        ),
    )


@dataclass(frozen=True, slots=True)
class GoldenChoice:
    """Which golden set a command means.

    Args:
        goldens: the folder of all sets.
        checkpoint: folder, hub id, or what `named_sets` takes; None: any.
        revision: or its first digits; None: any.
        device: where the candidate runs.
        golden_device: where the set was recorded; None: on `device`.
        dtype: what the candidate computes in, or None. A set recorded in it is preferred, then one
            in float32.
    """

    goldens: Path
    checkpoint: str | None
    revision: str | None
    device: str
    golden_device: str | None = None
    dtype: str | None = None

    def find(self) -> list[FoundSet]:
        """Return every golden set that may be meant; raise GoldenNotFound if there is none."""
        found = find_goldens(self.goldens)
        matching = self._selection(self.golden_device or self.device, found).among(found)
        if not matching:
            self.open()  # raises the error that names what is missing
        return matching

    def open(self) -> Golden:
        """Open the one set that is meant; name a set of another device if only that is there."""
        recorded_on = self.golden_device or self.device
        found = find_goldens(self.goldens)
        selection = self._selection(recorded_on, found)
        try:
            return select_golden(self.goldens, selection, found)
        except GoldenNotFound as missing:
            other = "cuda" if recorded_on == "cpu" else "cpu"
            if self.golden_device is None and self._selection(other, found).among(found):
                raise GoldenNotFound(
                    f"no golden for {selection} in {self.goldens}, but one recorded on {other}",
                    f"to check on {self.device} against it: --golden-device {other}",
                ) from missing
            raise

    def _selection(self, recorded_on: str, found: list[FoundSet]) -> Selection:
        name = self.checkpoint
        if name is not None and not _is_golden_name(name, found) and is_folder(name):
            # A folder may be a copy of a hub checkpoint under any name: then its digests decide.
            name = checkpoint_name(name)
            if name not in [s.manifest.checkpoint.name for s in found if s.manifest]:
                name = None
        selection = Selection(name, self.revision, recorded_on)
        dtypes = {s.manifest.dtype for s in selection.among(found) if s.manifest}
        if len(dtypes) > 1:
            dtype = self.dtype if self.dtype in dtypes else "float32"
            selection = dataclasses.replace(selection, dtype=dtype)
        return selection


def _is_golden_name(spec: str, found: Sequence[FoundSet]) -> bool:
    """Return whether --checkpoint names golden sets, and is not a path."""
    if Path(spec).is_dir() or spec.startswith((".", "/", "~")):
        return False
    return bool(named_sets(found, spec))


def open_checkpoint_of(golden: Golden, spec: str | None, *, weights: bool = True) -> Checkpoint:
    """Open the checkpoint `spec`, by default or for the golden's name the one that it names.

    weights: whether they are needed.

    Raises RevisionMismatch unless its files are those that the golden was recorded from.
    """
    entry = golden.manifest.checkpoint
    revision: str | None = entry.revision
    if spec and _is_golden_name(spec, [FoundSet(golden.folder, golden.manifest)]):
        spec = None
    if spec is None and entry.location is not None:
        spec = str(golden.root.absolute().parent / entry.location)
    if spec is None and is_folder_name(entry.name):
        raise CheckpointUnavailable(
            f"the golden does not name the folder of {entry.name}", "pass --checkpoint DIR"
        )
    if spec is not None and is_folder(spec):
        revision = None
    checkpoint = open_checkpoint(spec or entry.name, revision=revision, weights=weights)
    files = {name: digest for name, digest in entry.files.items() if weights or is_small_file(name)}
    require_same_files(checkpoint, files)
    _require_known_family(golden)  # last, since it may run the user's code
    return checkpoint


def _require_known_family(golden: Golden) -> None:
    try:
        family = golden.family
    except UsageError as unknown:
        raise ManifestInvalid(
            f"{golden.folder}: {unknown.problem}",
            f"name the file that declares it: --family FILE.py (see {PAGE}), or update snap",
        ) from unknown
    recorded = golden.manifest.environment.get(ANSWERS, family.answers)
    if recorded != family.answers:
        raise ManifestInvalid(
            f"{golden.folder} holds other outputs than {family.name} now declares: it has "
            f"{recorded}; declared are {family.answers}",
            "name the file that it was recorded with, or record the set again with --update",
        )

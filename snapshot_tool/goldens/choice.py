"""Which golden set a command means, and which checkpoint goes with it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from snapshot_tool.base.checkpoint import (
    Checkpoint,
    checkpoint_name,
    is_folder,
    is_folder_name,
    open_checkpoint,
    require_same_files,
)
from snapshot_tool.base.errors import (
    CheckpointUnavailable,
    GoldenNotFound,
    ManifestInvalid,
    UsageError,
)
from snapshot_tool.families import family_of
from snapshot_tool.families.family import ANSWERS, PAGE
from snapshot_tool.goldens.find import FoundSet, Selection, find_goldens, select_golden
from snapshot_tool.goldens.golden import Golden


@dataclass(frozen=True, slots=True)
class GoldenChoice:
    """What is said of the golden set that is meant.

    Args:
        goldens: the folder of all sets.
        checkpoint: folder or hub id; None: any.
        revision: or its first digits; None: any.
        device: where the candidate runs.
        golden_device: where the set was recorded; None: on `device`.
        dtype: what the candidate computes in, or None; a set recorded in it comes first, then one
            in float32.
    """

    goldens: Path
    checkpoint: str | None
    revision: str | None
    device: str
    golden_device: str | None = None
    dtype: str | None = None

    def find(self) -> list[FoundSet]:
        """Return every golden set that may be meant; raise GoldenNotFound where none is."""
        found = find_goldens(self.goldens)
        selection = self._selection(self.golden_device or self.device, found)
        matching = [s for s in found if s.manifest is not None and selection.matches(s.manifest)]
        if not matching:
            self.open()  # says what is missing
        return matching

    def open(self) -> Golden:
        """Open the one set that is meant; say so where only another device's is there."""
        recorded_on = self.golden_device or self.device
        found = find_goldens(self.goldens)
        selection = self._selection(recorded_on, found)
        try:
            return select_golden(self.goldens, selection, found)
        except GoldenNotFound as missing:
            other = "cuda" if recorded_on == "cpu" else "cpu"
            elsewhere = self._selection(other, found)
            there = any(s.manifest and elsewhere.matches(s.manifest) for s in found)
            if self.golden_device is None and there:
                raise GoldenNotFound(
                    f"no golden for {selection} in {self.goldens}, but one recorded on {other}",
                    f"to check on {self.device} against it: --golden-device {other}",
                ) from missing
            raise

    def _selection(self, recorded_on: str, found: list[FoundSet]) -> Selection:
        selection = Selection(self._name(found), self.revision, recorded_on)
        there = [s.manifest.dtype for s in found if s.manifest and selection.matches(s.manifest)]
        if len(set(there)) > 1:
            dtype = self.dtype if self.dtype in there else "float32"
            selection = dataclasses.replace(selection, dtype=dtype)
        return selection

    def _name(self, found: list[FoundSet]) -> str | None:
        """Return the checkpoint's name to look for.

        A folder may be a copy of a hub checkpoint, under any name: then its digests decide.
        """
        if self.checkpoint is None:
            return None
        name = checkpoint_name(self.checkpoint)
        known = {s.manifest.checkpoint.name for s in found if s.manifest}
        return name if name in known or not is_folder(self.checkpoint) else None


def open_checkpoint_of(golden: Golden, spec: str | None) -> Checkpoint:
    """Open the checkpoint `spec`, or the one that the golden names where it is None.

    Raises RevisionMismatch unless its files are those that the golden was recorded from.
    """
    checkpoint = _open(golden, spec)
    require_same_files(checkpoint, golden.manifest.checkpoint.files)
    _require_known_family(golden)  # not before: it may run the user's code
    return checkpoint


def _require_known_family(golden: Golden) -> None:
    try:
        family = family_of(golden.manifest.checkpoint.family)
    except UsageError as unknown:
        raise ManifestInvalid(
            f"{golden.folder}: {unknown.problem}",
            f"name the file that declares it: --family FILE.py (see {PAGE}), or update snap",
        ) from unknown
    recorded = golden.manifest.environment.get(ANSWERS, family.answers)
    if recorded != family.answers:
        raise ManifestInvalid(
            f"{golden.folder} holds other answers than {family.name} now declares: it has "
            f"{recorded}; declared are {family.answers}",
            "name the file that it was recorded with, or record the set again with --update",
        )


def _open(golden: Golden, spec: str | None) -> Checkpoint:
    entry = golden.manifest.checkpoint
    if spec is not None:
        return open_checkpoint(spec, revision=None if is_folder(spec) else entry.revision)
    if entry.location is not None:
        return open_checkpoint(str(golden.root.absolute().parent / entry.location), revision=None)
    if is_folder_name(entry.name):
        raise CheckpointUnavailable(
            f"the golden does not say where the folder of {entry.name} is", "pass --checkpoint DIR"
        )
    return open_checkpoint(entry.name, revision=entry.revision)

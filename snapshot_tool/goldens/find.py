"""Finding golden sets in a folder, and the one that is meant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.base.errors import GoldenDamaged, GoldenNotFound, SnapError, UsageError
from snapshot_tool.goldens.layout import SetLocation, find_set_folders, folder_identities
from snapshot_tool.goldens.manifest import ManifestSummary, load_head, load_summary
from snapshot_tool.goldens.transaction import is_being_replaced, recover

if TYPE_CHECKING:
    from snapshot_tool.goldens.golden import Golden

_TRIES = 20


@dataclass(frozen=True, slots=True)
class FoundSet:
    """A folder that holds a golden set, or claims to: its manifest, or why it cannot be read."""

    folder: Path
    manifest: ManifestSummary | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Selection:
    """What to look for; None means any."""

    checkpoint: str | None = None
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None

    def matches(self, manifest: ManifestSummary) -> bool:
        """Tell whether a set is one that is looked for; a revision may be shortened."""
        return (
            self.checkpoint in (None, manifest.checkpoint.name)
            and manifest.checkpoint.revision.startswith(self.revision or "")
            and self.device in (None, manifest.device)
            and self.dtype in (None, manifest.dtype)
        )

    def __str__(self) -> str:
        """Name what is looked for."""
        parts = [self.checkpoint or "any checkpoint"]
        if self.revision:
            parts.append(f"at {self.revision[:12]}")
        wanted = [part for part in (self.device, self.dtype) if part]
        return " ".join(parts) + (f" ({'-'.join(wanted)})" if wanted else "")


def find_goldens(root: Path, *, briefly: bool = False) -> list[FoundSet]:
    """Return every golden set under `root`, unreadable ones included.

    Where a recorder puts another version in place meanwhile, the search begins again.

    briefly: read summaries, which is twice as quick; a set that is wrong elsewhere looks sound.
    """
    load = load_summary if briefly else load_head
    for _ in range(_TRIES):
        recover(root)
        before = folder_identities(root)
        found = [_read_set(root, folder, load) for folder in find_set_folders(root)]
        if folder_identities(root) == before and not is_being_replaced(root):
            break
    return found


def _read_set(root: Path, folder: Path, load: Callable[[Path], ManifestSummary]) -> FoundSet:
    try:
        manifest = load(folder)
    except SnapError as error:
        return FoundSet(folder, None, error.problem)
    checkpoint = manifest.checkpoint
    place = SetLocation(
        root, checkpoint.name, checkpoint.revision, manifest.device, manifest.dtype
    ).folder
    if place != folder:
        return FoundSet(folder, None, f"{folder} holds the golden set that belongs in {place}")
    return FoundSet(folder, manifest)


def select_golden(
    root: Path, selection: Selection, found: Sequence[FoundSet] | None = None
) -> Golden:
    """Open the one golden set that answers to `selection`; raise where there is none or several.

    `found` is what `find_goldens` returned, where it was asked already.
    """
    found = find_goldens(root) if found is None else found
    matching = [s for s in found if s.manifest is not None and selection.matches(s.manifest)]
    if len(matching) == 1:
        from snapshot_tool.goldens.golden import open_golden  # whoever only lists opens none

        return open_golden(matching[0].folder)
    if matching:
        names = ", ".join(s.manifest.title for s in matching if s.manifest)
        raise UsageError(
            f"{len(matching)} golden sets in {root} answer to {selection}: {names}",
            "choose one with --checkpoint, --revision, --device or --dtype",
        )
    unreadable = [s for s in found if s.manifest is None]
    if unreadable:
        raise GoldenDamaged(unreadable[0].problem, "see snap verify")
    there = ", ".join(s.manifest.title for s in found if s.manifest) or "no golden set at all"
    device = selection.device or "cpu"
    revision = selection.revision or "SHA"
    checkpoint = f" --checkpoint {selection.checkpoint}" if selection.checkpoint else ""
    raise GoldenNotFound(
        f"no golden for {selection} in {root} (there is: {there})",
        f"record it with: snap record{checkpoint} --revision {revision} --device {device}",
    )

"""Golden sets without running a model: list, show, verify, diff."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.base.errors import GoldenNotFound, SnapError, UsageError, suggest
from snapshot_tool.goldens.find import (
    FoundSet,
    find_goldens,
    how_to_get,
    iterate_goldens,
    named_sets,
)
from snapshot_tool.goldens.layout import MANIFEST
from snapshot_tool.goldens.manifest import Manifest, load_manifest
from snapshot_tool.goldens.verify import verify_set

if TYPE_CHECKING:
    from snapshot_tool.base.localisation import Localisation
    from snapshot_tool.goldens.golden import Golden


@dataclass(frozen=True, slots=True)
class Verification:
    """A golden set and its damage, one line for each problem; empty if it is intact."""

    folder: Path
    title: str
    damage: tuple[str, ...]


def find_golden(root: Path, spec: str | None) -> tuple[Path, Manifest]:
    """Return the only set that `spec` matches.

    spec: a set's folder, a folder with one set, a part of a path below `root`, or the checkpoint's
    name; None: the only set.
    """
    if spec and (Path(spec) / MANIFEST).is_file():
        return Path(spec), load_manifest(Path(spec))
    matching = find_goldens(Path(spec)) if spec and Path(spec).is_dir() else []
    found = [] if matching else find_goldens(root)
    if not matching:
        matching = found if spec is None else named_sets(found, spec.strip("/"))
    if not matching and spec and found:
        there = {one.manifest.checkpoint.name if one.manifest else one.name for one in found}
        raise GoldenNotFound(f"no golden set {spec} in {root}", suggest(spec, sorted(there)))
    if not matching:
        raise GoldenNotFound(f"no golden set in {root}", how_to_get(root))
    if len(matching) > 1:
        names = ", ".join(str(one.folder) for one in matching)
        raise UsageError(
            f"{spec or root} matches {len(matching)} golden sets", f"name one: {names}"
        )
    return matching[0].folder, matching[0].require_manifest()


def verify_goldens(root: Path, spec: str | None) -> list[Verification]:
    """Compare every byte of the sets below `root`, or of one set, with the digests."""
    sets = iterate_goldens(root) if spec is None else [FoundSet(*find_golden(root, spec))]
    verified = [_verify(found) for found in sets]
    if not verified:
        raise GoldenNotFound(f"no golden set in {root}", how_to_get(root))
    return verified


def _verify(found: FoundSet) -> Verification:
    if found.manifest is None:
        return Verification(found.folder, str(found.folder), (found.problem,))
    try:
        manifest, damage = verify_set(found.folder, found.manifest)
    except SnapError as error:
        return Verification(found.folder, found.manifest.title, (error.problem,))
    return Verification(found.folder, manifest.title, tuple(damage))


def open_both(root: Path, one: str, other: str) -> tuple[Golden, Golden]:
    """Open two sets, named as for `find_golden`."""
    from snapshot_tool.goldens.golden import open_golden

    return open_golden(*find_golden(root, one)), open_golden(*find_golden(root, other))


def locate_difference(one: Golden, other: Golden) -> Localisation | None:
    """Return the first module whose sketches differ between two sets, in the first such case.

    Returns None if no module differs.
    """
    from snapshot_tool.diagnose.localise import localise

    shared = {case.name for case in other.manifest.cases}
    for case in (case.name for case in one.manifest.cases if case.name in shared):
        theirs = {tap.module: tap for tap in other.taps(case)}
        found = localise(case, one.taps(case), theirs, {})
        if found.first_bad or found.between:
            return found
    return None

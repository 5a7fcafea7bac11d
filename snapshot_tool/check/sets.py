"""Looking at golden sets without running a model: list, show, verify, diff."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.base.errors import GoldenNotFound, SnapError, UsageError
from snapshot_tool.goldens.find import FoundSet, Selection, find_goldens
from snapshot_tool.goldens.layout import MANIFEST
from snapshot_tool.goldens.manifest import Manifest, load_manifest
from snapshot_tool.goldens.verify import find_lasting_damage

if TYPE_CHECKING:
    from snapshot_tool.base.localisation import Localisation


@dataclass(frozen=True, slots=True)
class Verification:
    """One set and what is wrong with it; nothing, where it is whole."""

    folder: Path
    title: str
    damage: tuple[str, ...]


def list_goldens(root: Path) -> list[FoundSet]:
    """Return every golden set below a folder; what is wrong deep in one, `verify` tells."""
    return find_goldens(root, briefly=True)


def find_golden(root: Path, spec: str | None) -> tuple[Path, Manifest]:
    """Return the one set that `spec` names.

    A set's folder, a folder of sets with one in it, a part of a path below `root`, or nothing.
    """
    if spec and (Path(spec) / MANIFEST).is_file():
        return Path(spec), load_manifest(Path(spec))
    matching = find_goldens(Path(spec)) if spec and Path(spec).is_dir() else []
    if not matching:
        matching = [found for found in find_goldens(root) if spec is None or _is_named(found, spec)]
    if not matching:
        raise GoldenNotFound(
            f"no golden set {spec or ''} in {root}".replace("  ", " "),
            "snap list shows what is there; snap record makes one",
        )
    if len(matching) > 1:
        names = ", ".join(str(found.folder) for found in matching)
        raise UsageError(
            f"{spec or root} stands for {len(matching)} golden sets", f"name one: {names}"
        )
    return matching[0].folder, load_manifest(matching[0].folder)


def _is_named(found: FoundSet, spec: str) -> bool:
    """Tell whether a set's path or checkpoint contains what the user wrote."""
    name = Selection(checkpoint=spec)
    by_checkpoint = found.manifest is not None and name.matches(found.manifest)
    return by_checkpoint or spec.strip("/") in found.folder.as_posix()


def verify_goldens(root: Path, spec: str | None) -> list[Verification]:
    """Read every byte of the sets below `root` (or of the one named) and compare digests."""
    found = find_goldens(root)
    if spec is not None:
        folder, manifest = find_golden(root, spec)
        found = [FoundSet(folder, manifest)]
    if not found:
        raise GoldenNotFound(f"no golden set in {root}", "name another folder with --goldens")
    return [_verify(item) for item in found]


def _verify(found: FoundSet) -> Verification:
    if found.manifest is None:
        return Verification(found.folder, str(found.folder), (found.problem,))
    try:
        manifest, damage = find_lasting_damage(found.folder)
    except SnapError as error:  # below the head of its manifest
        return Verification(found.folder, found.manifest.title, (error.problem,))
    return Verification(found.folder, manifest.title, tuple(damage))


def locate_drift(one_folder: Path, other_folder: Path) -> Localisation | None:
    """Return where the second set's reference parts from the first's, from the sketches of both.

    The first case whose modules differ tells; None where those of no case do.
    """
    from snapshot_tool.diagnose.localise import localise
    from snapshot_tool.goldens.golden import open_golden

    one, other = open_golden(one_folder), open_golden(other_folder)
    shared = {case.name for case in other.manifest.cases}
    for case in (case.name for case in one.manifest.cases if case.name in shared):
        theirs = {tap.module: tap for tap in other.taps(case)}
        found = localise(case, one.taps(case), theirs, {})
        if found.first_bad or found.between:
            return found
    return None

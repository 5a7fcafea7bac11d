"""A mutant: one fault in the FMS checkout, planted by editing its source or by changing a weight.

What a mutant says of itself (phase, place) was written down before it was run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Places that are no module of the reference.
PREPROCESSING = "preprocessing"
GENERATION = "the generation loop"
MODEL = "the model's own code"

# Where a mutant shows that no recorded phase can show, and one that cannot even be loaded.
DERIVED = "derived"
LOADING = "loading"


@dataclass(frozen=True, slots=True)
class Edit:
    """What becomes of which text in which file of a checkout; the text is there exactly once."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the loaded model's weights, in words and as a function."""

    words: str
    apply: Callable[[torch.nn.Module], None]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault.

    Args:
        name: what it is called in docs/detection.md.
        what: the fault in a few words.
        phase: the first phase that shows it, DERIVED, or LOADING.
        place: the reference's module that it is in, or PREPROCESSING, GENERATION or MODEL.
        fault: how it is planted.
        also: places that name it as well, for a fault that lies between two modules.
    """

    name: str
    what: str
    phase: str
    place: str
    fault: Edit | Change
    also: tuple[str, ...] = ()


def plant(edit: Edit, *, checkout: Path, out: Path) -> None:
    """Copy a checkout to `out` and edit one file of the copy; git sees it as a change."""
    shutil.copytree(checkout, out, ignore=shutil.ignore_patterns("__pycache__"))
    edit_file(edit, root=out)


def plant_linked(edit: Edit | None, *, checkout: Path, out: Path) -> None:
    """Lay out a checkout's package at `out`, without git, in links to its files but the edited one.

    Compiled files come along: they stay valid, which makes the import several times faster.
    """
    shutil.copytree(checkout / "fms", out / "fms", copy_function=os.link)
    if edit is not None:
        edit_file(edit, root=out)


def edit_file(edit: Edit, *, root: Path) -> None:
    """Replace the text; raise ValueError unless the file has it exactly once."""
    path = root / edit.file
    source = path.read_text(encoding="utf-8")
    if source.count(edit.old) != 1:
        raise ValueError(f"{edit.file} has {source.count(edit.old)} times, not once: {edit.old!r}")
    path.unlink()  # it may be a link to the original
    path.write_text(source.replace(edit.old, edit.new), encoding="utf-8")
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()

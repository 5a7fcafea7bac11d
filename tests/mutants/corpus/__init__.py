"""The corpus: single faults that a person could make, in a file for each part of the port.

An entry of a file, with an empty line after it:

    name: the fault in a few words
    first phase that shows it | places that may be named | file of the checkout
    -text that the file has exactly once
    +text in its place

A fault in a weight has the weight's name in place of the file, and one line `*operation`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.mutants.mutant import Change, Edit, Mutant

_GROUPS = (
    "preprocessing",
    "vision",
    "connector",
    "text",
    "merging",
    "generation",
    "weights",
    "further",
    "held-out",
)


def read_mutants(path: Path) -> Iterator[Mutant]:
    """Read the entries of a file."""
    comment, *entries = path.read_text(encoding="utf-8").rstrip("\n").split("\n\n")
    assert comment.startswith("#"), path
    for entry in entries:
        title, about, *lines = entry.split("\n")
        name, _, what = title.partition(": ")
        phase, places, subject = about.split(" | ")
        fault: Edit | Change
        if lines[0].startswith("*"):
            fault = Change(subject, lines[0][1:])
        else:
            old, new = (
                "\n".join(line[1:] for line in lines if line.startswith(sign)) for sign in "-+"
            )
            fault = Edit(subject, old, new)
        yield Mutant(name, what, phase, tuple(places.split(", ")), fault)


GROUPS: Mapping[str, tuple[Mutant, ...]] = {
    group: tuple(read_mutants(Path(__file__).parent / f"{group}.txt")) for group in _GROUPS
}

MUTANTS: Mapping[str, Mutant] = {
    mutant.name: mutant for mutants in GROUPS.values() for mutant in mutants
}


def edit_of(name: str) -> Edit:
    """Return the edit of a mutant; raise TypeError if it changes a weight."""
    fault = MUTANTS[name].fault
    if not isinstance(fault, Edit):
        raise TypeError(f"{name} changes a weight, not the source")
    return fault

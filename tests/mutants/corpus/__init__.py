"""The corpus: single faults that a person could make, by the part of the port that they are in."""

from collections.abc import Mapping

from tests.mutants.corpus.connector import CONNECTOR
from tests.mutants.corpus.further import FURTHER
from tests.mutants.corpus.generation import GENERATION
from tests.mutants.corpus.merging import MERGING
from tests.mutants.corpus.preprocessing import PREPROCESSING
from tests.mutants.corpus.text import TEXT
from tests.mutants.corpus.vision import VISION
from tests.mutants.corpus.weights import WEIGHTS
from tests.mutants.mutant import Edit, Mutant

GROUPS: Mapping[str, tuple[Mutant, ...]] = {
    "preprocessing": PREPROCESSING,
    "vision": VISION,
    "connector": CONNECTOR,
    "text": TEXT,
    "merging": MERGING,
    "generation": GENERATION,
    "weights": WEIGHTS,
    "further": FURTHER,
}

MUTANTS: Mapping[str, Mutant] = {
    mutant.name: mutant for mutants in GROUPS.values() for mutant in mutants
}


def edit_of(name: str) -> Edit:
    """Return the edit of a mutant that is one; raise ValueError for a changed weight."""
    fault = MUTANTS[name].fault
    if not isinstance(fault, Edit):
        raise ValueError(f"{name} is no edit of the source")  # noqa: TRY004 - it is about the name
    return fault

"""Which module of a candidate corresponds to which of the reference, and how that is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModuleMapping:
    """How modules were matched.

    Args:
        names: the candidate's name of each module that has a partner, by the reference's.
        inferred: whether shapes, order of execution and values matched them, not names.
        by: whose names matched them.
        confirmed: how many partners computed the same values.
        modules: how many modules of the reference looked for a partner.
    """

    names: Mapping[str, str]
    inferred: bool = False
    confirmed: int = 0
    modules: int = 0
    by: str = "the family's names"

    def __str__(self) -> str:
        """Say it in a sentence."""
        if not self.inferred:
            return f"modules matched by {self.by}"
        return (
            "modules inferred from shapes and order, "
            f"{self.confirmed} of {self.modules} confirmed by values"
        )

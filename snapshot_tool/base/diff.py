"""How far two golden sets are apart, as plain data: what `snap diff` and the review show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from snapshot_tool.base.phases import PHASES
from snapshot_tool.base.results import Comparison, Verdict
from snapshot_tool.base.tolerance import Tolerance

INPUTS_PART = "inputs"


@dataclass(frozen=True, slots=True)
class Drift:
    """One tensor that is not the same in both sets.

    Args:
        part: "inputs" or the phase.
        case: the case's name.
        tensor: the tensor's name.
        verdict: pass where the difference is within tolerance.
        reason: what differs, in words.
        comparison: the figures; None where the tensors cannot be compared.
        tolerance: the first set's, by which they are judged.
    """

    part: str
    case: str
    tensor: str
    verdict: Verdict
    reason: str
    comparison: Comparison | None = None
    tolerance: Tolerance | None = None

    @property
    def used(self) -> float | None:
        """How many tolerances the worst element is off; None where the tolerance is exact."""
        if self.comparison is None or self.tolerance is None or self.comparison.worst is None:
            return None
        worst = self.comparison.worst
        allowed = self.tolerance.atol + self.tolerance.rtol * abs(worst.expected)
        return abs(worst.actual - worst.expected) / allowed if allowed else None


@dataclass(frozen=True, slots=True)
class PartDrift:
    """One part of the set: how many tensors both have together, how many moved, how far.

    Args:
        part: "inputs" or the phase.
        tensors: how many there are.
        moved: those whose bytes differ.
        beyond: those beyond tolerance, or without a partner.
        largest: the largest |difference|; None where none can be measured.
        worst: the moved tensor furthest off in units of its tolerance, or the first one that cannot
            be measured.
    """

    part: str
    tensors: int
    moved: int
    beyond: int
    largest: float | None
    worst: Drift


@dataclass(frozen=True, slots=True)
class TextDrift:
    """A generation whose tokens differ: the first step that does, and both texts."""

    case: str
    step: int
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class SetIdentity:
    """A golden set's title and where it lies."""

    title: str
    folder: str


@dataclass(frozen=True, slots=True)
class SetDrift:
    """All that differs between two golden sets.

    Args:
        environment: versions and flags that differ, both values by name.
        tensors: how many tensors each part has, by its name.
        drifts: the tensors that moved, in the order of parts and keys.
        texts: the generations whose tokens moved.
        files: what one of both has beside its phases and the other has not: "oracle: added".
    """

    one: SetIdentity
    other: SetIdentity
    environment: Mapping[str, tuple[str, str]]
    tensors: Mapping[str, int]
    drifts: tuple[Drift, ...]
    texts: tuple[TextDrift, ...]
    files: tuple[str, ...] = ()

    @property
    def beyond(self) -> tuple[Drift, ...]:
        """The tensors beyond tolerance."""
        return tuple(drift for drift in self.drifts if drift.verdict is not Verdict.PASS)

    def parts(self) -> list[PartDrift]:
        """Return the parts that moved, in the order of phases."""
        parts = []
        for name in (INPUTS_PART, *PHASES):
            found = [drift for drift in self.drifts if drift.part == name]
            if found:
                parts.append(_part(str(name), self.tensors.get(name, len(found)), found))
        return parts


# Shown what an update changes, before anything is written: returns why it may be, or raises
# UpdateDeclined.
Review = Callable[[SetDrift], str]


def _part(name: str, tensors: int, found: list[Drift]) -> PartDrift:
    sizes = [drift.comparison.max_abs for drift in found if drift.comparison]
    return PartDrift(
        part=name,
        tensors=tensors,
        moved=len(found),
        beyond=sum(drift.verdict is not Verdict.PASS for drift in found),
        largest=max(sizes, key=_nan_last) if sizes else None,
        worst=max(found, key=_severity),
    )


def _severity(drift: Drift) -> tuple[bool, float, float]:
    """Order by verdict, then by units of tolerance, then by plain size."""
    used = math.inf if drift.comparison is None else drift.used or 0.0
    size = drift.comparison.max_abs if drift.comparison else math.inf
    return drift.verdict is not Verdict.PASS, _nan_last(used), _nan_last(size)


def _nan_last(value: float) -> float:
    """Let NaN be worse than any number."""
    return math.inf if math.isnan(value) else value


def describe_drift(drift: SetDrift) -> list[str]:
    """Return one line for each part that moved, as the history in the manifest keeps it."""
    lines = []
    for part in drift.parts():
        line = f"{part.part}: {part.moved} tensors moved, {part.beyond} beyond tolerance"
        if part.largest is not None:
            line += f", largest difference {part.largest:.3g}"
        if part.worst.used is not None:
            line += f", {part.worst.used:.2g}x tolerance at worst"
        lines.append(line)
    for text in drift.texts:
        lines.append(f"tokens of {text.case} change from step {text.step}")
    return [*lines, *drift.files]

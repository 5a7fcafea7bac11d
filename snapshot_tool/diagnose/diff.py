"""What differs between two golden sets, tensor by tensor, by the first one's tolerances."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from snapshot_tool.base.errors import GoldenDamaged
from snapshot_tool.base.phases import PHASES, Phase
from snapshot_tool.base.results import Comparison, Verdict
from snapshot_tool.base.tolerance import EXACT, Tolerance
from snapshot_tool.goldens.compact import QUESTION
from snapshot_tool.goldens.golden import Golden, open_golden
from snapshot_tool.goldens.layout import INPUTS, ORACLE, OUTPUTS, phase_file
from snapshot_tool.goldens.manifest import TensorEntry
from snapshot_tool.goldens.parts import PLACES
from snapshot_tool.numerics.compare import judge_tensor

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


_TOKENS = "token_ids"


def diff_folders(one: Path, other: Path) -> SetDrift:
    """Open two sets by folder and return what differs."""
    return diff_goldens(open_golden(one), open_golden(other))


def diff_goldens(one: Golden, other: Golden) -> SetDrift:
    """Return every tensor that differs, in the order of phases and keys; equal bytes are equal."""
    drifts = []
    counts = {}
    for part in (INPUTS_PART, *PHASES):
        file = INPUTS if part == INPUTS_PART else phase_file(Phase(part))
        entries = [
            golden.manifest.files[file].tensors if file in golden.manifest.files else {}
            for golden in (one, other)
        ]
        keys = sorted(entries[0].keys() | entries[1].keys())
        if one.manifest.storage is not other.manifest.storage:
            keys = [key for key in keys if _is_comparable(key, one, other, entries)]
        counts[str(part)] = len(keys)
        for key in keys:
            sides = entries[0].get(key), entries[1].get(key)
            if sides[0] != sides[1]:
                drifts.append(_drift(one, other, part, key, sides))
    return SetDrift(
        one=_identity(one),
        other=_identity(other),
        environment=_environment(one, other),
        tensors=counts,
        drifts=tuple(drifts),
        texts=tuple(_texts(one, other, drifts)),
        files=tuple(_extra_files(one, other)),
    )


def _is_comparable(
    key: str, one: Golden, other: Golden, entries: Sequence[Mapping[str, TensorEntry]]
) -> bool:
    """Tell whether a full and a compact set keep the same under a key, or lack a whole case.

    A connector that was asked something else has another answer.
    """
    case = key.partition("/")[0]
    if not all(case in {entry.name for entry in g.manifest.cases} for g in (one, other)):
        return True
    asked_otherwise = any(f"{case}/{QUESTION}.shape" in tensors for tensors in entries)
    return all(key in tensors for tensors in entries) and not asked_otherwise


def _extra_files(one: Golden, other: Golden) -> Iterator[str]:
    if one.manifest.storage is not other.manifest.storage:
        storages = f"{one.manifest.storage} became {other.manifest.storage}"
        yield f"storage: {storages}; only what both keep the same way is compared"
    for name, kind in ((ORACLE, "oracle"), (OUTPUTS, "whole outputs")):
        before, after = (name in golden.manifest.files for golden in (one, other))
        if before != after:
            yield f"{kind}: {'added' if after else 'dropped'}"


def _identity(golden: Golden) -> SetIdentity:
    return SetIdentity(golden.manifest.title, str(golden.folder))


def _environment(one: Golden, other: Golden) -> dict[str, tuple[str, str]]:
    sides = one.manifest.environment, other.manifest.environment
    names = sorted(sides[0].keys() | sides[1].keys())
    both = {name: (sides[0].get(name, ""), sides[1].get(name, "")) for name in names}
    return {name: (before, after) for name, (before, after) in both.items() if before != after}


def _drift(
    one: Golden,
    other: Golden,
    part: str,
    key: str,
    sides: tuple[TensorEntry | None, TensorEntry | None],
) -> Drift:
    case, _, name = key.partition("/")
    for golden, side in zip((one, other), sides, strict=True):
        if side is None:
            return Drift(part, case, name, Verdict.FAIL, f"not in {golden.folder}")
    try:
        expected, actual = (golden.read(part, key) for golden in (one, other))
    except GoldenDamaged as error:  # as by a NaN in it
        return Drift(part, case, name, Verdict.FAIL, error.problem)
    tolerance = _tolerance(one, part, case) if expected.is_floating_point() else EXACT
    verdict, reason, comparison = judge_tensor(expected, actual, tolerance)
    if name in PLACES and actual.shape == expected.shape:
        return Drift(part, case, name, Verdict.PASS, "places, judged by the values beside them")
    return Drift(part, case, name, verdict, reason, comparison, tolerance)


def _tolerance(golden: Golden, part: str, case: str) -> Tolerance:
    if part == INPUTS_PART:
        return EXACT
    # What generation keeps besides its tokens are logits.
    part = Phase.FORWARD if part == Phase.GENERATE else part
    return golden.manifest.tolerances[Phase(part)].for_images(golden.case(case).images)


def _texts(one: Golden, other: Golden, drifts: list[Drift]) -> list[TextDrift]:
    """Return the generations whose tokens differ, as text."""
    found = []
    for drift in drifts:
        if drift.tensor != _TOKENS or drift.part != Phase.GENERATE:
            continue
        key = f"{drift.case}/{_TOKENS}"
        files = [golden.manifest.files.get(phase_file(Phase.GENERATE)) for golden in (one, other)]
        if any(file is None or key not in file.tensors for file in files):
            continue
        before, after = (golden.read(Phase.GENERATE, key).tolist() for golden in (one, other))
        same = [a == b for a, b in zip(before, after, strict=False)]
        step = same.index(False) if False in same else len(same)
        texts = (golden.case(drift.case).generated for golden in (one, other))
        found.append(TextDrift(drift.case, step, *texts))
    return found

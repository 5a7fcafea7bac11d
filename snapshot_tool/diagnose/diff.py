"""What differs between two golden sets, tensor by tensor, by the first one's tolerances."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
from snapshot_tool.goldens.parts import PLACES, TOKEN_IDS
from snapshot_tool.numerics.compare import judge_tensor

INPUTS_PART = "inputs"


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """One tensor that is not the same in both sets.

    Args:
        part: "inputs" or the phase.
        case: the case's name.
        tensor: the tensor's name.
        verdict: pass if the difference is within tolerance.
        reason: what differs, in words.
        comparison: the figures; None if the tensors cannot be compared.
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
        """How many tolerances the worst element is off; None if the tolerance is exact."""
        if self.comparison is None or self.tolerance is None or self.comparison.worst is None:
            return None
        worst = self.comparison.worst
        allowed = self.tolerance.atol + self.tolerance.rtol * abs(worst.expected)
        return abs(worst.actual - worst.expected) / allowed if allowed else None


@dataclass(frozen=True, slots=True)
class PartDiff:
    """One part of the set: how many of its tensors moved, and how far.

    Args:
        part: "inputs" or the phase.
        tensors: how many tensors both sets have together.
        moved: those whose bytes differ.
        beyond: those beyond tolerance, or without a partner.
        largest: the largest |difference|; None if none can be measured.
        worst: the moved tensor furthest off in units of its tolerance, or the first one that cannot
            be measured.
    """

    part: str
    tensors: int
    moved: int
    beyond: int
    largest: float | None
    worst: TensorDiff


@dataclass(frozen=True, slots=True)
class TextDiff:
    """A generation whose tokens differ: the first step that does, and both texts."""

    case: str
    step: int
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class SetIdentity:
    """A golden set's title and folder."""

    title: str
    folder: str


@dataclass(frozen=True, slots=True)
class SetDiff:
    """All that differs between two golden sets.

    Args:
        environment: versions and flags that differ, both values by name.
        tensors: how many tensors each part has, by its name.
        moved: the tensors that differ, in the order of parts and keys.
        texts: the generations whose tokens differ.
        files: other files that only one of both has, in words: "oracle: added".
    """

    one: SetIdentity
    other: SetIdentity
    environment: Mapping[str, tuple[str, str]]
    tensors: Mapping[str, int]
    moved: tuple[TensorDiff, ...]
    texts: tuple[TextDiff, ...]
    files: tuple[str, ...] = ()

    @property
    def beyond(self) -> tuple[TensorDiff, ...]:
        """The tensors beyond tolerance."""
        return tuple(diff for diff in self.moved if diff.verdict is not Verdict.PASS)

    def parts(self) -> list[PartDiff]:
        """Return the parts that moved, in the order of phases."""
        parts = []
        for name in (INPUTS_PART, *map(str, PHASES)):
            moved = [diff for diff in self.moved if diff.part == name]
            sizes = [diff.comparison.max_abs for diff in moved if diff.comparison]
            if moved:
                parts.append(
                    PartDiff(
                        part=name,
                        tensors=self.tensors[name],
                        moved=len(moved),
                        beyond=sum(diff.verdict is not Verdict.PASS for diff in moved),
                        largest=max(sizes, key=_nan_last) if sizes else None,
                        worst=max(moved, key=_severity),
                    )
                )
        return parts


# Called with what an update changes, before anything is written. Returns the reason for the update,
# or raises UpdateDeclined.
Review = Callable[[SetDiff], str]


def _severity(diff: TensorDiff) -> tuple[bool, float, float]:
    """Order by verdict, then by units of tolerance, then by plain size."""
    used = math.inf if diff.comparison is None else diff.used or 0.0
    size = math.inf if diff.comparison is None else diff.comparison.max_abs
    return diff.verdict is not Verdict.PASS, _nan_last(used), _nan_last(size)


def _nan_last(value: float) -> float:
    """Return NaN as infinity, so that it is the worst."""
    return math.inf if math.isnan(value) else value


def describe_diff(diff: SetDiff) -> list[str]:
    """Return one line for each part that moved, as the history in the manifest keeps it."""
    lines = []
    for part in diff.parts():
        line = f"{part.part}: {part.moved} tensors moved, {part.beyond} beyond tolerance"
        if part.largest is not None:
            line += f", largest difference {part.largest:.3g}"
        if part.worst.used is not None:
            line += f", {part.worst.used:.2g}x tolerance at worst"
        lines.append(line)
    lines += [f"tokens of {text.case} change from step {text.step}" for text in diff.texts]
    return [*lines, *diff.files]


def diff_folders(one: Path, other: Path) -> SetDiff:
    """Open two sets by folder and return what differs."""
    return diff_goldens(open_golden(one), open_golden(other))


def diff_goldens(one: Golden, other: Golden) -> SetDiff:
    """Return every tensor that differs, in the order of phases and keys; equal bytes are equal."""
    moved: list[TensorDiff] = []
    texts: list[TextDiff] = []
    counts = {}
    for part in (INPUTS_PART, *map(str, PHASES)):
        file = INPUTS if part == INPUTS_PART else phase_file(Phase(part))
        before, after = _entries(one, file), _entries(other, file)
        keys = sorted(before.keys() | after.keys())
        if one.manifest.storage is not other.manifest.storage:
            keys = [key for key in keys if _is_comparable(key, one, other, file)]
        counts[part] = len(keys)
        for key in keys:
            case, _, name = key.partition("/")
            if key not in before or key not in after:
                folder = other.folder if key in before else one.folder
                moved.append(TensorDiff(part, case, name, Verdict.FAIL, f"not in {folder}"))
            elif before[key] != after[key]:
                moved.append(_diff(one, other, part, key))
                if (part, name) == (Phase.GENERATE, TOKEN_IDS):
                    texts.append(_diff_text(one, other, case))
    return SetDiff(
        one=SetIdentity(one.manifest.title, str(one.folder)),
        other=SetIdentity(other.manifest.title, str(other.folder)),
        environment=_environment(one, other),
        tensors=counts,
        moved=tuple(moved),
        texts=tuple(texts),
        files=tuple(_other_files(one, other)),
    )


def _entries(golden: Golden, file: str) -> Mapping[str, TensorEntry]:
    return golden.manifest.files[file].tensors if file in golden.manifest.files else {}


def _is_comparable(key: str, one: Golden, other: Golden, file: str) -> bool:
    """Return whether a full and a compact set keep the same under a key, or one lacks the case.

    A compact set's connector may have other inputs, and so another output.
    """
    case = key.partition("/")[0]
    if not all(case in {entry.name for entry in g.manifest.cases} for g in (one, other)):
        return True
    entries = [_entries(golden, file) for golden in (one, other)]
    other_inputs = any(f"{case}/{QUESTION}.shape" in tensors for tensors in entries)
    return all(key in tensors for tensors in entries) and not other_inputs


def _other_files(one: Golden, other: Golden) -> list[str]:
    lines = []
    if one.manifest.storage is not other.manifest.storage:
        storages = f"{one.manifest.storage} became {other.manifest.storage}"
        lines.append(f"storage: {storages}; only what both keep the same way is compared")
    for name, kind in ((ORACLE, "oracle"), (OUTPUTS, "whole outputs")):
        before, after = (name in golden.manifest.files for golden in (one, other))
        if before != after:
            lines.append(f"{kind}: {'added' if after else 'dropped'}")
    return lines


def _environment(one: Golden, other: Golden) -> dict[str, tuple[str, str]]:
    before, after = one.manifest.environment, other.manifest.environment
    names = sorted(before.keys() | after.keys())
    both = {name: (before.get(name, ""), after.get(name, "")) for name in names}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def _diff(one: Golden, other: Golden, part: str, key: str) -> TensorDiff:
    """Compare a tensor that both sets have."""
    case, _, name = key.partition("/")
    try:
        expected, actual = one.read(part, key), other.read(part, key)
    except GoldenDamaged as error:  # a NaN in it, for example
        return TensorDiff(part, case, name, Verdict.FAIL, error.problem)
    tolerance = EXACT
    if part != INPUTS_PART and expected.is_floating_point():
        # The floating-point tensors of generate are logits.
        phase = Phase.FORWARD if part == Phase.GENERATE else Phase(part)
        tolerance = one.manifest.tolerances[phase].for_images(one.case(case).images)
    verdict, reason, comparison = judge_tensor(expected, actual, tolerance)
    if name in PLACES and actual.shape == expected.shape:
        reason = "places, judged by the values beside them"
        return TensorDiff(part, case, name, Verdict.PASS, reason)
    return TensorDiff(part, case, name, verdict, reason, comparison, tolerance)


def _diff_text(one: Golden, other: Golden, case: str) -> TextDiff:
    """Return the first step at which the tokens of a generation differ, with both texts."""
    before, after = (
        golden.read(Phase.GENERATE, f"{case}/{TOKEN_IDS}").tolist() for golden in (one, other)
    )
    same = [a == b for a, b in zip(before, after, strict=False)]
    step = same.index(False) if False in same else len(same)
    return TextDiff(case, step, one.case(case).generated, other.case(case).generated)

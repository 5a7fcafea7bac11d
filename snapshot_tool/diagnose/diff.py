"""Differences between two golden sets, tensor by tensor, by the first one's tolerances."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec

from snapshot_tool.base.errors import GoldenDamaged
from snapshot_tool.base.protocol import PHASES, Phase
from snapshot_tool.base.results import Verdict
from snapshot_tool.base.tolerance import EXACT
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.layout import INPUTS, MODULE_INPUTS, ORACLE, OUTPUTS, PROBES, phase_file
from snapshot_tool.goldens.manifest import TensorEntry
from snapshot_tool.goldens.parts import PLACES, STEP_LOGSUMEXP, TOKEN_IDS, TOPK_RECORDS
from snapshot_tool.numerics.compact import QUESTION
from snapshot_tool.numerics.compare import judge_tensor

INPUTS_PART = "inputs"


class TensorDiff(msgspec.Struct, frozen=True):
    """One tensor that is not the same in both sets.

    Figures are None if the tensors cannot be compared.

    Args:
        part: "inputs" or the phase.
        verdict: pass if the difference is within the first set's tolerance.
        reason: what differs, in words.
        max_abs: the largest |difference|.
        mismatched: elements beyond the tolerance.
        numel: all elements.
        tolerances: the difference of the worst element in tolerances; None if the tolerance is 0.
    """

    part: str
    case: str
    tensor: str
    verdict: Verdict
    reason: str
    max_abs: float | None = None
    mismatched: int | None = None
    numel: int | None = None
    tolerances: float | None = None


class PartDiff(msgspec.Struct, frozen=True, kw_only=True):
    """One part of the set: the numbers of tensors, of those that moved, and how far.

    Args:
        part: "inputs" or the phase.
        tensors: the number of tensors in either set.
        moved: those whose bytes differ.
        beyond: those beyond tolerance, or without a partner.
        largest: the largest |difference|; None if there is no figure.
        tolerances: of the worst tensor, see `SetDiff.worst`.
    """

    part: str
    tensors: int
    moved: int
    beyond: int
    largest: float | None
    tolerances: float | None


class TextDiff(msgspec.Struct, frozen=True):
    """A generation whose tokens differ: the first step that differs, and both texts."""

    case: str
    step: int
    one: str
    other: str


class SetIdentity(msgspec.Struct, frozen=True):
    """A golden set's title and folder."""

    title: str
    folder: str


class Change(msgspec.Struct, frozen=True):
    """A value in both sets; "" if one does not have it."""

    one: str
    other: str


class SetDiff(msgspec.Struct, frozen=True, kw_only=True):
    """The differences between two golden sets; the file that `snap diff --json` writes.

    Args:
        same: whether every tensor has the same bytes.
        environment: versions and flags that differ.
        parts: the parts that moved, in the order of phases.
        tokens: the generations whose tokens differ.
        files: what only one set has, in words: "oracle: added", "7 cases only in FOLDER: …".
        only_in_one: the cases that the other set does not have; they are not compared.
        only_in_other: the cases that the first set does not have.
        moved: the tensors whose bytes differ, in the order of parts and keys.
    """

    schema: Literal["snap-diff/1"] = "snap-diff/1"
    same: bool
    one: SetIdentity
    other: SetIdentity
    environment: dict[str, Change]
    parts: tuple[PartDiff, ...]
    tokens: tuple[TextDiff, ...]
    files: tuple[str, ...]
    only_in_one: tuple[str, ...] = ()
    only_in_other: tuple[str, ...] = ()
    moved: tuple[TensorDiff, ...]

    @property
    def within(self) -> bool:
        """Whether both have the same cases, and all differences are within tolerance."""
        return not (self.beyond or self.only_in_one or self.only_in_other)

    @property
    def beyond(self) -> tuple[TensorDiff, ...]:
        """The tensors beyond tolerance."""
        return tuple(tensor for tensor in self.moved if tensor.verdict is not Verdict.PASS)

    def worst(self, part: PartDiff) -> TensorDiff:
        """Return a part's worst tensor in units of tolerance, or one without figures."""
        return max((t for t in self.moved if t.part == part.part), key=_severity)


# Called with the changes of an update before anything is written. Returns the reason for the
# update, or raises UpdateDeclined.
Review = Callable[[SetDiff], str]


def _part(name: str, tensors: int, found: Sequence[TensorDiff]) -> PartDiff:
    sizes = [tensor.max_abs for tensor in found if tensor.max_abs is not None]
    return PartDiff(
        part=name,
        tensors=tensors,
        moved=len(found),
        beyond=sum(tensor.verdict is not Verdict.PASS for tensor in found),
        largest=max(sizes, key=_nan_last) if sizes else None,
        tolerances=max(found, key=_severity).tolerances,
    )


def _severity(tensor: TensorDiff) -> tuple[bool, float, float]:
    """Order by verdict, then by units of tolerance, then by plain size."""
    failed = tensor.verdict is not Verdict.PASS
    if tensor.max_abs is None:
        return failed, math.inf, math.inf
    return failed, _nan_last(tensor.tolerances or 0.0), _nan_last(tensor.max_abs)


def _nan_last(value: float) -> float:
    """Return NaN as infinity, so that it is the worst."""
    return math.inf if math.isnan(value) else value


def describe_diff(diff: SetDiff) -> list[str]:
    """Return one line for each part that moved, for the history in the manifest."""
    lines = []
    for part in diff.parts:
        line = f"{part.part}: {part.moved} tensors moved, {part.beyond} beyond tolerance"
        if part.largest is not None:
            line += f", largest difference {part.largest:.3g}"
        if part.tolerances is not None:
            line += f", {part.tolerances:.2g}x tolerance at worst"
        lines.append(line)
    lines += [f"tokens of {text.case} change from step {text.step}" for text in diff.tokens]
    return [*lines, *diff.files]


def diff_goldens(one: Golden, other: Golden) -> SetDiff:
    """Return every tensor whose bytes differ, in the order of phases and keys."""
    moved: list[TensorDiff] = []
    texts: list[TextDiff] = []
    parts = []
    only_in_one = tuple(name for name in one.cases if name not in other.cases)
    only_in_other = tuple(name for name in other.cases if name not in one.cases)
    lone = {*only_in_one, *only_in_other}
    for part in (INPUTS_PART, *map(str, PHASES)):
        file = INPUTS if part == INPUTS_PART else phase_file(Phase(part))
        before, after = _entries(one, file), _entries(other, file)
        keys = [k for k in sorted(before.keys() | after.keys()) if k.partition("/")[0] not in lone]
        if one.manifest.storage is not other.manifest.storage:
            keys = [key for key in keys if _is_comparable(key, one, other, file)]
        if one.manifest.schema_version != other.manifest.schema_version:
            keys = [k for k in keys if not k.endswith(f"/{STEP_LOGSUMEXP}")]
        found = []
        for key in keys:
            case, _, name = key.partition("/")
            if key not in before or key not in after:
                folder = other.folder if key in before else one.folder
                reason = f"not in {folder}"
                found.append(TensorDiff(part, case, name, Verdict.FAIL, reason))
            elif before[key] != after[key]:
                found.append(_diff(one, other, part, file, key))
                if (part, name) == (Phase.GENERATE, TOKEN_IDS):
                    texts.append(_diff_text(one, other, case))
        if found:
            parts.append(_part(part, len(keys), found))
            moved += found
    return SetDiff(
        same=not (moved or lone),
        one=SetIdentity(one.manifest.title, str(one.folder)),
        other=SetIdentity(other.manifest.title, str(other.folder)),
        environment=_environment(one, other),
        parts=tuple(parts),
        tokens=tuple(texts),
        files=(
            *_other_files(one, other),
            *_lone_cases(one, only_in_one),
            *_lone_cases(other, only_in_other),
        ),
        only_in_one=only_in_one,
        only_in_other=only_in_other,
        moved=tuple(moved),
    )


def _entries(golden: Golden, file: str) -> Mapping[str, TensorEntry]:
    return golden.manifest.files[file].tensors if file in golden.manifest.files else {}


def _is_comparable(key: str, one: Golden, other: Golden, file: str) -> bool:
    """Return whether a full and a compact set store the same tensor under a key.

    A compact set's connector may have another input, and therefore another output.
    """
    case = key.partition("/")[0]
    entries = [_entries(golden, file) for golden in (one, other)]
    other_inputs = any(f"{case}/{QUESTION}.shape" in tensors for tensors in entries)
    return all(key in tensors for tensors in entries) and not other_inputs


def _other_files(one: Golden, other: Golden) -> list[str]:
    lines = []
    if one.manifest.storage is not other.manifest.storage:
        storages = f"{one.manifest.storage} became {other.manifest.storage}"
        lines.append(
            f"storage: {storages}; only tensors that both store in the same way are compared"
        )
    schemas = one.manifest.schema_version, other.manifest.schema_version
    if schemas[0] != schemas[1]:
        lines.append(
            f"manifest schema: {schemas[0]} became {schemas[1]}; only what both keep is compared"
        )
    kinds = {
        ORACLE: "oracle",
        OUTPUTS: "whole outputs",
        MODULE_INPUTS: "whole inputs of modules",
        PROBES: "probes",
    }
    for name, kind in kinds.items():
        before, after = (name in golden.manifest.files for golden in (one, other))
        if before != after:
            lines.append(f"{kind}: {'added' if after else 'dropped'}")
    return lines


def _lone_cases(golden: Golden, cases: tuple[str, ...]) -> list[str]:
    """Return a line that names the cases that only this set has."""
    return [f"{len(cases)} cases only in {golden.folder}: {', '.join(cases)}"] if cases else []


def _environment(one: Golden, other: Golden) -> dict[str, Change]:
    before, after = one.manifest.environment, other.manifest.environment
    names = sorted(before.keys() | after.keys())
    both = {name: Change(before.get(name, ""), after.get(name, "")) for name in names}
    return {name: change for name, change in both.items() if change.one != change.other}


def _diff(one: Golden, other: Golden, part: str, file: str, key: str) -> TensorDiff:
    """Compare a tensor that both sets have."""
    case, _, name = key.partition("/")
    try:
        expected, actual = one.read_file(file, key), other.read_file(file, key)
    except GoldenDamaged as error:  # for example a NaN
        return TensorDiff(part, case, name, Verdict.FAIL, error.problem)
    if name in TOPK_RECORDS:  # an older set keeps fewer of the greatest logits
        kept = min(expected.shape[-1], actual.shape[-1])
        expected, actual = expected[..., :kept], actual[..., :kept]
    tolerance = EXACT
    if part != INPUTS_PART and expected.is_floating_point():
        # The floating-point tensors of generate are logits.
        phase = Phase.FORWARD if part == Phase.GENERATE else Phase(part)
        tolerance = one.manifest.tolerances[phase].for_images(one.case(case).images)
    verdict, reason, figures = judge_tensor(expected, actual, tolerance)
    if name in PLACES and actual.shape == expected.shape:
        reason = "indices, judged by their values"
        return TensorDiff(part, case, name, Verdict.PASS, reason)
    if figures is None or figures.worst is None:
        return TensorDiff(part, case, name, verdict, reason)
    return TensorDiff(
        part,
        case,
        name,
        verdict,
        reason,
        max_abs=figures.max_abs,
        mismatched=figures.mismatched,
        numel=figures.numel,
        tolerances=figures.worst.used(tolerance),
    )


def _diff_text(one: Golden, other: Golden, case: str) -> TextDiff:
    """Return the first step at which the tokens of a generation differ, with both texts."""
    before, after = (
        golden.tensor(case, Phase.GENERATE, TOKEN_IDS).tolist() for golden in (one, other)
    )
    same = [a == b for a, b in zip(before, after, strict=False)]
    step = same.index(False) if False in same else len(same)
    return TextDiff(case, step, one.case(case).generated, other.case(case).generated)

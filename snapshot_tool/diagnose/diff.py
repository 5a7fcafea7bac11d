"""What differs between two golden sets, tensor by tensor, by the first one's tolerances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from snapshot_tool.base.diff import INPUTS_PART, Drift, SetDrift, SetIdentity, TextDrift
from snapshot_tool.base.errors import GoldenDamaged
from snapshot_tool.base.phases import PHASES, Phase
from snapshot_tool.base.results import Verdict
from snapshot_tool.base.tolerance import EXACT, Tolerance
from snapshot_tool.goldens.compact import QUESTION
from snapshot_tool.goldens.golden import Golden, open_golden
from snapshot_tool.goldens.layout import INPUTS, ORACLE, OUTPUTS, phase_file
from snapshot_tool.goldens.manifest import TensorEntry
from snapshot_tool.goldens.parts import PLACES
from snapshot_tool.numerics.compare import judge_tensor

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

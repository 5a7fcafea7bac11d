"""What differs between two golden sets, tensor by tensor, by the first one's tolerances."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from snapshot_tool.compare import judge_tensor
from snapshot_tool.core.phases import PHASES, Phase
from snapshot_tool.core.results import Comparison, Verdict
from snapshot_tool.core.tolerance import EXACT, Tolerance
from snapshot_tool.store.golden import Golden, open_golden
from snapshot_tool.store.layout import INPUTS, phase_file
from snapshot_tool.store.manifest import TensorEntry
from snapshot_tool.store.parts import PLACES


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
    """

    part: str
    case: str
    tensor: str
    verdict: Verdict
    reason: str
    comparison: Comparison | None = None


def diff_folders(one: Path, other: Path) -> tuple[Golden, Golden, list[Drift]]:
    """Open two sets by folder and return them with what differs."""
    first, second = open_golden(one), open_golden(other)
    return first, second, diff_goldens(first, second)


def diff_goldens(one: Golden, other: Golden) -> list[Drift]:
    """Return every tensor that differs, in the order of phases and keys; equal bytes are equal."""
    drifts = []
    for part in ("inputs", *PHASES):
        file = INPUTS if part == "inputs" else phase_file(Phase(part))
        entries = [
            golden.manifest.files[file].tensors if file in golden.manifest.files else {}
            for golden in (one, other)
        ]
        for key in sorted(entries[0].keys() | entries[1].keys()):
            sides = entries[0].get(key), entries[1].get(key)
            if sides[0] != sides[1]:
                drifts.append(_drift(one, other, part, key, sides))
    return drifts


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
    expected, actual = (golden.read(part, key) for golden in (one, other))
    tolerance = _tolerance(one, part, case) if expected.is_floating_point() else EXACT
    verdict, reason, comparison = judge_tensor(expected, actual, tolerance)
    if name in PLACES and actual.shape == expected.shape:
        return Drift(part, case, name, Verdict.PASS, "places, judged by the values beside them")
    return Drift(part, case, name, verdict, reason, comparison)


def _tolerance(golden: Golden, part: str, case: str) -> Tolerance:
    if part == "inputs":
        return EXACT
    # What generation keeps besides its tokens are logits.
    part = Phase.FORWARD if part == Phase.GENERATE else part
    return golden.manifest.tolerances[Phase(part)].for_images(golden.case(case).images)


def describe_drift(drifts: list[Drift]) -> list[str]:
    """Return one line for each part of the set that moved."""
    lines = []
    for part in ("inputs", *PHASES):
        found = [drift for drift in drifts if drift.part == part]
        if not found:
            continue
        beyond = sum(drift.verdict is not Verdict.PASS for drift in found)
        largest = max((d.comparison.max_abs for d in found if d.comparison), default=float("nan"))
        lines.append(
            f"{part}: {len(found)} tensors moved, {beyond} beyond tolerance, "
            f"largest difference {largest:.3g}"
        )
    return lines

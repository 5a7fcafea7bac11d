"""What differs between two golden sets, as lines of text of at most 80 columns but for reasons."""

from __future__ import annotations

from snapshot_tool.base.diff import Drift, PartDrift, SetDrift, TextDrift

_SHOWN = 12
_ROOM = 60


def diff_lines(drift: SetDrift) -> list[str]:
    """Say what moved: versions, parts in units of tolerance, tokens as text, the worst tensors."""
    lines = [
        f"one    {drift.one.title}  {drift.one.folder}",
        f"other  {drift.other.title}  {drift.other.folder}",
    ]
    lines += [
        f"       {name}: {a or '-'} -> {b or '-'}" for name, (a, b) in drift.environment.items()
    ]
    lines += [f"       {line}" for line in drift.files]
    if not drift.drifts:
        return [*lines, "the same: every tensor has the same bytes"]
    lines += ["", f"{'part':<14}{'tensors':>8}{'moved':>7}{'beyond':>8}  worst"]
    lines += [_part_line(part) for part in drift.parts()]
    lines += ["0.5x: the worst element moved by half of its tolerance", ""]
    for text in drift.texts:
        lines += _text_lines(text)
    lines += [_drift_line(found) for found in drift.beyond[:_SHOWN]]
    if len(drift.beyond) > _SHOWN:
        lines.append(f"… and {len(drift.beyond) - _SHOWN} more: --json FILE has them all")
    return lines


def _part_line(part: PartDrift) -> str:
    worst = part.worst
    used = f"{worst.used:.2g}x " if worst.used is not None else ""
    figures = f"{part.part:<14}{part.tensors:>8}{part.moved:>7}{part.beyond:>8}"
    return f"{figures}  {used}{worst.case} / {worst.tensor}"


def _text_lines(text: TextDrift) -> list[str]:
    return [
        f"tokens of {text.case} change from step {text.step}:",
        f"  - {_short(text.before, text.after)}",
        f"  + {_short(text.after, text.before)}",
    ]


def _short(text: str, other: str) -> str:
    """Return a text in quotes, without most of what it has in common with the other one."""
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), None)
    start = max(0, (same if same is not None else min(len(text), len(other))) - _ROOM // 3)
    part = text[start : start + _ROOM]
    before, after = "…" if start else "", "…" if start + _ROOM < len(text) else ""
    return f"{before}{part!r}{after}"


def _drift_line(drift: Drift) -> str:
    what, _, where = drift.reason.partition("; worst at ")
    line = f"{drift.part} / {drift.case} / {drift.tensor}: {what}"
    return f"{line}\n     worst at {where}" if where else line

"""Differences between two golden sets as text, JSON and HTML."""

from __future__ import annotations

import json
import math
from typing import Any

from snapshot_tool.diagnose.diff import PartDiff, SetDiff, TensorDiff, TextDiff

_SHOWN = 12
_ROOM = 60


def diff_lines(drift: SetDiff) -> list[str]:
    """Say what moved: versions, parts in units of tolerance, tokens as text, the worst tensors."""
    lines = [
        f"one    {drift.one.title}  {drift.one.folder}",
        f"other  {drift.other.title}  {drift.other.folder}",
    ]
    lines += [
        f"       {name}: {a or '-'} -> {b or '-'}" for name, (a, b) in drift.environment.items()
    ]
    lines += [f"       {line}" for line in drift.files]
    if not drift.moved:
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


def _part_line(part: PartDiff) -> str:
    worst = part.worst
    used = f"{worst.used:.2g}x " if worst.used is not None else ""
    figures = f"{part.part:<14}{part.tensors:>8}{part.moved:>7}{part.beyond:>8}"
    return f"{figures}  {used}{worst.case} / {worst.tensor}"


def _text_lines(text: TextDiff) -> list[str]:
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


def _drift_line(drift: TensorDiff) -> str:
    what, _, where = drift.reason.partition("; worst at ")
    line = f"{drift.part} / {drift.case} / {drift.tensor}: {what}"
    return f"{line}\n     worst at {where}" if where else line


SCHEMA = "snap-diff/1"


def diff_to_json(drift: SetDiff) -> str:
    """Return the JSON text, with a newline at its end."""
    document = {
        "schema": SCHEMA,
        "same": not drift.moved,
        "one": {"title": drift.one.title, "folder": drift.one.folder},
        "other": {"title": drift.other.title, "folder": drift.other.folder},
        "environment": {
            name: {"one": one, "other": other} for name, (one, other) in drift.environment.items()
        },
        "parts": [_part(part) for part in drift.parts()],
        "tokens": [
            {"case": t.case, "step": t.step, "one": t.before, "other": t.after} for t in drift.texts
        ],
        "files": list(drift.files),
        "moved": [_drift(found) for found in drift.moved],
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _part(part: PartDiff) -> dict[str, Any]:
    return {
        "part": part.part,
        "tensors": part.tensors,
        "moved": part.moved,
        "beyond": part.beyond,
        "largest": _number(part.largest),
        "tolerances": _number(part.worst.used),
    }


def _drift(drift: TensorDiff) -> dict[str, Any]:
    figures = drift.comparison
    return {
        "part": drift.part,
        "case": drift.case,
        "tensor": drift.tensor,
        "verdict": drift.verdict.value,
        "reason": drift.reason,
        "max_abs": _number(figures.max_abs) if figures else None,
        "mismatched": figures.mismatched if figures else None,
        "numel": figures.numel if figures else None,
        "tolerances": _number(drift.used),
    }


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN or infinity: they are strings."""
    return value if value is None or math.isfinite(value) else str(value)


_SHOWN_IN_PAGE = 500


def diff_to_html(drift: SetDiff) -> str:
    """Return the page. Nothing of a golden set is trusted: Jinja2 escapes every text."""
    # Only here: the other reports start without it.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("snapshot_tool.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["used"] = lambda used: "" if used is None else f"{used:.2g}x"
    template = environment.get_template("diff.html")
    return template.render(drift=drift, parts=drift.parts(), shown=drift.moved[:_SHOWN_IN_PAGE])

"""A comparison of two traces as text and as JSON; docs/json.md lists the fields."""

from __future__ import annotations

import json
import math
from typing import Any

from snapshot_tool.base.localisation import Metric, TraceComparison, TraceRow

SCHEMA = "snap-compare-traces/1"
_BEFORE = 5  # rows shown before the first one that differs
_SHOWN_NAMES = 6


def comparison_lines(found: TraceComparison, *, metric: Metric, limit: int) -> list[str]:
    """Say what was compared and how far each tensor is off, `limit` rows at most."""
    return [
        f"reference  {found.reference}",
        f"other      {found.other}",
        str(found.mapping),
        "",
        *_table(found, metric, limit),
        "",
        *_listed("missing in the other trace", found.missing),
        *_listed("of the reference without a partner", found.alone),
        *_listed("of the other without a partner", found.other_alone),
        *_listed("tensors without a partner", found.tensors_alone),
        *_listed("not measured", tuple(f"{r.module} ({r.problem})" for r in _unmeasured(found))),
        _summary(found),
    ]


def _unmeasured(found: TraceComparison) -> list[TraceRow]:
    return [row for row in found.rows if row.relative_error is None and not row.mismatch]


def _table(found: TraceComparison, metric: Metric, limit: int) -> list[str]:
    first = next((i for i, row in enumerate(found.rows) if row.beyond(found.limit)), 0)
    start = max(0, min(first - _BEFORE, len(found.rows) - limit))
    shown = found.rows[start : start + limit]
    lines = [f"  pass  {'relative':>9}  {metric.value:>9}  module (the other's)"]
    if start:
        lines.append(f"  … {start} rows before agree")
    lines += [_line(row, metric, found.limit) for row in shown]
    if left := len(found.rows) - start - len(shown):
        lines.append(f"  … {left} more rows: --limit {len(found.rows)} shows all")
    return lines


def _line(row: TraceRow, metric: Metric, limit: float) -> str:
    mark = ">" if row.beyond(limit) else " "
    about = "~" if row.sampled else " "
    figure = "-" if row.figures is None else f"{row.figures[metric]:.3g}"
    error = "-" if row.relative_error is None else f"{row.relative_error:.1e}"
    name = f"{row.module} {row.tensor}" + (f" call {row.call}" if row.call else "")
    problem = f": {row.problem}" if row.problem else ""
    return (
        f"{mark} {row.run:>4} {about}{error:>9} {about}{figure:>9}  {name} ({row.partner}){problem}"
    )


def _listed(title: str, names: tuple[str, ...]) -> list[str]:
    if not names:
        return []
    more = len(names) - _SHOWN_NAMES
    shown = ", ".join(names[:_SHOWN_NAMES]) + (f", … {more} more" if more > 0 else "")
    return [f"{len(names)} {title}: {shown}"]


def _summary(found: TraceComparison) -> str:
    compared = sum(row.relative_error is not None for row in found.rows)
    if found.exit_code == 0:
        return f"PASS: {compared} tensors agree (relative error up to {found.limit:.0e})"
    if not found.rows or not compared:
        return "nothing was compared"
    if not found.differing:
        return f"FAIL: {compared} tensors agree, {len(found.missing)} missing"
    first = found.differing[0]
    return (
        f"FAIL: {len(found.differing)} of {len(found.rows)} tensors differ (relative error above "
        f"{found.limit:.0e}); the first is {first.module} {first.tensor}"
    )


def comparison_to_json(found: TraceComparison) -> str:
    """Return the comparison as JSON text."""
    fields = {
        "schema": SCHEMA,
        "exit_code": found.exit_code,
        "reference": found.reference,
        "other": found.other,
        "mapping": str(found.mapping),
        "inferred": found.mapping.inferred,
        "limit": found.limit,
        "rows": [_row(row, found.limit) for row in found.rows],
        "missing": list(found.missing),
        "reference_alone": list(found.alone),
        "other_alone": list(found.other_alone),
        "tensors_alone": list(found.tensors_alone),
    }
    return json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _row(row: TraceRow, limit: float) -> dict[str, Any]:
    return {
        "module": row.module,
        "partner": row.partner,
        "pass": row.run,
        "call": row.call,
        "tensor": row.tensor,
        "other_tensor": row.other_tensor,
        "shape": list(row.shape),
        "other_shape": list(row.other_shape),
        **{m.value: _number(row.figures[m]) if row.figures else None for m in Metric},
        "relative_error": None if row.relative_error is None else _number(row.relative_error),
        "sampled": row.sampled,
        "beyond": row.beyond(limit),
        "problem": row.problem,
    }


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)

"""A comparison of two traces as text."""

from __future__ import annotations

from snapshot_tool.base.localisation import Metric, TraceComparison, TraceRow
from snapshot_tool.reports.text import list_names

_BEFORE = 5  # rows shown before the first one that differs


def comparison_lines(found: TraceComparison, *, metric: Metric, limit: int) -> list[str]:
    """Return both traces and the differences of their tensors, at most `limit` rows."""
    lines = [
        f"reference  {found.reference}",
        f"other      {found.other}",
        found.mapping,
        "",
        *_table(found, metric, limit),
        "",
    ]
    unmeasured = [r for r in found.rows if r.relative_error is None and not r.beyond]
    for title, names in (
        ("missing in the other trace", found.missing),
        ("of the reference without a match", found.reference_alone),
        ("of the other without a match", found.other_alone),
        ("tensors without a match", found.tensors_alone),
        ("not measured", [f"{row.module} ({row.problem})" for row in unmeasured]),
    ):
        if names:
            lines.append(f"{len(names)} {title}: {list_names(names)}")
    return [*lines, _summary(found)]


def _table(found: TraceComparison, metric: Metric, limit: int) -> list[str]:
    first = next((i for i, row in enumerate(found.rows) if row.beyond), 0)
    start = max(0, min(first - _BEFORE, len(found.rows) - limit))
    shown = found.rows[start : start + limit]
    lines = [f"  pass  {'relative':>9}  {metric.value:>9}  module (the other's)"]
    if start:
        lines.append(f"  … {start} rows before agree")
    lines += [_line(row, metric) for row in shown]
    if left := len(found.rows) - start - len(shown):
        lines.append(f"  … {left} more rows: --limit {len(found.rows)} shows all")
    return lines


def _line(row: TraceRow, metric: Metric) -> str:
    mark = ">" if row.beyond else " "
    about = "~" if row.sampled else " "
    value: float | None = getattr(row, metric.value)
    figure = "-" if value is None else f"{value:.3g}"
    error = "-" if row.relative_error is None else f"{row.relative_error:.1e}"
    name = f"{row.module} {row.tensor}" + (f" call {row.call}" if row.call else "")
    problem = f": {row.problem}" if row.problem else ""
    return (
        f"{mark} {row.run:>4} {about}{error:>9} {about}{figure:>9}  {name} ({row.partner}){problem}"
    )


def _summary(found: TraceComparison) -> str:
    compared = sum(row.relative_error is not None for row in found.rows)
    if found.exit_code == 0:
        return f"PASS: {compared} tensors agree (relative error up to {found.limit:.0e})"
    if not compared:
        return "nothing was compared"
    if not found.differing:
        return f"FAIL: {compared} tensors agree, {len(found.missing)} missing"
    first = found.differing[0]
    return (
        f"FAIL: {len(found.differing)} of {len(found.rows)} tensors differ (relative error above "
        f"{found.limit:.0e}); the first is {first.module} {first.tensor}"
    )

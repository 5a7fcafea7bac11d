"""The checks of several paths in a table."""

from __future__ import annotations

from collections.abc import Sequence

from snapshot_tool.base.protocol import PHASES
from snapshot_tool.base.report import CheckReport
from snapshot_tool.reports import text


def paths_table(reports: Sequence[CheckReport]) -> list[list[text.Cell]]:
    """Return a heading and a line of padded cells for each path."""
    phases = [phase for phase in PHASES if any(phase in report.phases for report in reports)]
    lines: list[list[text.Cell]] = [
        [(name, None) for name in ("path", *phases, "first wrong", "difference")]
    ]
    for report in reports:
        row: list[text.Cell] = [(report.path, report.verdict)]
        for phase in phases:
            results = [result for result in report.results if result.phase is phase]
            row.append((text.outcome(results), text.worst_verdict(results) if results else None))
        first, difference = report.divergence, report.path_difference
        where = [first.phase.value, report.location] if first else [report.location]
        row.append((" / ".join(filter(None, where)), None))
        row.append((f"from {difference.path}: {difference}" if difference else "", None))
        lines.append(row)
    return text.pad(lines, "  ")

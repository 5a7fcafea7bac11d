"""Several checks in a table: the history of a port, or the paths of one check."""

from __future__ import annotations

from collections.abc import Sequence

from snapshot_tool.base.protocol import PHASES, Phase
from snapshot_tool.base.report import CheckReport
from snapshot_tool.reports import text
from snapshot_tool.reports.html import page_environment

# A file and the check in it.
PastRun = tuple[str, CheckReport]


def history_table(runs: Sequence[PastRun]) -> list[list[text.Cell]]:
    """Return a heading and a line of padded cells for each run."""
    phases = _phases_of([report for _, report in runs])
    lines = [_heading("run", "date", "candidate", *phases, "first wrong")]
    for source, report in runs:
        row: list[text.Cell] = [(source, None), (report.date[:16].replace("T", " "), None)]
        row.append((_name_of_candidate(report), report.verdict))
        row += [_outcome(report, phase) for phase in phases]
        row.append((report.location, None))
        lines.append(row)
    return text.pad(lines, "  ")


def paths_table(reports: Sequence[CheckReport]) -> list[list[text.Cell]]:
    """Return a heading and a line of padded cells for each path."""
    phases = _phases_of(reports)
    lines = [_heading("path", *phases, "first wrong", "difference")]
    for report in reports:
        row: list[text.Cell] = [(report.path, report.verdict)]
        row += [_outcome(report, phase) for phase in phases]
        first, difference = report.divergence, report.path_difference
        where = [first.phase.value, report.location] if first else [report.location]
        row.append((" / ".join(filter(None, where)), None))
        row.append((f"from {difference.path}: {difference}" if difference else "", None))
        lines.append(row)
    return text.pad(lines, "  ")


def history_to_html(runs: Sequence[PastRun]) -> str:
    """Return the history as one HTML file that opens offline."""
    template = page_environment().get_template("history.html")
    phases = _phases_of([report for _, report in runs])
    return template.render(
        runs=runs, phases=phases, outcome=_outcome, candidate=_name_of_candidate, text=text
    )


def _heading(*names: str) -> list[text.Cell]:
    return [(name, None) for name in names]


def _phases_of(reports: Sequence[CheckReport]) -> list[Phase]:
    """Return the phases that any of the checks has."""
    return [phase for phase in PHASES if any(phase in report.phases for report in reports)]


def _outcome(report: CheckReport, phase: Phase) -> text.Cell:
    """Return the worst outcome of a phase in all cases, and its verdict."""
    results = [result for result in report.results if result.phase is phase]
    return text.outcome(results), text.worst_verdict(results) if results else None


def _name_of_candidate(report: CheckReport) -> str:
    """Return the candidate's commit or version, or its name."""
    info = report.candidate
    name = info.commit[:12] or info.version or info.name
    return f"{name} (dirty)" if info.dirty else name

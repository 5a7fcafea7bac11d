"""Several checks of one port in a table, for example its history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from markupsafe import Markup

from snapshot_tool.base.protocol import PHASES, Phase
from snapshot_tool.base.report import CheckReport
from snapshot_tool.reports import text
from snapshot_tool.reports.html import page_environment


@dataclass(frozen=True, slots=True)
class PastRun:
    """A check in the history; `source` is its file."""

    source: str
    report: CheckReport

    @property
    def candidate(self) -> str:
        """The candidate's commit or version, or its name."""
        info = self.report.candidate
        name = info.commit[:12] or info.version or info.name
        return f"{name} (dirty)" if info.dirty else name

    def outcome(self, phase: Phase) -> text.Cell:
        """Return the worst outcome of a phase in all cases, and its verdict."""
        results = [result for result in self.report.results if result.phase is phase]
        return text.outcome(results), text.worst_verdict(results) if results else None


def phases_of(runs: Sequence[PastRun]) -> list[Phase]:
    """Return the phases that any of the runs has."""
    return [phase for phase in PHASES if any(phase in run.report.phases for run in runs)]


def history_table(runs: Sequence[PastRun]) -> list[list[text.Cell]]:
    """Return a heading and a line of padded cells for each run."""
    phases = phases_of(runs)
    lines: list[list[text.Cell]] = [
        [(name, None) for name in ("run", "date", "candidate", *phases, "first wrong")]
    ]
    for run in runs:
        report = run.report
        row: list[text.Cell] = [(run.source, None), (report.date[:16].replace("T", " "), None)]
        row.append((run.candidate, report.verdict))
        row += [run.outcome(phase) for phase in phases]
        row.append((report.location, None))
        lines.append(row)
    return text.pad(lines, "  ")


def history_to_html(runs: Sequence[PastRun]) -> str:
    """Return the table as one HTML file that opens offline."""
    style = (resources.files("snapshot_tool.reports") / "templates/report.css").read_text("utf-8")
    return (
        page_environment()
        .get_template("history.html")
        .render(
            runs=runs,
            phases=phases_of(runs),
            text=text,
            style=Markup(style),  # noqa: S704 - our own style
        )
    )

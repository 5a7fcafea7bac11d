"""A check's report on the terminal: its lines, and the table of cases and phases."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from snapshot_tool.base.phases import PHASES
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.results import Verdict
from snapshot_tool.reports import run_text

_COLOURS = {
    Verdict.PASS: "green",
    Verdict.FAIL: "red",
    Verdict.ERROR: "red",
    Verdict.SKIP: "yellow",
}
_SHOWN_CASES = 40


def draw_report(report: CheckReport, *, replay: str) -> None:
    """Print the report; colours are dropped where it is no terminal or NO_COLOR is set.

    replay: the command to which a question is added to ask it again.
    """
    for line in run_text.header_lines(report, base=str(Path.cwd())):
        click.echo(line)
    click.echo()
    if report.results:
        _draw_grid(run_text.grid(report))
        click.echo(run_text.LEGEND)
        for line in run_text.oracle_lines(report):
            click.echo(line)
        click.echo()
    for line, verdict in run_text.exploration_lines(report, replay=replay):
        click.secho(line, fg=_COLOURS[verdict] if verdict else None)
    for line in run_text.problem_lines(report):
        click.echo(line)
    for line in run_text.localisation_lines(report.localisation, report.place):
        click.echo(line)
    if report.graft:
        click.echo(f"graft of {report.graft.module}: {report.graft}\n")
    click.secho(run_text.summary_line(report), bold=True, fg=_COLOURS[report.verdict])


def _draw_grid(rows: list[run_text.Row]) -> None:
    """Print the worst cases as a table as wide as the terminal, or 80 columns in a file."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    # Only the names give way where the room is short.
    table.add_column("case", overflow="ellipsis", min_width=10)
    for phase in PHASES:
        table.add_column(phase.value, no_wrap=True)
    for row in rows[:_SHOWN_CASES]:
        cells = [
            Text(cell.text, _COLOURS[cell.verdict] if cell.verdict else "") for cell in row.cells
        ]
        table.add_row(Text(row.case), *cells)
    Console(highlight=False).print(table)
    if left := rows[_SHOWN_CASES:]:
        worst = "all passed" if left[0].verdict is Verdict.PASS else f"at worst {left[0].verdict}"
        click.echo(f"… and {len(left)} more cases: {worst}")

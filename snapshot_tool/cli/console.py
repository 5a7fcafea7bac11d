"""Progress bars and reports in the terminal."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from snapshot_tool.base import protocol
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.results import Verdict, combine
from snapshot_tool.reports import text as run_text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from snapshot_tool.check.workflow import SetCheck


class TerminalProgress(protocol.Progress):
    """Draws one bar for each stage on a terminal; notes are always printed."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._describe: Callable[[str], None] | None = None

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Iterator[int]]:
        """Draw a stage of `total` steps while the block runs."""
        if not self._console.is_terminal:
            yield count(1)
            return
        with _bar(self._console) as progress:
            task = progress.add_task(title, total=total)
            self._describe = lambda what: progress.update(task, description=f"{title}: {what}")
            try:
                yield _counting(progress, task)
            finally:
                self._describe = None

    def now(self, what: str) -> None:
        """Show the current step beside the stage's title."""
        if self._describe:
            self._describe(what)

    def note(self, message: str) -> None:
        """Print a line to standard error."""
        click.echo(message, err=True)


def _bar(console: Console) -> Progress:
    # Imported only if a bar is drawn.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    return Progress(
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        # Last in the line and cut off at its end, so that the bar does not move.
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=console,
        transient=True,
    )


def _counting(progress: Progress, task: TaskID) -> Iterator[int]:
    for step in count(1):
        progress.advance(task)
        yield step


_COLOURS = {
    Verdict.PASS: "green",
    Verdict.FAIL: "red",
    Verdict.ERROR: "red",
    Verdict.SKIP: "yellow",
}


def draw_report(report: CheckReport, *, verbose: bool = False, page: Path | None = None) -> None:
    """Print the report, in colour on a terminal unless NO_COLOR is set.

    verbose: print every failure, not only the worst of each phase. page: the HTML report.
    """
    base = str(Path.cwd())
    for name, fact in run_text.header_facts(report, base=base):
        click.echo(f"{name:<14}{fact}")
    click.echo()
    if report.results:
        console = Console()
        fixed = console.is_terminal or "COLUMNS" in os.environ
        draw_table(run_text.table(report, width=console.width if fixed else None))
        click.echo(run_text.LEGEND)
        for line in (*run_text.oracle_lines(report), *run_text.agreement_lines(report)):
            click.echo(line)
        click.echo()
    for line, verdict in run_text.exploration_lines(report):
        click.echo(_coloured(line, verdict))
    for line in run_text.problem_lines(report, verbose=verbose):
        click.echo(line)
    for line in run_text.localisation_lines(report.localisation, report.location):
        click.echo(line)
    if report.graft:
        click.echo(f"graft of {report.graft.module}: {report.graft.conclusion}\n")
    for line in run_text.next_lines(report, page=page):
        click.echo(line)
    draw_verdict(report)


def draw_verdict(report: CheckReport) -> None:
    """Print the last line of a report."""
    click.secho(run_text.summary_line(report), bold=True, fg=_COLOURS[report.verdict])


def draw_checks(checks: Sequence[SetCheck]) -> None:
    """Print a line for each of several checks."""
    width = max((len(one.name) for one in checks), default=0)
    for one in checks:
        word = one.verdict.value.upper()
        text = run_text.summary_line(one.report) if one.report else f"{word}: {one.reason}"
        click.secho(f"{one.name:<{width}}  {text}", fg=_COLOURS[one.verdict])


def draw_combined(checks: Sequence[SetCheck], what: str) -> None:
    """Print a line with the combined verdict of several checks, for example of "golden sets"."""
    verdicts = [one.verdict for one in checks]
    counts = Counter(verdicts)
    words = ", ".join(f"{counts[v]} {v.value}" for v in Verdict if counts[v])
    whole = combine(verdicts)
    click.secho(f"{whole.value.upper()}: {len(checks)} {what}: {words}", bold=True)


def draw_table(rows: Sequence[Sequence[run_text.Cell]]) -> None:
    """Print lines of padded cells in the colours of their verdicts."""
    for row in rows:
        click.echo("".join(_coloured(text, verdict) for text, verdict in row).rstrip())


def _coloured(text: str, verdict: Verdict | None) -> str:
    """Return a cell in its verdict's colour, without colouring the blanks after it."""
    word = text.rstrip()
    blanks = text[len(word) :]
    return click.style(word, fg=_COLOURS[verdict]) + blanks if verdict else text

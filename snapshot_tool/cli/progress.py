"""Progress on a terminal's standard error; silence elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column

# Last in the line, and cut off at its end: the bar stays where it is.
_SHORTENED = Column(no_wrap=True, overflow="ellipsis")


class TerminalProgress:
    """Draws one bar for each stage; notes are printed in any case, since they inform."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._describe: Callable[[str], None] = _describe_nothing

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Iterator[int]]:
        """Draw a stage of `total` steps while the block runs."""
        progress = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", table_column=_SHORTENED),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        # Not even started where nobody looks: rich 13.9 ends a disabled one with an empty line.
        with nullcontext() if progress.disable else progress:
            task = progress.add_task(title, total=total)
            self._describe = lambda what: progress.update(task, description=f"{title}: {what}")
            try:
                yield _counting(progress, task)
            finally:
                self._describe = _describe_nothing

    def now(self, what: str) -> None:
        """Put what is being done beside the stage's title."""
        self._describe(what)

    def note(self, message: str) -> None:
        """Print a line to standard error."""
        click.echo(message, err=True)


def _describe_nothing(_what: str) -> None:
    """Outside of a stage there is nothing to describe."""


def _counting(progress: Progress, task: TaskID) -> Iterator[int]:
    step = 0
    while True:
        step += 1
        progress.advance(task)
        yield step

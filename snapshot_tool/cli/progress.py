"""Progress on a terminal's standard error; silence elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


class TerminalProgress:
    """Draws one bar for each stage; notes are printed in any case, since they inform."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Iterator[int]]:
        """Draw a stage of `total` steps while the block runs."""
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        ) as progress:
            task = progress.add_task(title, total=total)
            yield _counting(progress, task)

    def note(self, message: str) -> None:
        """Print a line to standard error."""
        click.echo(message, err=True)


def _counting(progress: Progress, task: TaskID) -> Iterator[int]:
    step = 0
    while True:
        step += 1
        progress.advance(task)
        yield step

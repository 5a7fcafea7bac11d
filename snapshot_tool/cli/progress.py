"""Progress on a terminal's standard error; silence elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING

import click
from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class TerminalProgress:
    """Draws one bar for each stage; notes are printed in any case, since they inform."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._describe: Callable[[str], None] = _describe_nothing

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
                self._describe = _describe_nothing

    def now(self, what: str) -> None:
        """Put what is being done beside the stage's title."""
        self._describe(what)

    def note(self, message: str) -> None:
        """Print a line to standard error."""
        click.echo(message, err=True)


def _bar(console: Console) -> Progress:
    # Only here: what nobody looks at is not imported either.
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.table import Column

    return Progress(
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        # Last in the line, and cut off at its end: the bar stays where it is.
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=console,
        transient=True,
    )


def _describe_nothing(_what: str) -> None:
    """Outside of a stage there is nothing to describe."""


def _counting(progress: Progress, task: TaskID) -> Iterator[int]:
    for step in count(1):
        progress.advance(task)
        yield step

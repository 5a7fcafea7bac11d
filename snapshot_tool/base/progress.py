"""Progress that nobody watches."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count


class SilentProgress:
    """Satisfies the Progress protocol and says nothing."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Iterator[int]]:
        """Count the steps."""
        yield count(1)

    def now(self, what: str) -> None:
        """Drop what a step is about."""

    def note(self, message: str) -> None:
        """Drop a note."""

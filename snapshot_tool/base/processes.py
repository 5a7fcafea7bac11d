"""Several processes at one recording: the first plans and assembles, all of them ask."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

_Item = TypeVar("_Item")


class Processes(Protocol):
    """This process among those that record together."""

    @property
    def index(self) -> int:
        """Which one this is, from 0."""

    @property
    def count(self) -> int:
        """How many there are."""

    def share(self, value: Any) -> Any:
        """Return the first process's value in every process."""

    def wait(self) -> None:
        """Return when all processes have come here."""


@dataclass(frozen=True, slots=True)
class OneProcess:
    """A recording by this process alone."""

    index: int = 0
    count: int = 1

    def share(self, value: Any) -> Any:
        """Return the value."""
        return value

    def wait(self) -> None:
        """Return at once."""


def own_part(items: Sequence[_Item], processes: Processes) -> Sequence[_Item]:
    """Return what this process does of some work; every item is done by exactly one."""
    return items[processes.index :: processes.count]

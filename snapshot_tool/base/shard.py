"""A share of a check's cases: several machines check one golden set between them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from snapshot_tool.base.errors import UsageError

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Share:
    """Share `index` of `count`, from 1: every count-th item, in their own order.

    Dealt out like cards: variants drawn one after the other cost alike, and so do the shares.
    """

    index: int
    count: int

    def __str__(self) -> str:
        """Write the share as `--shard` takes it."""
        return f"{self.index}/{self.count}"

    def of(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """Return this share of some items."""
        return items[self.index - 1 :: self.count]


def parse_share(text: str) -> Share:
    """Return the share that K/N stands for; raise UsageError for anything else."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"{text} is no share K/N of the cases", "for example: --shard 1/3")
    return Share(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class Shard:
    """What the check of a share was of.

    Args:
        share: which one.
        cases: the names of its cases, in the golden's order.
        all_cases: how many the shares have together.
        asked: the options that decide what is checked and how it is judged, as text.
    """

    share: Share
    cases: tuple[str, ...]
    all_cases: int
    asked: Mapping[str, str]

    def __str__(self) -> str:
        """Say it as people read it."""
        own = f"{len(self.cases)} of {self.all_cases} cases"
        return f"{self.share.index} of {self.share.count}, {own}"

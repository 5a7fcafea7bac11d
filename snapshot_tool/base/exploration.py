"""What came of asking a candidate questions that were derived from a golden set."""

from __future__ import annotations

from dataclasses import dataclass

from snapshot_tool.base.results import Result, Verdict, overall_verdict


@dataclass(frozen=True, slots=True)
class ExploredKind:
    """One kind of question.

    Args:
        kind: the first word of the questions' text form.
        asked: how many different questions the candidate was asked, those of shrinking included.
        results: of every question that passed or was unsupported, and of the smallest that failed;
            of a kind that was not asked, one skip.
            Each result's `tensor` is its question's text form.
    """

    kind: str
    asked: int
    results: tuple[Result, ...]

    @property
    def verdict(self) -> Verdict:
        """The verdict on the kind."""
        return overall_verdict(self.results)

    @property
    def failure(self) -> Result | None:
        """The smallest question that was not answered as recorded."""
        bad = (Verdict.FAIL, Verdict.ERROR)
        return next((result for result in self.results if result.verdict in bad), None)


@dataclass(frozen=True, slots=True)
class Exploration:
    """All kinds that were asked; `seed` is None where the questions were given, not drawn."""

    kinds: tuple[ExploredKind, ...]
    seed: int | None = None

    @property
    def asked(self) -> int:
        """How many questions were asked."""
        return sum(kind.asked for kind in self.kinds)

    @property
    def results(self) -> tuple[Result, ...]:
        """The results of all kinds."""
        return tuple(result for kind in self.kinds for result in kind.results)

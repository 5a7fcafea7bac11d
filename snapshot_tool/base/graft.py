"""What comes of putting the golden's output in one module's place."""

from dataclasses import dataclass

from snapshot_tool.base.localisation import Localisation
from snapshot_tool.base.results import Result, Verdict


@dataclass(frozen=True, slots=True)
class Graft:
    """A run with one module's output replaced by the golden's.

    Args:
        module: the reference's name of it.
        candidate: the candidate's name of it.
        case: the case that was run.
        before: what the case's phases gave without the graft.
        after: the same with it.
        localisation: what the modules say with it; None where the candidate shows none.
    """

    module: str
    candidate: str
    case: str
    before: tuple[Result, ...]
    after: tuple[Result, ...]
    localisation: Localisation | None

    @property
    def proved(self) -> bool:
        """Whether the fault is in that module alone: with it replaced, all passes that did not."""
        return not _passes(self.before) and _passes(self.after)

    def __str__(self) -> str:
        """Say it in a sentence."""
        if _passes(self.before):
            return f"case {self.case} passes without it: it proves nothing"
        if self.proved:
            return f"all phases of case {self.case} pass with it: the fault is there alone"
        failed = next(r for r in self.after if r.verdict is not Verdict.PASS)
        next_module = self.localisation.module if self.localisation else ""
        where = f"; first wrong is now {next_module}" if next_module else ""
        return f"{failed.phase.value} of case {self.case} still fails with it{where}"


def _passes(results: tuple[Result, ...]) -> bool:
    return bool(results) and all(result.verdict is Verdict.PASS for result in results)

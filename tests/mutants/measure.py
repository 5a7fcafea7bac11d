"""What one mutant does: whether `snap check` finds it, what it names, what it changes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from snapshot_tool.base.errors import CandidateUnavailable
from snapshot_tool.base.phases import phase_order
from snapshot_tool.base.protocol import SilentProgress
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.results import Result, Verdict, tolerance_used
from snapshot_tool.base.tolerance import Rule
from snapshot_tool.candidates.fms.candidate import FmsCandidate
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.session import check
from snapshot_tool.goldens.find import find_goldens
from snapshot_tool.goldens.golden import Golden, open_golden
from tests.mutants.candidates import SPEC, Planted, plant_candidate
from tests.mutants.exact import exact_answers
from tests.mutants.mutant import LOADING, Change, Edit, Mutant, plant_linked
from tests.mutants.probes import Originals, answers, greatest_change

QUESTIONS = 120  # derived ones, of a mutant that no recorded case shows


@dataclass(frozen=True, slots=True)
class Setup:
    """Where the golden sets and the unchanged checkout are."""

    goldens: Path
    checkout: Path

    def golden(self) -> Golden:
        """Open the one golden set."""
        (found,) = find_goldens(self.goldens)
        return open_golden(found.folder)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a mutant.

    Args:
        table: the first phase that shows it by the table of tolerances, LOADING, or "".
        oracle: the same by the oracle.
        derived: the kinds of derived questions that show it, of one that the table does not show.
        place: what was named: a module, words for what is none, or the message at loading.
        used: by how much an answer is beyond its tolerance; inf where that is exact.
        change: of one that neither rule shows, the greatest difference of any answer from the
            original's, in units of rounding.
        question: the answer with that difference.
        weights: the weights that are not the checkpoint's, as the comparison of weights says.
        exact: of one that neither rule shows, the greatest difference in float64 throughout, in
            units of float32's rounding, too.
    """

    table: str = ""
    oracle: str = ""
    derived: tuple[str, ...] = ()
    place: str = ""
    used: float = math.inf
    change: float = math.inf
    question: str = ""
    weights: tuple[str, ...] = ()
    exact: float = math.inf

    @property
    def found(self) -> bool:
        """Whether anything shows it."""
        return bool(self.table or self.oracle or self.derived or self.weights)

    @property
    def by_weights_alone(self) -> bool:
        """Whether no answer shows it."""
        return bool(self.weights) and not (self.table or self.oracle or self.derived)


@contextmanager
def planted(mutant: Mutant, checkout: Path) -> Iterator[Planted]:
    """Plant a mutant in this process: `candidates.SPEC` builds it."""
    edit = mutant.fault if isinstance(mutant.fault, Edit) else None

    def alter(candidate: FmsCandidate) -> FmsCandidate:
        if isinstance(mutant.fault, Change):
            with torch.no_grad():
                mutant.fault.apply(candidate.model)
        return candidate

    with tempfile.TemporaryDirectory(dir=checkout.parent, prefix=".mutant-") as folder:
        plant_linked(edit, checkout=checkout, out=Path(folder))
        plan = Planted(Path(folder), alter)
        plant_candidate(plan)
        yield plan


def measure(mutant: Mutant, setup: Setup, originals: Originals) -> Outcome:
    """Check a mutant; where nothing shows, ask it everything. For a process of its own."""
    with planted(mutant, setup.checkout) as plan:
        request = CheckRequest(setup.goldens, candidate=SPEC)
        try:
            report = check(request, SilentProgress())
        except CandidateUnavailable as error:
            return Outcome(LOADING, LOADING, place=str(error))
        weights = _differing(report)
        oracle = fails_by_oracle(report.results)
        if report.divergence:
            table = report.divergence.phase.value
            return Outcome(
                table, oracle, (), report.location, _used(report.results), weights=weights
            )
        if oracle:
            by_oracle = check(replace(request, rule=Rule.ORACLE), SilentProgress())
            return Outcome(
                "",
                oracle,
                (),
                by_oracle.location,
                _used(by_oracle.results, Rule.ORACLE),
                weights=weights,
            )
        return _measure_quiet(replace(request, explore=QUESTIONS, seed=0), plan, setup, originals)


def _measure_quiet(
    request: CheckRequest, plan: Planted, setup: Setup, originals: Originals
) -> Outcome:
    """Ask a mutant that no recorded case shows all there is to ask."""
    report = check(request, SilentProgress())
    assert report.exploration is not None
    failed = {kind.kind: kind.failure for kind in report.exploration.kinds if kind.failure}
    assert plan.built is not None
    golden = setup.golden()
    change, question = greatest_change(originals, answers(plan.built, golden))
    # Last: it makes float64 the default of this process.
    exactly = replace(originals, answers=originals.exact)
    exact, _ = greatest_change(exactly, exact_answers(plan, golden))
    return Outcome(
        derived=tuple(failed),
        place=report.location if not failed else "",
        used=_used(list(failed.values())),
        change=change,
        question=question,
        weights=_differing(report),
        exact=exact,
    )


def _differing(report: CheckReport) -> tuple[str, ...]:
    found = report.weights
    return tuple(weight.name for weight in found.differing) if found else ()


def fails_by_oracle(results: Sequence[Result]) -> str:
    """Return the first phase that fails by the oracle, or ""; exact answers are judged as ever."""
    bad = [result.phase for result in results if not _passes_by_oracle(result)]
    return min(bad, key=phase_order).value if bad else ""


def _passes_by_oracle(result: Result) -> bool:
    if result.oracle is not None:
        return result.oracle.within
    return result.verdict in (Verdict.PASS, Verdict.SKIP)


def _used(results: Sequence[Result], rule: Rule = Rule.TABLE) -> float:
    """Return the greatest |diff| / allowed of the results that are no pass."""
    bad = [r for r in results if r.verdict in (Verdict.FAIL, Verdict.ERROR)]
    factors = [tolerance_used(result, rule) for result in bad]
    return max((math.inf if factor is None else factor for factor in factors), default=0.0)

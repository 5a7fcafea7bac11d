"""What one mutant does: whether `snap check` finds it, what it names, what it changes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from snapshot_tool.base.errors import CandidateUnavailable
from snapshot_tool.base.protocol import Progress, phase_order
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.results import Result, Verdict
from snapshot_tool.base.tolerance import Rule
from snapshot_tool.candidates.fms.candidate import FmsCandidate
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.workflow import check
from snapshot_tool.goldens.find import find_goldens
from snapshot_tool.goldens.golden import Golden, open_golden
from tests.mutants.answers import float64_logits, hugging_face_answers, read_answers
from tests.mutants.candidates import SPEC, Planted, plant_candidate
from tests.mutants.mutant import LOADING, Change, Edit, Mutant, plant_linked
from tests.mutants.probes import (
    Originals,
    compute_originals,
    float64_answers,
    greatest_change,
    load_float64,
    load_planted,
)
from tests.mutants.rules import RULES, References, failing_rules

QUESTIONS = 120  # derived ones, for a mutant that no recorded case shows


@dataclass(frozen=True, slots=True)
class Setup:
    """Where the golden sets and the unchanged checkout are, and what other rules compare with.

    Without references, the rules of other projects are not tried.
    """

    goldens: Path
    checkout: Path
    references: References | None = None

    def golden(self) -> Golden:
        """Open the one golden set."""
        (found,) = find_goldens(self.goldens)
        return open_golden(found.folder)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a mutant.

    Args:
        table: the first phase that fails by the table of tolerances, LOADING, or "".
        oracle: the same by the oracle.
        derived: the kinds of derived questions that fail, if no recorded case does.
        place: what was named: a module, other code, or the message at loading.
        guess: whether that is only a guess.
        weights: the weights that differ from the checkpoint's.
        probes: the modules that are wrong by themselves.
        change: if nothing fails, the greatest change of an answer in float64, in units of
            float32's rounding.
        question: the answer with that change.
        rules: the rules of other projects that find it; None if they were not tried.
    """

    table: str = ""
    oracle: str = ""
    derived: tuple[str, ...] = ()
    place: str = ""
    guess: bool = False
    weights: tuple[str, ...] = ()
    probes: tuple[str, ...] = ()
    change: float = math.inf
    question: str = ""
    rules: tuple[str, ...] | None = None

    @property
    def fails(self) -> bool:
        """Whether an answer shows it."""
        return bool(self.table or self.oracle or self.derived)

    @property
    def by_weights_alone(self) -> bool:
        """Whether only the comparison of weights finds it."""
        return bool(self.weights) and not self.fails

    @property
    def by_probes_alone(self) -> bool:
        """Whether only modules that are run by themselves show it."""
        return bool(self.probes) and not self.fails and not self.weights


@contextmanager
def planted(mutant: Mutant | None, checkout: Path) -> Iterator[Planted]:
    """Let `candidates.SPEC` build a mutant in this process, or the unchanged port."""
    fault = mutant.fault if mutant else None

    def alter(candidate: FmsCandidate) -> FmsCandidate:
        if isinstance(fault, Change):
            fault.apply(candidate.model)
        return candidate

    with tempfile.TemporaryDirectory(dir=checkout.parent, prefix=".mutant-") as folder:
        edit = fault if isinstance(fault, Edit) else None
        plant_linked(edit, checkout=checkout, out=Path(folder))
        plan = Planted(Path(folder), alter)
        plant_candidate(plan)
        yield plan


def measure(mutant: Mutant, setup: Setup) -> Outcome:
    """Check a mutant and try the rules of other projects on it, in a process of its own."""
    with planted(mutant, setup.checkout) as plan:
        return replace(check_planted(setup), rules=rules_that_fail(plan, setup))


def check_planted(setup: Setup) -> Outcome:
    """Check what is planted in this process."""
    request = CheckRequest(setup.goldens, candidate=SPEC)
    try:
        report = check(request, Progress())
    except CandidateUnavailable as error:
        return Outcome(LOADING, LOADING, place=str(error))
    weights = _differing(report)
    oracle = fails_by_oracle(report.results)
    if report.divergence:
        table = report.divergence.phase.value
        return _named(report, Outcome(table, oracle, weights=weights))
    if oracle:
        report = check(replace(request, tolerance=Rule.ORACLE), Progress())
        return _named(report, Outcome("", oracle, weights=weights))
    report = check(replace(request, explore=QUESTIONS, seed=0), Progress())
    assert report.exploration is not None
    derived = tuple(kind.kind for kind in report.exploration.kinds if kind.failure)
    outcome = Outcome(derived=derived, weights=weights)
    return outcome if derived else _named(report, outcome)


def rules_that_fail(
    plan: Planted, setup: Setup, *, is_right: bool = False
) -> tuple[str, ...] | None:
    """Return the rules of other projects that do not pass the port that a check just built.

    None if there are no references for its checkpoint and dtype.

    is_right: it is the unchanged port, run in another way: rules that compare a port with itself
    on a CPU compare it with the usual way.
    """
    if setup.references is None:
        return None
    if plan.built is None:  # it cannot be loaded, which every project's test would show
        return tuple(rule.name for rule in RULES)
    golden = setup.golden()
    port, recorded = plan.built.request, golden.manifest
    if port.dtype != recorded.dtype or port.config != recorded.checkpoint.config:
        return None
    answers = read_answers(plan.altered, golden)
    on_cpu = setup.references.port if is_right else answers
    return tuple(failing_rules(answers, setup.references, on_cpu=on_cpu))


def measure_references(setup: Setup) -> References:
    """Compute what other rules compare a port with, in a process of its own."""
    golden = setup.golden()
    with planted(None, setup.checkout) as plan:
        port = read_answers(load_planted(plan, golden, dtype="float32"), golden)
        double = float64_logits(load_float64(plan, golden), golden)
    return References(hugging_face_answers(port, double, golden), port)


def _named(report: CheckReport, outcome: Outcome) -> Outcome:
    """Return an outcome with the place that a report names."""
    guess = report.location_is_guess
    probes = tuple(trial.module for trial in report.wrong_modules)
    return replace(outcome, place=report.location, guess=guess, probes=probes)


def measure_original(setup: Setup) -> Originals:
    """Check the unchanged port and compute its answers, in a process of its own."""
    with planted(None, setup.checkout) as plan:
        report = check(CheckRequest(setup.goldens, candidate=SPEC), Progress())
        if report.divergence:
            raise ValueError(f"the unchanged port fails: {report.divergence}")
        return compute_originals(plan, setup.golden())


def measure_change(mutant: Mutant, setup: Setup, originals: Originals) -> tuple[float, str]:
    """Return the greatest change of an answer, and which, in a process of its own."""
    with planted(mutant, setup.checkout) as plan:
        return greatest_change(originals, float64_answers(plan, setup.golden()))


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

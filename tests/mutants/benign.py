"""Benign changes: other ways to compute the same, which must raise no alarm."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

from snapshot_tool.base.protocol import Progress
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.results import Verdict
from snapshot_tool.candidates.fms.candidate import FmsCandidate
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.workflow import check
from tests.mutants.candidates import SPEC, Planted, plant_candidate
from tests.mutants.measure import Setup, fails_by_oracle, rules_that_fail
from tests.mutants.ways import USUAL, WAYS, Way, with_calls

EACH = 5  # runs of one port
CASES = 2
QUESTIONS = 9  # derived ones, one of each kind
MOST_WAYS = 4
_COMPILED = 10  # a tenth of the runs
LOCALISED = 0.1  # of the runs


@dataclass(frozen=True, slots=True)
class Benign:
    """One run of the unchanged port.

    Args:
        seed: of its cases and derived questions.
        names: of its WAYS; none for the port as it is.
    """

    seed: int
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Describe the run in words."""
        return f"{', '.join(self.names) or 'as it is'} (seed {self.seed})"

    @property
    def ways(self) -> list[Way]:
        """Its ways."""
        return [WAYS[name] for name in self.names]


def benign_runs(
    count: int, *, seed: int = 0, names: Iterable[str] = WAYS, each: int = EACH
) -> list[Benign]:
    """Draw runs: every way in turn, together with up to three others, for `each` runs in a row.

    Of many runs, the last tenth is of compiled ports, each of which serves its share of the runs.
    """
    draw = random.Random(seed)
    plain = [name for name in names if not WAYS[name].compiles]
    compiling = [name for name in names if WAYS[name].compiles]
    shared = count // (_COMPILED * len(compiling)) if compiling else 0
    rest = count - shared * len(compiling)
    mixtures: list[tuple[str, ...]] = []
    for name in islice(cycle(plain), math.ceil(rest / each)):
        mixtures += [_mixture(name, plain, draw)] * each
    del mixtures[rest:]
    for name in compiling:
        mixtures += [_mixture(name, plain, draw)] * shared
    return [Benign(place, mixture) for place, mixture in enumerate(mixtures)]


def _mixture(first: str, names: Iterable[str], draw: random.Random) -> tuple[str, ...]:
    """Return a way together with others that it can be combined with."""
    others = [name for name in names if name != first]
    found, wanted = [first], draw.randint(1, MOST_WAYS)
    for name in draw.sample(others, len(others)):
        if len(found) < wanted and all(_can_combine(WAYS[name], WAYS[other]) for other in found):
            found.append(name)
    return tuple(found)


def _can_combine(one: Way, other: Way) -> bool:
    return (
        one.part != other.part and one.part not in other.excludes and other.part not in one.excludes
    )


@dataclass(frozen=True, slots=True)
class Alarms:
    """The alarm that a benign run raised, by the table or in a module, and by the oracle.

    `rules` are the rules of other projects that raise one; None if they were not tried.
    """

    table: str = ""
    oracle: str = ""
    rules: tuple[str, ...] | None = None


# The last port of this process, by its ways: runs in a row share it.
_ports: dict[tuple[str, ...], Planted] = {}


def run_benign(benign: Benign, setup: Setup) -> Alarms:
    """Check the unchanged port in these ways: two drawn cases, and derived questions on them.

    With references, the rules of other projects are tried, too, if all ways are USUAL.
    """
    planted = _ports.get(benign.names)
    if planted is None:
        _ports.clear()
        planted = Planted(setup.checkout, lambda found: _altered(found, benign), keeps=True)
        _ports[benign.names] = planted
    plant_candidate(planted)
    draw = random.Random(benign.seed)
    options: dict[str, Any] = {
        "goldens": setup.goldens,
        "localise": draw.random() < LOCALISED,
        "explore": QUESTIONS,
        "seed": benign.seed,
    }
    for way in benign.ways:
        options |= way.options
    request = CheckRequest(**options, candidate=SPEC)
    cases = [case.name for case in request.golden_choice.open().manifest.cases]
    request = replace(request, case=draw.sample(cases, min(CASES, len(cases))))
    with ExitStack() as stack:
        for way in benign.ways:
            stack.enter_context(way.around())
        report = check(request, Progress())
        is_usual = set(benign.names) <= set(USUAL)
        rules = rules_that_fail(planted, setup, is_right=True) if is_usual else None
    return Alarms(_table_alarm(report), fails_by_oracle(report.results), rules)


def _altered(candidate: FmsCandidate, benign: Benign) -> FmsCandidate:
    for way in benign.ways:
        candidate = way.alter(candidate)
    contexts = [way.within for way in benign.ways if way.within is not nullcontext]
    return with_calls(candidate, *contexts) if contexts else candidate


def _table_alarm(report: CheckReport) -> str:
    if report.divergence:
        first = report.divergence
        return f"{first.phase} {first.case} {first.tensor}: {first.reason}"
    if report.verdict is not Verdict.PASS:
        return f"verdict {report.verdict}"
    found = report.localisation
    named = found and (found.first_bad or found.between)
    return f"names {found.module or 'the model'}" if found and named else ""

"""docs/detection.md: what was found of what was injected, and what was named."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tests.mutants.benign import Alarms, Benign, kinds_of
from tests.mutants.corpus import GROUPS, MUTANTS
from tests.mutants.forked import Crash
from tests.mutants.measure import QUESTIONS, Outcome
from tests.mutants.mutant import DERIVED, LOADING, Change, Mutant

_NEAR = 3.0  # times the tolerance: what a little more tolerance would have hidden
_WEIGHTS = "the weights alone"
_PHASES = ("preprocessing", "vision", "connector", "forward", "generate")
_FOUND_IN = (LOADING, *_PHASES, DERIVED, _WEIGHTS)


class Fate(StrEnum):
    """What became of a mutant."""

    FOUND = "found"
    MISSED = "missed"
    EQUIVALENT = "changes nothing"
    CRASHED = "crashed"


def fate(outcome: Outcome | Crash) -> Fate:
    """Return what became of a mutant; one that changes no answer beyond rounding is equivalent.

    In float32 the rounding of both is in the difference, in float64 that of neither. A weight that
    alone gives a mutant away makes it none.
    """
    if isinstance(outcome, Crash):
        return Fate.CRASHED
    same = min(outcome.change, outcome.exact) <= 1
    if same and (outcome.by_weights_alone or not outcome.found):
        return Fate.EQUIVALENT
    return Fate.FOUND if outcome.found else Fate.MISSED


def is_named(mutant: Mutant, outcome: Outcome | Crash) -> bool:
    """Tell whether the right place was named."""
    if isinstance(outcome, Crash):
        return False
    expected = (mutant.place, *mutant.also)
    if outcome.table == LOADING:
        # The message has the weight, by FMS's name.
        return any(place.removeprefix("model.") in outcome.place for place in expected)
    return outcome.place in expected or not set(expected).isdisjoint(outcome.derived)


@dataclass(frozen=True, slots=True)
class Detection:
    """All results: of the mutants, and of the benign ways with what they raised as an alarm."""

    outcomes: Mapping[str, Outcome | Crash]
    ways: Mapping[str, Benign]
    alarms: Mapping[str, Alarms | Crash]

    def of(self, fate_of: Fate, names: Iterable[str] | None = None) -> list[str]:
        """Return the mutants of one fate, of all that were run or of some."""
        chosen = self.outcomes if names is None else names
        return [name for name in chosen if fate(self.outcomes[name]) is fate_of]

    def named(self, names: Iterable[str] | None = None) -> list[str]:
        """Return the mutants that were found and rightly named."""
        found = self.of(Fate.FOUND, names)
        return [name for name in found if is_named(MUTANTS[name], self.outcomes[name])]

    def shown_by(self, shows: Callable[[Outcome], object]) -> list[str]:
        """Return the mutants whose outcome is shown by something."""
        return [n for n, o in self.outcomes.items() if isinstance(o, Outcome) and shows(o)]

    def rang(self, rings: Callable[[Alarms], object]) -> int:
        """Count the benign runs that raised an alarm."""
        return sum(isinstance(a, Alarms) and bool(rings(a)) for a in self.alarms.values())

    def summary(self) -> list[str]:
        """Say it in a few lines."""
        found, equivalent = self.of(Fate.FOUND), self.of(Fate.EQUIVALENT)
        real = len(self.outcomes) - len(equivalent)
        table, oracle = self.shown_by(lambda o: o.table), self.shown_by(lambda o: o.oracle)
        derived = self.shown_by(lambda o: o.derived)
        weights = [n for n in found if n in self.shown_by(lambda o: o.by_weights_alone)]
        finished = [a for a in self.alarms.values() if isinstance(a, Alarms)]
        unfinished = len(self.alarms) - len(finished)
        return [
            f"{len(found)} of {real} faults found ({_share(found, real)}): {len(table)} by the "
            f"table of tolerances, {len(oracle)} by the oracle, {len(derived)} by derived "
            f"questions alone, {len(weights)} by the comparison of weights alone; "
            f"{len(equivalent)} more mutants change no answer beyond rounding",
            f"{len(self.named())} of {len(found)} found faults named rightly "
            f"({_share(self.named(), len(found))})",
            f"{self.rang(lambda a: a.table)} false alarms in {len(finished)} benign runs; "
            f"{self.rang(lambda a: a.oracle)} by the oracle"
            + (f"; {unfinished} more runs gave no result" if unfinished else ""),
        ]

    def verdicts(self) -> dict[str, dict[str, object]]:
        """Return what came of each, as plain data."""
        named = set(self.named())
        return {
            "mutants": {
                name: {"fate": fate(outcome), "named": name in named, "outcome": str(outcome)}
                for name, outcome in self.outcomes.items()
            },
            "alarms": {name: _alarm(alarms) for name, alarms in self.alarms.items()},
        }


def _share(some: Sequence[str], of: int) -> str:
    return f"{len(some) / of:.1%}" if of else "none"


def write_report(detection: Detection, path: Path) -> None:
    """Write the table; `make mutants` is the only author."""
    path.write_text("\n".join(_lines(detection)) + "\n", encoding="utf-8")


def _lines(detection: Detection) -> list[str]:
    return [
        "# Detection",
        "Written by `make mutants`, never by hand. Every mutant is one fault in the FMS checkout, "
        "in its source or in a weight in memory (`tests/mutants/corpus`); its phase and place were "
        "written down before it was run. `snap check` judges it by the golden's table of "
        "tolerances and by the oracle, and compares its weights with the checkpoint's; a mutant "
        f"that passes both rules is asked {QUESTIONS} derived questions (`--explore`). Weights are "
        "changed after loading: what the comparison of weights finds is counted only where no "
        "answer shows it.",
        "",
        *(f"- {line}" for line in detection.summary()),
        "",
        *_groups(detection),
        *_phases(detection),
        *_misses(detection),
        *_rules(detection),
        *_equivalents(detection),
        *_wrong_names(detection),
        *_near_misses(detection),
        *_benign(detection),
        *_every_mutant(detection),
    ]


def _groups(detection: Detection) -> list[str]:
    rows = []
    for group, mutants in {**GROUPS, "all": tuple(MUTANTS.values())}.items():
        names = [mutant.name for mutant in mutants]
        real = len(names) - len(detection.of(Fate.EQUIVALENT, names))
        counts = (len(detection.of(Fate.FOUND, names)), len(detection.named(names)))
        rows.append((group, len(names), real, *counts))
    header = ("group", "injected", "change an answer", "found", "named rightly")
    return ["## By group", *_table(header, rows), ""]


def _phases(detection: Detection) -> list[str]:
    found = [detection.outcomes[name] for name in detection.of(Fate.FOUND)]
    counts = Counter(_found_in(outcome) for outcome in found if isinstance(outcome, Outcome))
    order = {name: place for place, name in enumerate(_FOUND_IN)}
    rows = sorted(counts.items(), key=lambda row: (order[re.split("[:,]", row[0])[0]], row[0]))
    return ["## Found first", *_table(("in", "mutants"), rows), ""]


def _found_in(outcome: Outcome) -> str:
    """Return the phase, or the first kind of derived question."""
    if outcome.table:
        return outcome.table
    if outcome.oracle:
        return f"{outcome.oracle}, by the oracle alone"
    if outcome.by_weights_alone:
        return _WEIGHTS
    return f"{DERIVED}: {outcome.derived[0]}"


def _rules(detection: Detection) -> list[str]:
    """Show which faults each rule misses that anything else finds."""
    found = set(detection.of(Fate.FOUND))
    rows = []
    rules: dict[str, Callable[[Outcome], object]] = {
        "table": lambda o: o.table,
        "oracle": lambda o: o.oracle,
    }
    for rule, shows in rules.items():
        missed = found - set(detection.shown_by(shows))
        rows.append((rule, len(missed), ", ".join(n for n in MUTANTS if n in missed)))
    header = ("rule", "misses of those found", "which")
    return ["## What each rule misses on the recorded cases", *_table(header, rows), ""]


def _misses(detection: Detection) -> list[str]:
    rows = []
    for name in [*detection.of(Fate.MISSED), *detection.of(Fate.CRASHED)]:
        outcome = detection.outcomes[name]
        why = outcome.why.splitlines()[-1] if isinstance(outcome, Crash) else _why(outcome)
        rows.append((name, MUTANTS[name].what, why))
    return ["## Missed, and why", *_table(("mutant", "fault", "why"), rows), ""]


def _why(outcome: Outcome) -> str:
    change = "another answer" if math.isinf(outcome.change) else f"{outcome.change:.3g}x rounding"
    if "variant" in outcome.question or "image" in outcome.question:
        return f"within the tolerance: {change} in {outcome.question}"
    return f"shows only where nothing was recorded: {change} in {outcome.question}"


def _equivalents(detection: Detection) -> list[str]:
    rows = []
    for name in detection.of(Fate.EQUIVALENT):
        outcome = detection.outcomes[name]
        assert isinstance(outcome, Outcome)
        where = f"{outcome.change:.2g}x in {outcome.question}" if outcome.change else "0"
        exact = f"{outcome.exact:.1g}x" if outcome.exact else "0"
        weights = "finds it" if outcome.weights else ""
        rows.append((name, MUTANTS[name].what, where, exact, weights))
    header = ("mutant", "what it changes", "in float32", "in float64", "comparison of weights")
    return [
        "## Change no answer beyond rounding",
        "Run beside the original on every recorded input, on left-padded batches of two cases, on "
        "a prompt of every token and on ten more pictures, in float32 and in float64 throughout: "
        "the greatest difference of any answer, in units of rounding (how far the unchanged port "
        "is from Hugging Face in float32). Two runs in float32 differ by the rounding of both; in "
        "float64 only what the fault itself changes is left. A softmax does not see what is added "
        "to a whole row (a key's bias), rotary embedding not where positions begin, a norm that "
        "takes the mean off not what is added to all of a position.",
        "",
        *_table(header, rows),
        "",
    ]


def _wrong_names(detection: Detection) -> list[str]:
    right = set(detection.named())
    rows = []
    for name in detection.of(Fate.FOUND):
        outcome = detection.outcomes[name]
        if name not in right and isinstance(outcome, Outcome):
            rows.append((name, MUTANTS[name].place, _named(outcome) or "nothing"))
    return ["## Found and wrongly named", *_table(("mutant", "is in", "named"), rows), ""]


def _near_misses(detection: Detection) -> list[str]:
    rows = []
    for name in detection.of(Fate.FOUND):
        outcome = detection.outcomes[name]
        if isinstance(outcome, Outcome) and outcome.used < _NEAR:
            rows.append((name, _found_in(outcome), f"{outcome.used:.2g}x the tolerance"))
    return ["## Near misses", *_table(("mutant", "found in", "worst element"), rows), ""]


def _benign(detection: Detection) -> list[str]:
    runs: Counter[str] = Counter()
    alarms: Counter[str] = Counter()
    wrong = []
    for name, way in detection.ways.items():
        runs.update(kinds_of(way))
        if said := _alarm(detection.alarms[name]):
            alarms.update(kinds_of(way))
            wrong.append((_way(way), said))
    rows = [(kind, count, alarms[kind]) for kind, count in runs.items()]
    return [
        "## Benign runs",
        "The unchanged port, run in other ways, each with the full check, `--localise` and derived "
        "questions of another seed: each way alone, and mixtures of them drawn at random.",
        "",
        *_table(("way", "runs", "false alarms"), rows),
        "",
        *([*_table(("run", "alarm"), wrong), ""] if wrong else ()),
    ]


def _alarm(alarms: Alarms | Crash) -> str:
    if isinstance(alarms, Crash):
        return alarms.why.splitlines()[-1]
    return alarms.table or (f"{alarms.oracle}, by the oracle" if alarms.oracle else "")


def _way(way: Benign) -> str:
    return ", ".join(kinds_of(way))


def _every_mutant(detection: Detection) -> list[str]:
    lines = ["## Every mutant"]
    for group, mutants in GROUPS.items():
        rows = [_row(mutant, detection.outcomes[mutant.name]) for mutant in mutants]
        lines += ["", f"### {group}", *_table(("mutant", "fault", "found in", "named"), rows)]
    return lines


def _row(mutant: Mutant, outcome: Outcome | Crash) -> tuple[str, ...]:
    what = mutant.what
    if isinstance(mutant.fault, Change):
        what = f"{what} (`{mutant.fault.words.partition(':')[0]}`)"
    if isinstance(outcome, Crash) or not outcome.found:
        return mutant.name, what, f"**{fate(outcome)}**", ""
    wrong = "" if is_named(mutant, outcome) else f", not {mutant.place}"
    return mutant.name, what, _found_in(outcome), _named(outcome) + wrong


def _named(outcome: Outcome) -> str:
    if outcome.table == LOADING:
        # Paths of one machine are in the message, and behind the colon the weight.
        return outcome.place.splitlines()[0].rpartition(": ")[2]
    return outcome.place or ", ".join(outcome.derived)


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join('---' for _ in header)} |"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return lines if rows else ["None."]

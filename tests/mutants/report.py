"""docs/detection.md: which planted faults a check finds, and which module it names."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tests.history.rules import APPLICABLE, Trial, read_trials
from tests.mutants.benign import Alarms
from tests.mutants.corpus import GROUPS, MUTANTS
from tests.mutants.forked import Crash
from tests.mutants.measure import QUESTIONS, Outcome
from tests.mutants.mutant import DERIVED, LOADING, Mutant
from tests.mutants.rules import RULES, Rule

Result = TypeVar("Result", Outcome, Alarms)

_WEIGHTS = "the comparison of weights alone"
_PROBES = "modules by themselves alone"
_PHASES = ("preprocessing", "vision", "connector", "forward", "generate")
_FOUND_BY = (LOADING, *_PHASES, DERIVED, _WEIGHTS, _PROBES)
_INTRODUCTION = f"""\
`make mutants` writes this page. It plants {len(MUTANTS)} faults one at a time in the tests' FMS \
checkout, in its source or in a loaded weight (`tests/mutants/corpus`), and runs `snap check` on \
the committed golden set. The expected phase and place were written down before the first run. If \
no recorded case shows a fault, {QUESTIONS} derived questions are run (`--explore`). Intervals are \
Wilson's, at 95 %."""
_EQUIVALENT = """\
These are not counted as faults. In float64, no output differs by more than float32 rounding. This \
was measured on every recorded input, on batches of two cases, on a prompt of every token and on \
ten more images."""
_OTHERS = """\
The same faults, and benign runs of the ways below that take the committed set in float32, judged \
by each rule with its project's thresholds. All rules are given the recorded cases, the parity \
suite's first row only the two that are its own; in benign runs `snap` checks three of the cases, \
and derived questions. Only the parity suite and `snap` run the port's preprocessing, and only \
`snap` names a place. A port that raises is found by every rule that runs it.

What Hugging Face answers is the recorded golden set. It keeps whole logits of the last token \
only: for other tokens and for steps of the generation those of the unchanged port are taken, \
which differ from Hugging Face's by rounding. A stored signature is the unchanged port's. \
aiu-fms-testing-utils compares FMS on an accelerator with the same FMS on a CPU, so a fault of \
the port is on both sides: its first row is the rule as it is used, the next three compare with \
Hugging Face.

History: the parents of {trials} commits of [history.md](history.md), those with a language model \
in one process, and the fixes among these that `snap` passes. Their golden sets keep whole logits \
of the last token only, so other rules are left out, and MaxText's reads that token alone. A \
parent that `snap` refuses to load counts as found by every rule; one that is refused for another \
reason than its fault is left out."""
FALSE_ALARMS = "False alarms"  # the section that make benign writes


class Fate(StrEnum):
    """The result of a mutant."""

    FOUND = "found"
    MISSED = "missed"
    EQUIVALENT = "changes nothing"
    CRASHED = "crashed"


def fate(outcome: Outcome | Crash) -> Fate:
    """Return the result of a mutant; it is equivalent if no output changes beyond rounding.

    A weight that differs without changing an output does not count as found.
    """
    if isinstance(outcome, Crash):
        return Fate.CRASHED
    if not outcome.fails and outcome.change <= 1:
        return Fate.EQUIVALENT
    is_found = outcome.fails or outcome.weights or outcome.probes
    return Fate.FOUND if is_found else Fate.MISSED


def is_named(mutant: Mutant, outcome: Outcome | Crash) -> bool:
    """Return whether an expected place was named."""
    if isinstance(outcome, Crash):
        return False
    if outcome.table == LOADING:
        # The message has the weight, by FMS's name.
        return any(place.removeprefix("model.") in outcome.place for place in mutant.places)
    return outcome.place in mutant.places or not set(mutant.places).isdisjoint(outcome.derived)


def interval(some: int, of: int) -> str:
    """Return Wilson's 95 % interval of a share."""
    if not of:
        return "none"
    z = 1.96
    share = some / of
    middle = share + z * z / (2 * of)
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    low, high = ((middle + sign * half) / (1 + z * z / of) for sign in (-1, 1))
    return f"{100 * max(low, 0):.1f} to {100 * min(high, 1):.1f} %"


def bound(some: int, of: int) -> str:
    """Return what 95 % confidence allows a share to be: if there is none, exactly its most.

    With none of `of`, that is close to 3 / of, by the rule of three.
    """
    if some or not of:
        return interval(some, of)
    return f"at most {100 * (1 - 0.05 ** (1 / of)):.2g} %"


@dataclass(frozen=True, slots=True)
class Detection:
    """All results: by mutant, and by the words for a benign run."""

    outcomes: Mapping[str, Outcome | Crash]
    alarms: Mapping[str, Alarms | Crash]

    def of(self, fate_of: Fate, names: Iterable[str] | None = None) -> list[str]:
        """Return the mutants with this result, of all that were run or of some."""
        chosen = self.outcomes if names is None else names
        return [name for name in chosen if fate(self.outcomes[name]) is fate_of]

    def named(self, names: Iterable[str] | None = None) -> list[str]:
        """Return the mutants that were found and correctly named."""
        found = self.of(Fate.FOUND, names)
        return [name for name in found if is_named(MUTANTS[name], self.outcomes[name])]

    def shown_by(self, shows: Callable[[Outcome], object]) -> list[str]:
        """Return the mutants with such an outcome."""
        return [n for n, o in self.outcomes.items() if isinstance(o, Outcome) and shows(o)]

    def counts(self, found: Iterable[str], *, named: bool) -> tuple[str, str, str]:
        """Return how many faults a rule found, the interval, and how many of them it names.

        found: the mutants that it shows. named: whether the rule names a place at all.
        """
        real = set(self.outcomes) - set(self.of(Fate.EQUIVALENT))
        shown = real.intersection(found)
        names = str(len(shown.intersection(self.named()))) if named else "-"
        return str(len(shown)), interval(len(shown), len(real)), names

    def summary(self) -> list[str]:
        """Return the result in three lines."""
        found, named = self.of(Fate.FOUND), self.named()
        real = len(self.outcomes) - len(self.of(Fate.EQUIVALENT))
        facts = [n for n in found if n not in self.shown_by(lambda o: o.guess)]
        right = [name for name in named if name in facts]
        table, oracle = self.shown_by(lambda o: o.table), self.shown_by(lambda o: o.oracle)
        derived = self.shown_by(lambda o: o.derived)
        weights = [n for n in self.shown_by(lambda o: o.by_weights_alone) if n in found]
        probes = [n for n in self.shown_by(lambda o: o.by_probes_alone) if n in found]
        finished = [a for a in self.alarms.values() if isinstance(a, Alarms)]
        by_table = sum(bool(a.table) for a in finished)
        by_oracle = sum(bool(a.oracle) for a in finished)
        unfinished = len(self.alarms) - len(finished)
        return [
            f"{len(found)} of {real} faults found ({interval(len(found), real)}): "
            f"{len(table)} by the table of tolerances, {len(oracle)} by the oracle, "
            f"{len(derived)} by derived questions alone, {len(weights)} by {_WEIGHTS}, "
            f"{len(probes)} by {_PROBES}.",
            f"{len(named)} of {len(found)} found faults named correctly "
            f"({interval(len(named), len(found))}): {len(right)} of {len(facts)} names given as "
            f"fact ({interval(len(right), len(facts))}), {len(named) - len(right)} of "
            f"{len(found) - len(facts)} guesses.",
            f"{by_table} false alarms in {len(finished)} benign runs "
            f"({interval(by_table, len(finished))}); {by_oracle} by the oracle."
            + (f" {unfinished} more runs gave no result." if unfinished else ""),
        ]

    def verdicts(self) -> dict[str, dict[str, Any]]:
        """Return the results as plain data, which `read_results` reads."""
        named = set(self.named())
        return {
            "mutants": {
                name: {"fate": fate(outcome), "named": name in named, "outcome": asdict(outcome)}
                for name, outcome in self.outcomes.items()
            },
            "alarms": {
                way: {"alarm": _alarm(alarms), "outcome": asdict(alarms)}
                for way, alarms in self.alarms.items()
            },
        }


def read_results(files: Iterable[Path]) -> Detection:
    """Read the results in files of `Detection.verdicts`; a later file wins."""
    outcomes: dict[str, Outcome | Crash] = {}
    alarms: dict[str, Alarms | Crash] = {}
    for path in files:
        stored = json.loads(path.read_text(encoding="utf-8"))
        for name, one in stored["mutants"].items():
            outcomes[name] = _from_stored(one["outcome"], Outcome)
        for way, one in stored["alarms"].items():
            alarms[way] = _from_stored(one["outcome"], Alarms)
    return Detection({name: outcomes[name] for name in MUTANTS if name in outcomes}, alarms)


def _from_stored(stored: dict[str, Any], result: type[Result]) -> Result | Crash:
    if "why" in stored:
        return msgspec.convert(stored, Crash)
    return msgspec.convert(stored, result)


def write_report(detection: Detection, path: Path) -> None:
    """Write the page; keep its section of false alarms."""
    alarms = [f"  - {way}: {_alarm(a)}" for way, a in detection.alarms.items() if _alarm(a)]
    summary = [f"- {line}" for line in detection.summary()]
    sections = [
        ("Detection", [_INTRODUCTION, "", *summary, *alarms]),
        ("By part of the port", _groups(detection)),
        ("First found by", _first_found(detection)),
        ("Missed", _misses(detection)),
        ("Found, but with another place named", _wrong_names(detection)),
        ("Not found by one rule on the recorded cases", _rules(detection)),
        ("The rules of other projects", _other_rules(detection)),
        ("Faults that change no output", [_EQUIVALENT, "", *_equivalents(detection)]),
    ]
    pages = [f"# {title}\n" + "\n".join(lines) + "\n" for title, lines in sections]
    kept = _sections(path).get(FALSE_ALARMS)
    path.write_text("\n#".join(pages) + (f"\n{kept}" if kept else ""), encoding="utf-8")


def write_section(title: str, lines: Sequence[str], path: Path) -> None:
    """Write one section of the page, at its end if there is none; keep the others."""
    sections = _sections(path)
    sections[title] = "\n".join([f"## {title}", *lines, ""])
    path.write_text("\n".join(sections.values()), encoding="utf-8")


def _sections(path: Path) -> dict[str, str]:
    """Return the sections of the page by their titles, without the empty line between them."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.split(r"\n(?=## )", page)
    return {text.partition("\n")[0].lstrip("# "): text for text in found if text}


def _groups(detection: Detection) -> list[str]:
    rows = []
    for group, mutants in {**GROUPS, "all": tuple(MUTANTS.values())}.items():
        names = [mutant.name for mutant in mutants]
        real = len(names) - len(detection.of(Fate.EQUIVALENT, names))
        found, named = len(detection.of(Fate.FOUND, names)), len(detection.named(names))
        rows.append((group, len(names), real, found, interval(found, real), named))
    header = ("part", "planted", "change an output", "found", "95 %", "named correctly")
    return table_lines(header, rows)


def _first_found(detection: Detection) -> list[str]:
    found = [detection.outcomes[name] for name in detection.of(Fate.FOUND)]
    counts = Counter(_found_by(outcome) for outcome in found if isinstance(outcome, Outcome))
    order = {name: place for place, name in enumerate(_FOUND_BY)}
    rows = sorted(counts.items(), key=lambda row: (order[re.split("[:,]", row[0])[0]], row[0]))
    return table_lines(("phase", "faults"), rows)


def _found_by(outcome: Outcome) -> str:
    """Return the phase, or the first kind of derived question."""
    if outcome.table:
        return outcome.table
    if outcome.oracle:
        return f"{outcome.oracle}, by the oracle alone"
    if outcome.by_weights_alone:
        return _WEIGHTS
    if outcome.by_probes_alone:
        return _PROBES
    return f"{DERIVED}: {outcome.derived[0]}"


def _misses(detection: Detection) -> list[str]:
    rows = []
    for name in [*detection.of(Fate.MISSED), *detection.of(Fate.CRASHED)]:
        outcome = detection.outcomes[name]
        why = outcome.why.splitlines()[-1] if isinstance(outcome, Crash) else _why(outcome)
        rows.append((f"`{name}`", MUTANTS[name].what, why))
    return table_lines(("fault", "what it is", "why"), rows)


def _why(outcome: Outcome) -> str:
    change = "another output" if math.isinf(outcome.change) else f"{outcome.change:.3g}x rounding"
    recorded = "variant" in outcome.question or "image" in outcome.question
    where = "within the tolerance" if recorded else "not reached by recorded cases"
    return f"{where}: {change} in {outcome.question}"


def _wrong_names(detection: Detection) -> list[str]:
    right = set(detection.named())
    rows = []
    for name in detection.of(Fate.FOUND):
        outcome = detection.outcomes[name]
        if name not in right and isinstance(outcome, Outcome):
            named = outcome.place or ", ".join(outcome.derived) or "nothing"
            named += ", as a guess" if outcome.guess else ""
            rows.append((f"`{name}`", MUTANTS[name].places[0], named))
    return table_lines(("fault", "place", "named"), rows)


def _rules(detection: Detection) -> list[str]:
    rules: Mapping[str, Callable[[Outcome], object]] = {
        "table": lambda outcome: outcome.table,
        "oracle": lambda outcome: outcome.oracle,
    }
    rows = []
    for rule, shows in rules.items():
        shown = set(detection.shown_by(shows))
        missed = [name for name in detection.of(Fate.FOUND) if name not in shown]
        rows.append((rule, len(missed), ", ".join(missed)))
    return table_lines(("rule", "faults", "which"), rows)


def _other_rules(detection: Detection) -> list[str]:
    finished = [a for a in detection.alarms.values() if isinstance(a, Alarms)]
    tried = [a for a in finished if a.rules is not None]
    trials = read_trials()
    rows: list[tuple[str, ...]] = []
    for rule in RULES:
        counts = detection.counts(_found_by_rule(detection, rule), named=False)
        alarms = sum(rule.name in (a.rules or ()) for a in tried)
        past = _history(trials, rule.name) if rule.name in APPLICABLE else ("-", "-")
        rows.append((_link(rule), rule.what, *counts, f"{alarms} of {len(tried)}", *past))
    by_table, by_oracle = (
        f"{sum(map(bool, alarms))} of {len(tried)}"
        for alarms in ([a.table for a in tried], [a.oracle for a in tried])
    )
    own: tuple[tuple[str, str, Callable[[Outcome], object], str], ...] = (
        ("snap, table", "each phase within the table of tolerances", lambda o: o.table, by_table),
        (
            "snap, oracle",
            "each phase within Hugging Face's rounding",
            lambda o: o.oracle,
            by_oracle,
        ),
        ("snap, derived questions", "table, oracle and derived questions", _is_shown, by_table),
        ("snap", "all of these, weights, and modules by themselves", _is_found, by_table),
    )
    for name, what, shows, false_alarms in own:
        counts = detection.counts(detection.shown_by(shows), named=True)
        past = _history(trials, None) if name == "snap" else ("-", "-")
        rows.append((f"**{name}**", what, *counts, false_alarms, *past))
    header = (
        *("rule", "what must hold", "found", "95 %", "named", "false alarms"),
        *("history: found", "history: false alarms"),
    )
    return [_OTHERS.format(trials=len(trials)), "", *table_lines(header, rows)]


def _link(rule: Rule) -> str:
    return f"[{rule.name}]({rule.source})"


def _history(trials: Sequence[Trial], rule: str | None) -> tuple[str, str]:
    """Return how many parents a rule finds, and how many right fixes it fails; None for snap."""
    right = [trial for trial in trials if trial.passes]
    alarms = f"{sum(rule in trial.after for trial in right)} of {len(right)}"
    if rule is not None:
        return f"{sum(rule in trial.before for trial in trials)} of {len(trials)}", alarms
    found, named = sum(t.found for t in trials), sum(t.named for t in trials)
    return f"{found} of {len(trials)}, {named} named", alarms


def _found_by_rule(detection: Detection, rule: Rule) -> list[str]:
    return detection.shown_by(lambda outcome: rule.name in (outcome.rules or ()))


def _is_shown(outcome: Outcome) -> bool:
    return outcome.fails


def _is_found(outcome: Outcome) -> bool:
    return fate(outcome) is Fate.FOUND


def _equivalents(detection: Detection) -> list[str]:
    return [f"- `{name}`: {MUTANTS[name].what}" for name in detection.of(Fate.EQUIVALENT)]


def _alarm(alarms: Alarms | Crash) -> str:
    if isinstance(alarms, Crash):
        return alarms.why.splitlines()[-1]
    return alarms.table or (f"{alarms.oracle}, by the oracle" if alarms.oracle else "")


def table_lines(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return a table, or "None." if it has no rows."""
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join('---' for _ in header)} |"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return lines if rows else ["None."]

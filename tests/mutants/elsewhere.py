"""Compare `snap judge` with `snap check` on mutants, and write the figure into docs/answers.md.

    python -m tests.mutants.elsewhere [--workers 2] [--mutants NAME,NAME]

Each mutant of forward and generate is checked, and answers the questions of `snap ask` by the
script of the documentation, at the level of log-probabilities.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from snapshot_tool.base.errors import CandidateUnavailable
from snapshot_tool.base.protocol import Phase, Progress
from snapshot_tool.candidates.answers import weight_digests
from snapshot_tool.check.ask import ask
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.workflow import check
from tests.examples.answer import answer
from tests.mutants.candidates import SPEC
from tests.mutants.corpus import MUTANTS
from tests.mutants.forked import Crash, run_forked
from tests.mutants.measure import Setup, planted
from tests.mutants.mutant import Mutant

_PHASES = (Phase.FORWARD, Phase.GENERATE)
_SECONDS = 600
_PAGE = Path("docs/answers.md")
_FIGURE = re.compile(r"(?<=`make mutants-answers` compares both\. )[^\n]*")


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Whether a mutant fails, by a check and by its answers."""

    checked: bool
    judged: bool


def compare(mutant: Mutant | None, setup: Setup, asked: Path) -> Verdicts | None:
    """Return both verdicts on a mutant, or on the unchanged port; None if it cannot be loaded."""
    who = {"engine": "fms", "version": "", "device": "cpu", "dtype": "float32"}
    with planted(mutant, setup.checkout) as plan, tempfile.TemporaryDirectory() as folder:
        try:
            report = check(CheckRequest(setup.goldens, candidate=SPEC, phase=_PHASES), Progress())
        except CandidateUnavailable:
            return None
        assert plan.built is not None
        answers, weights = Path(folder, "answers"), list(weight_digests(setup.golden()).values())
        try:
            answer(plan.built.model, asked, answers, **who, checkpoint=weights)
        except Exception:  # a mutant may raise anything: then there is no answer to judge
            return Verdicts(bool(report.divergence), judged=True)
        judged = check(CheckRequest(setup.goldens, answers=answers), Progress())
        return Verdicts(bool(report.divergence), bool(judged.divergence))


def main() -> None:
    """Read the arguments, compare, write the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--mutants", help="names with commas between (default: all)")
    arguments = parser.parse_args()
    setup = Setup(Path("goldens"), Path("build/fms-checkout").resolve())
    names = arguments.mutants.split(",") if arguments.mutants else list(MUTANTS)
    mutants = [MUTANTS[name] for name in names if MUTANTS[name].phase in _PHASES]
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder, "questions")
        ask(setup.golden(), asked, Progress())
        jobs = {m.name: partial(compare, m, setup, asked) for m in mutants}
        jobs["unchanged"] = partial(compare, None, setup, asked)
        found: dict[str, Verdicts] = {}
        for name, result in run_forked(jobs, workers=arguments.workers, seconds=_SECONDS):
            print(f"{name}: {result}", flush=True)
            if isinstance(result, Crash):
                sys.exit(f"{name}: {result.why}")
            if result is not None:
                found[name] = result
    unchanged = found.pop("unchanged")
    if unchanged.checked or unchanged.judged:
        sys.exit("the unchanged port fails")
    others = [name for name, one in found.items() if one.checked != one.judged]
    agree = len(found) - len(others)
    figure = f"Of {len(found)} faults of forward and generate that load, both give the same verdict"
    figure += f" on {agree} ({agree / len(found):.1%})."
    if others:
        figure += f" They differ on {', '.join(others)}."
    print(figure)
    if not arguments.mutants:
        _PAGE.write_text(_FIGURE.sub(figure, _PAGE.read_text("utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

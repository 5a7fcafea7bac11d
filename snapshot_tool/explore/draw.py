"""Draw derived questions with hypothesis and run them; one that fails is shrunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from tempfile import TemporaryDirectory
from typing import TypeVar

import hypothesis
from hypothesis import configuration
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from snapshot_tool.base.protocol import PHASES, Phase
from snapshot_tool.base.report import Exploration, ExploredKind
from snapshot_tool.base.results import Result, Verdict
from snapshot_tool.explore.questions import KINDS, Cases, Question
from snapshot_tool.explore.run import QueryRunner

_SHORT = 8
_Value = TypeVar("_Value")


class Draw:
    """Draws the fields of a question. Smaller numbers and earlier values are simpler."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def integer(self, least: int, most: int) -> int:
        """Return a number within the limits."""
        return self._draw(st.integers(least, most))

    def one_of(self, values: Sequence[_Value]) -> _Value:
        """Return one of the values."""
        return self._draw(st.sampled_from(values))

    def early(self, values: Sequence[_Value]) -> _Value:
        """Return one of the values; half are among the first few, which are edge cases."""
        return self._draw(st.one_of(st.sampled_from(values[:_SHORT]), st.sampled_from(values)))

    def different(self, count: int, *, below: int) -> tuple[int, ...]:
        """Return different numbers from 0, in any order."""
        numbers = st.integers(0, below - 1)
        return tuple(self._draw(st.lists(numbers, min_size=count, max_size=count, unique=True)))


def explore(
    runner: QueryRunner,
    *,
    count: int,
    seed: int | None = None,
    phases: Sequence[Phase] = PHASES,
    on_question: Callable[[Question], None] = lambda _question: None,
) -> Exploration:
    """Run `count` derived questions, an equal number of each kind as far as possible.

    Shrinking runs more. By default the seed is that of the golden set. on_question: called before
    a question runs.
    """
    seed = runner.recorded.golden.manifest.seed if seed is None else seed
    has = runner.recorded.golden.family.phases
    kinds = [
        kind
        for kind in KINDS.values()
        if kind.phase in phases and kind.phase in has
        if not (kind.optional and runner.why_unsupported(kind))
    ]
    explored: list[ExploredKind] = []
    left = count
    for place, kind in enumerate(kinds):
        # If a kind has too few questions, later kinds get the rest.
        share = math.ceil(left / (len(kinds) - place))
        explored.append(_explore_kind(runner, kind, share, seed, on_question))
        left -= min(share, explored[-1].asked)
    return Exploration(tuple(explored), seed)


def _explore_kind(
    runner: QueryRunner,
    kind: type[Question],
    share: int,
    seed: int,
    on_question: Callable[[Question], None],
) -> ExploredKind:
    """Run `share` questions of a kind, or fewer: up to the first failure, which is shrunk."""
    questions = questions_of(kind, tuple(runner.recorded.cases.values()))
    reason = runner.why_unsupported(kind)
    if not reason and questions is None:
        reason = "no selected case can be used for it"
    if not reason and share == 0:
        reason = "too few questions to draw one of each kind"
    if reason or questions is None:
        skip = Result("*", kind.phase, kind.kind, Verdict.SKIP, reason)
        return ExploredKind(kind.kind, 0, (skip,))
    known: dict[Question, Result] = {}  # hypothesis repeats questions

    def fails(question: Question) -> bool:
        if question not in known:
            first = next(iter(known.values()), None)
            if first is not None and first.verdict is Verdict.SKIP:
                return False  # The candidate does not support the kind.
            on_question(question)
            known[question] = runner.run(question)
        return known[question].verdict.is_bad

    smallest = find_smallest_failure(questions, fails, count=share, seed=f"{seed} {kind.kind}")
    results = [result for result in known.values() if not result.verdict.is_bad]
    if smallest is not None:
        results.append(known[smallest])
    return ExploredKind(kind.kind, len(known), tuple(results))


def questions_of(kind: type[Question], cases: Cases) -> st.SearchStrategy[Question] | None:
    """Return a strategy for a kind of question, or None if no case can be used."""
    usable = [
        case
        for case in sorted(cases, key=lambda case: (case.length, case.case))
        if kind.phase in case.phases and kind.enough(case) and (case.paddable or not kind.pads)
    ]

    @st.composite
    def draw_one(draw: st.DrawFn) -> Question:
        return kind.draw(Draw(draw), usable)

    return draw_one() if usable else None


def find_smallest_failure(
    questions: st.SearchStrategy[Question],
    fails: Callable[[Question], bool],
    *,
    count: int,
    seed: str,
) -> Question | None:
    """Draw up to `count` questions; return the smallest that fails, or None.

    A seed draws the same questions only with the same installed code. The text form of a question
    always gives the same question.
    """
    settings = hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    random = Random(seed)  # noqa: S311 - for drawing, not for secrets
    with temporary_hypothesis_folder():
        try:
            return hypothesis.find(questions, fails, settings=settings, random=random)
        except NoSuchExample:
            return None


@contextmanager
def temporary_hypothesis_folder() -> Iterator[None]:
    """Prevent hypothesis from writing a folder .hypothesis, even without a database."""
    # The user's own tests may have set one. hypothesis 6.131 to 6.170 has no public way to read it.
    before = vars(configuration).get("__hypothesis_home_directory")
    with TemporaryDirectory(prefix="snap-") as folder:
        configuration.set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            configuration.set_hypothesis_home_dir(before)

"""Exploring: drawn questions asked of a candidate, judged, and shrunk where one fails."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from snapshot_tool.base.errors import PhaseUnsupported, SnapError
from snapshot_tool.base.phases import PHASES, Phase
from snapshot_tool.base.questions import KINDS, Question
from snapshot_tool.base.report import Exploration, ExploredKind
from snapshot_tool.base.results import Result, Verdict, tolerance_used
from snapshot_tool.explore.draw import find_smallest_failure, find_subjects, questions_of
from snapshot_tool.explore.run import Answer, Examiner, Recorded
from snapshot_tool.families import family_of
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.judge.generation import GenerationExplainer
from snapshot_tool.judge.judge import Judge
from snapshot_tool.judge.watch import require_candidates_fault

if TYPE_CHECKING:
    import torch


BAD = (Verdict.FAIL, Verdict.ERROR)


@dataclass(frozen=True, slots=True)
class QuestionJudge:
    """Asks questions and judges the answers as a check judges recorded tensors.

    allow_near_ties: whether new tokens may leave the golden's at near-ties.
    """

    examiner: Examiner
    judge: Judge
    allow_near_ties: bool = False

    def result(self, question: Question) -> Result:
        """Ask a question; whatever the candidate raises is an error of it alone."""
        import torch

        began = time.perf_counter()
        try:
            with torch.inference_mode():
                answers = self.examiner.ask(question)
        except PhaseUnsupported as unsupported:
            return _unjudged(question, Verdict.SKIP, str(unsupported))
        except SnapError:
            raise
        except Exception as error:  # the candidate's code may raise anything
            require_candidates_fault(
                self.examiner.candidate,
                error,
                case=f"{question.first_case} ({question})",
                phase=question.phase,
            )
            message = (str(error).strip() or "no message").splitlines()[0]
            reason = f"{type(error).__name__}: {message}"
            return _unjudged(question, Verdict.ERROR, reason)
        seconds = time.perf_counter() - began
        return self._worst([self._row(question, answer, seconds) for answer in answers])

    def _row(self, question: Question, answer: Answer, seconds: float) -> Result:
        golden = self.examiner.recorded.golden
        result = self.judge.judge(
            golden.case(answer.case),
            question.phase,
            answer.pair,
            seconds=seconds,
            rows=answer.rows,
        )
        result = dataclasses.replace(result, tensor=str(question))
        return self._explain(result, answer) if result.verdict is Verdict.FAIL else result

    def _worst(self, rows: Sequence[Result]) -> Result:
        """Return the row that differs most, or the one that used most of its tolerance."""
        bad = [row for row in rows if row.verdict in BAD]
        return max(bad or rows, key=lambda row: tolerance_used(row, self.judge.rule) or 0.0)

    def _explain(self, result: Result, answer: Answer) -> Result:
        """Say at which step new tokens leave the golden's, and how sure the golden was there."""
        import torch

        expected, tokens = answer.pair.expected, answer.pair.actual
        if result.phase is not Phase.GENERATE or not _are_tokens(tokens, like=expected):
            return result
        golden = self.examiner.recorded.golden
        explainer = GenerationExplainer(
            golden, None, self.judge.dtype, allow_near_ties=self.allow_near_ties
        )
        recorded = golden.tensor(answer.case, Phase.GENERATE, parts.TOKEN_IDS)
        end = answer.step + len(expected)
        actual = cast("torch.Tensor", tokens).to("cpu")
        # What comes after more or fewer tokens than there should be is nobody's.
        rest = recorded[end:] if len(actual) == len(expected) else recorded[:0]
        whole = torch.cat([recorded[: answer.step], actual, rest])
        return explainer.explain(result, whole, self.examiner.candidate)


def _are_tokens(actual: object, *, like: torch.Tensor) -> bool:
    """Tell tokens, as many as they may be, from anything else that the reason names."""
    import torch

    return isinstance(actual, torch.Tensor) and (actual.dim(), actual.dtype) == (1, like.dtype)


def _unjudged(question: Question, verdict: Verdict, reason: str) -> Result:
    return Result(question.first_case, question.phase, str(question), verdict, reason)


OnQuestion = Callable[[Question], None]


def explore(
    candidate: Any,
    golden: Golden,
    *,
    count: int,
    seed: int | None = None,
    cases: Sequence[str] | None = None,
    phases: Sequence[Phase] = PHASES,
    judge: Judge | None = None,
    allow_near_ties: bool = False,
    on_question: OnQuestion | None = None,
) -> Exploration:
    """Ask a candidate `count` derived questions, as evenly of all kinds as their numbers allow.

    Args:
        candidate: a loaded candidate.
        golden: the golden set that has the answers.
        count: how many questions to draw; those of shrinking come on top.
        seed: what they are drawn from; by default the golden's own.
        cases: names of the cases to ask about; by default all.
        phases: the phases to ask about.
        judge: by what answers are judged; by default as a candidate in the golden's own dtype is.
        allow_near_ties: whether new tokens may leave the golden's where rounding could have chosen.
        on_question: told of every question before it is asked.
    """
    seed = golden.manifest.seed if seed is None else seed
    questions = _question_judge(candidate, golden, cases, judge, allow_near_ties=allow_near_ties)
    has = family_of(golden.manifest.checkpoint.family).phases
    kinds = [kind for kind in KINDS.values() if kind.phase in phases and kind.phase in has]
    explored: list[ExploredKind] = []
    left = count
    for place, kind in enumerate(kinds):
        # What a kind with few questions leaves, the kinds after it get.
        share = math.ceil(left / (len(kinds) - place))
        session = _Session(questions, on_question or _tell_nobody)
        explored.append(_explore_kind(session, kind, share, seed))
        left -= min(share, explored[-1].asked)
    return Exploration(tuple(explored), seed)


def replay(
    candidate: Any,
    golden: Golden,
    questions: Sequence[Question],
    *,
    judge: Judge | None = None,
    allow_near_ties: bool = False,
) -> Exploration:
    """Ask given questions; raise UsageError for one that the golden has no answer to."""
    asked = _question_judge(candidate, golden, None, judge, allow_near_ties=allow_near_ties)
    results: dict[str, list[Result]] = {}
    for question in questions:
        results.setdefault(question.kind, []).append(asked.result(question))
    return Exploration(
        tuple(ExploredKind(kind, len(found), tuple(found)) for kind, found in results.items())
    )


def _question_judge(
    candidate: Any,
    golden: Golden,
    cases: Sequence[str] | None,
    judge: Judge | None,
    *,
    allow_near_ties: bool,
) -> QuestionJudge:
    names = [case.name for case in golden.manifest.cases] if cases is None else cases
    examiner = Examiner(candidate, Recorded(golden, find_subjects(golden, names)))
    return QuestionJudge(examiner, judge or Judge.of(golden), allow_near_ties)


def _explore_kind(session: _Session, kind: type[Question], share: int, seed: int) -> ExploredKind:
    """Ask `share` questions of a kind, or fewer: up to the first failure, which is shrunk."""
    examiner = session.judge.examiner
    questions = questions_of(kind, tuple(examiner.recorded.subjects.values()))
    if reason := examiner.why_not(kind):
        return _not_asked(kind, reason)
    if questions is None:
        return _not_asked(kind, "no selected case has an answer to any")
    if share == 0:
        return _not_asked(kind, "too few questions were asked for to have one of each kind")
    smallest = find_smallest_failure(
        questions, session.fails, count=share, seed=f"{seed} {kind.kind}"
    )
    return ExploredKind(kind.kind, len(session.known), session.results(smallest))


def _not_asked(kind: type[Question], reason: str) -> ExploredKind:
    skip = Result("*", kind.phase, kind.kind, Verdict.SKIP, reason)
    return ExploredKind(kind.kind, 0, (skip,))


def _tell_nobody(_question: Question) -> None:
    """Let a question pass without notice."""


@dataclass(slots=True)
class _Session:
    """The questions of one kind that were asked, each once: hypothesis asks some again."""

    judge: QuestionJudge
    on_question: OnQuestion
    known: dict[Question, Result] = field(default_factory=dict)

    def fails(self, question: Question) -> bool:
        """Ask, and tell whether the answer is not the recorded one."""
        if question not in self.known:
            if self._is_unsupported():
                return False
            self.on_question(question)
            self.known[question] = self.judge.result(question)
        return self.known[question].verdict in BAD

    def _is_unsupported(self) -> bool:
        """Tell whether the candidate's first word was that it cannot: so it would every time."""
        first = next(iter(self.known.values()), None)
        return first is not None and first.verdict is Verdict.SKIP

    def results(self, smallest: Question | None) -> tuple[Result, ...]:
        """Return all passes and skips, and the smallest failure."""
        others = [r for r in self.known.values() if r.verdict not in BAD]
        return (*others, *([self.known[smallest]] if smallest is not None else []))

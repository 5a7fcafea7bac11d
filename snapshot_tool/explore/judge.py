"""Judging what a candidate answers to one question."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from snapshot_tool.base.errors import PhaseUnsupported, SnapError
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.questions import Question
from snapshot_tool.base.results import Result, Verdict, tolerance_used
from snapshot_tool.explore.run import Answer, Examiner
from snapshot_tool.goldens import parts
from snapshot_tool.judge.blame import require_candidates_fault
from snapshot_tool.judge.generation import GenerationExplainer
from snapshot_tool.judge.verdicts import Judge

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
        return _worst([self._row(question, answer, seconds) for answer in answers])

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


def _worst(rows: Sequence[Result]) -> Result:
    """Return the row that differs most, or the one that used most of its tolerance."""
    bad = [row for row in rows if row.verdict in BAD]
    return max(bad or rows, key=lambda row: tolerance_used(row) or 0.0)

"""Run derived questions on a candidate, given ones: `snapshot_tool.explore.draw` draws them.

One such question also tells outputs that were copied from the golden set from computed ones: a
candidate that copies outputs is wrong for other inputs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from snapshot_tool.base.protocol import Phase
from snapshot_tool.base.report import Exploration, ExploredKind
from snapshot_tool.base.results import Result, Verdict
from snapshot_tool.explore.questions import (
    ConnectorTiles,
    Prefix,
    Question,
    Resumed,
    VisionTiles,
)
from snapshot_tool.explore.recorded import Answer, Capabilities, Prompt, Recorded
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.judge.generation import GenerationExplainer
from snapshot_tool.judge.judge import Judge
from snapshot_tool.judge.watch import WatchedCandidate, result_of_exception


@dataclass(frozen=True, slots=True)
class QueryRunner:
    """Runs questions on a candidate and judges the outputs like those of a check.

    Questions whose method the candidate lacks are not supported. allow_near_ties: whether new
    tokens may differ from the golden's at near-ties.
    """

    candidate: Any
    recorded: Recorded
    judge: Judge
    allow_near_ties: bool = False

    def why_unsupported(self, kind: type[Question]) -> str:
        """Return the reason why the candidate cannot run questions of a kind, or ""."""
        if self.candidate.supports(kind.method):
            return ""
        return f"the candidate has no method {kind.method!r}"

    def run(self, question: Question) -> Result:
        """Return the result of a question: that of the tensor that differs most.

        An exception of the candidate becomes the verdict error. Raises UsageError if the golden set
        has no output for the question.
        """
        if reason := self.why_unsupported(type(question)):
            case, phase = question.first_case, question.phase
            return Result(case, phase, str(question), Verdict.SKIP, reason)
        began = time.perf_counter()
        try:
            with torch.inference_mode():
                answers = question.run(self.candidate, self.recorded)
        except Exception as error:  # the candidate's code may raise anything
            case, phase = question.first_case, question.phase
            return result_of_exception(error, case=case, phase=phase, question=str(question))
        seconds = time.perf_counter() - began
        results = [self._judge(question, answer, seconds) for answer in answers]
        bad = [result for result in results if result.verdict.is_bad]
        return max(bad or results, key=lambda result: result.tolerance_used or 0.0)

    def _judge(self, question: Question, answer: Answer, seconds: float) -> Result:
        case = self.recorded.golden.case(answer.case)
        result = self.judge.judge(
            case, question.phase, answer.pair, seconds=seconds, rows=answer.rows
        )
        result = dataclasses.replace(result, tensor=str(question))
        if result.verdict is Verdict.FAIL and question.phase is Phase.GENERATE:
            return self._explain(result, answer)
        return result

    def _explain(self, result: Result, answer: Answer) -> Result:
        """Add the first step that differs, and the golden's margin there."""
        expected, actual = answer.pair.expected, answer.pair.actual
        if not isinstance(actual, torch.Tensor) or actual.dim() != 1:
            return result  # The reason names the wrong type or shape.
        if actual.dtype != expected.dtype:
            return result
        golden = self.recorded.golden
        # The explainer compares whole generations, so put the new tokens in their place in it.
        # Nothing follows if their number is wrong.
        tokens = golden.tensor(answer.case, Phase.GENERATE, parts.TOKEN_IDS)
        end = answer.step + len(expected)
        rest = tokens[end:] if len(actual) == len(expected) else tokens[:0]
        whole = torch.cat([tokens[: answer.step], actual.to("cpu"), rest])
        explainer = GenerationExplainer(
            golden, None, self.judge.dtype, allow_near_ties=self.allow_near_ties
        )
        return explainer.explain(result, whole, self.candidate)


def replay(runner: QueryRunner, questions: Sequence[Question]) -> Exploration:
    """Run the given questions; raise UsageError if the golden set has no output for one."""
    results: dict[str, list[Result]] = {}
    for question in questions:
        results.setdefault(question.kind, []).append(runner.run(question))
    return Exploration(
        tuple(ExploredKind(kind, len(found), tuple(found)) for kind, found in results.items())
    )


def fail_if_copied(
    candidate: WatchedCandidate,
    golden: Golden,
    results: list[Result],
    *,
    phase: Phase,
    judge: Judge,
    ran: bool,
    run_again: Callable[[], object],
) -> list[Result]:
    """Return the results of a phase of a case, as failures if the outputs were copied.

    A candidate that does not support the question, or raises, passes: it may be compiled for one
    shape. ran: whether a torch module ran for the outputs. run_again: runs the phase again.
    """
    equal = all(result.verdict is Verdict.PASS and result.max_abs == 0 for result in results)
    if phase is Phase.PREPROCESSING or not results or not equal:
        return results
    if not ran and phase is not Phase.GENERATE:
        # Rounding differs between implementations, so equal bits without any product are a copy.
        with candidate.counting_products() as products:
            run_again()
        if not products.count:
            return _failures(results, "and nothing was computed")
    # Equal tokens are normal if a model ran; numbers that are equal to the last bit are not.
    if (ran and phase is Phase.GENERATE) or judge.dtype != golden.manifest.dtype:
        return results
    case = results[0].case
    recorded = Recorded.of(golden, [case])
    question = _question(recorded.case(case), phase)
    if question is None:
        return results
    answer = QueryRunner(candidate, recorded, judge).run(question)
    if answer.verdict is not Verdict.FAIL:
        return results
    return _failures(results, f"but wrong for {question} ({answer.reason})")


def _failures(results: list[Result], why: str) -> list[Result]:
    reason = f"equal to the golden set bit for bit, {why}: the output was copied, not computed"
    return [dataclasses.replace(r, verdict=Verdict.FAIL, reason=reason) for r in results]


def _question(able: Capabilities, phase: Phase) -> Question | None:
    """Return a question with other inputs than the case's own; None if there is none."""
    if phase not in able.phases:
        return None
    # The last tile first, then the first one: two rows even if there is only one tile.
    tiles = (max(able.tiles - 1, 0), 0)
    match phase:
        case Phase.VISION if able.tiles:
            return VisionTiles(able.case, tiles)
        case Phase.CONNECTOR if able.tiles:
            return ConnectorTiles(able.case, tiles)
        case Phase.FORWARD if len(able.cuts) > 1:
            return Prefix(Prompt(able.case, sorted(able.cuts)[-2]))
        case Phase.GENERATE if able.generated > 1:
            return Resumed(able.case, 1)
        case _:
            return None

"""Whether an answer that equals the golden bit for bit was worked out, or read from somewhere.

Whoever answers with what the golden set holds, however it came there, does not know what the model
makes of other inputs. One question with another answer, which follows from the golden,
tells the two apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from snapshot_tool.base.phases import Phase
from snapshot_tool.base.questions import (
    ConnectorTiles,
    Prefix,
    Prompt,
    Question,
    Resumed,
    Subject,
    VisionTiles,
)
from snapshot_tool.base.results import Result, Verdict
from snapshot_tool.explore.draw import find_subjects
from snapshot_tool.explore.explore import QuestionJudge
from snapshot_tool.explore.run import Examiner, Recorded
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.judge.judge import Judge


def require_worked_out(
    candidate: Any,
    golden: Golden,
    results: Sequence[Result],
    *,
    phase: Phase,
    judge: Judge,
) -> list[Result]:
    """Return the results of one case; as failures where all were equal and the next one is wrong.

    A candidate that cannot be asked, or raises, is believed: it may be compiled for one shape.
    """
    if phase is Phase.PREPROCESSING or not all(map(_is_equal, results)) or not results:
        return list(results)
    case = results[0].case
    subjects = find_subjects(golden, [case])
    question = _question(subjects[case], phase)
    if question is None:
        return list(results)
    examiner = Examiner(candidate, Recorded(golden, subjects))
    answer = QuestionJudge(examiner, judge).result(question)
    if answer.verdict is not Verdict.FAIL:
        return list(results)
    reason = (
        f"equal to the golden bit for bit, but wrong when asked {question} ({answer.reason}): "
        "the answer was read, not worked out"
    )
    return [dataclasses.replace(r, verdict=Verdict.FAIL, reason=reason) for r in results]


def _is_equal(result: Result) -> bool:
    return result.verdict is Verdict.PASS and result.max_abs == 0


def _question(subject: Subject, phase: Phase) -> Question | None:
    """Return a question about other inputs than the case's own; None where there is none."""
    if phase not in subject.phases:
        return None
    # The last tile first, and one of them twice: also where there is but one.
    tiles = (max(subject.tiles - 1, 0), 0)
    match phase:
        case Phase.VISION if subject.tiles:
            return VisionTiles(subject.case, tiles)
        case Phase.CONNECTOR if subject.tiles:
            return ConnectorTiles(subject.case, tiles)
        case Phase.FORWARD if len(subject.cuts) > 1:
            return Prefix(Prompt(subject.case, sorted(subject.cuts)[-2]))
        case Phase.GENERATE if subject.generated > 1:
            return Resumed(subject.case, 1)
        case _:
            return None

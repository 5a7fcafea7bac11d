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
from snapshot_tool.base.results import Result, Verdict
from snapshot_tool.explore.questions import (
    ConnectorTiles,
    Prefix,
    Question,
    Resumed,
    VisionTiles,
)
from snapshot_tool.explore.recorded import Capabilities, Prompt, Recorded
from snapshot_tool.explore.run import QueryRunner
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
    recorded = Recorded.of(golden, [case])
    question = _question(recorded.case(case), phase)
    if question is None:
        return list(results)
    answer = QueryRunner(candidate, recorded, judge).run(question)
    if answer.verdict is not Verdict.FAIL:
        return list(results)
    reason = (
        f"equal to the golden bit for bit, but wrong when asked {question} ({answer.reason}): "
        "the answer was read, not worked out"
    )
    return [dataclasses.replace(r, verdict=Verdict.FAIL, reason=reason) for r in results]


def _is_equal(result: Result) -> bool:
    equal = result.comparison is not None and result.comparison.max_abs == 0
    return result.verdict is Verdict.PASS and equal


def _question(able: Capabilities, phase: Phase) -> Question | None:
    """Return a question about other inputs than the case's own; None where there is none."""
    if phase not in able.phases:
        return None
    # The last tile first, and one of them twice: also where there is but one.
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

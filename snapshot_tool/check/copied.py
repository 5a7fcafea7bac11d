"""Fail outputs that equal the golden set bit for bit because they were copied from it.

A candidate that copies outputs is wrong for other inputs. So the candidate runs one derived
question, whose output follows from the golden set but differs from the recorded one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from snapshot_tool.base.protocol import Phase
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
from snapshot_tool.judge.watch import WatchedCandidate


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
    if phase is Phase.PREPROCESSING or not results or not all(map(_is_equal, results)):
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


def _is_equal(result: Result) -> bool:
    return result.verdict is Verdict.PASS and result.max_abs == 0


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

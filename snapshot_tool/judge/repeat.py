"""Running a phase of a guarded candidate once or several times, and seeing that it computes."""

import dataclasses
from collections.abc import Callable

from snapshot_tool.base.phases import Phase
from snapshot_tool.base.results import Result, Verdict
from snapshot_tool.judge.watched import Guarded

_MODEL_PHASES = (Phase.VISION, Phase.CONNECTOR, Phase.FORWARD)
_READ = (
    "equal to the golden bit for bit, and nothing was computed: the answer was read, not worked out"
)


def run_guarded(
    candidate: Guarded, phase: Phase, once: Callable[[], list[Result]], *, times: int
) -> list[Result]:
    """Return the results of a phase; of several runs, those of the first that does not pass.

    Answers that differ from run to run become a warning of the candidate, with their spread.
    """
    before = candidate.modules_run
    if times > 1:
        candidate.record_answers()
    results = once()
    for _ in range(1, times):
        candidate.replay_answers()
        again = once()
        results = again if _passed(results) else results
    candidate.forget_answers()
    if phase in _MODEL_PHASES and candidate.modules_run == before and _is_exact(results):
        return _require_computed(candidate, results, once)
    return results


def _require_computed(
    candidate: Guarded, results: list[Result], once: Callable[[], list[Result]]
) -> list[Result]:
    """Fail an answer that is the golden's own, of a phase in which not one product is computed.

    Rounding differs between implementations, so equal bits are rare where a model was computed,
    and impossible where none was: the answer then comes from the golden itself.
    """
    with candidate.counting_products() as products:
        once()
    if products.count:
        return results
    return [dataclasses.replace(r, verdict=Verdict.FAIL, reason=_READ) for r in results]


def _passed(results: list[Result]) -> bool:
    return all(result.verdict is Verdict.PASS for result in results)


def _is_exact(results: list[Result]) -> bool:
    return _passed(results) and all(r.comparison and r.comparison.max_abs == 0 for r in results)

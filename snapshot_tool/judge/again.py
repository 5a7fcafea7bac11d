"""Judge a finished check by another rule or tolerance, from the figures that it kept."""

from __future__ import annotations

from dataclasses import replace

from snapshot_tool.base.errors import SnapError, UsageError
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.results import Result, Verdict
from snapshot_tool.base.tolerance import Rule, Tolerance, default_rule
from snapshot_tool.judge.judge import describe_limit


def judge_again(
    report: CheckReport, *, rule: Rule | None, atol: float | None, rtol: float | None
) -> CheckReport:
    """Return the report with the verdicts of another rule or tolerance; None: the check's own.

    Tokens, derived questions, weights and modules keep their verdicts, as does what has no figures.
    Raises SnapError if the figures, which are those of whole tensors, do not decide.
    """
    rule = rule or report.rule
    is_half = default_rule(report.golden.dtype, report.dtype) is Rule.ORACLE
    if rule is Rule.TABLE and is_half and (atol is None or rtol is None):
        raise UsageError(
            "the table of tolerances is for float32 only", "pass --atol and --rtol with it"
        )
    if rule is Rule.ORACLE and not any(result.oracle for result in report.results):
        raise SnapError(
            "the report has no figures of an oracle", "check a golden set that has an oracle"
        )
    results, undecided = [], []
    for result in report.results:
        if not result.numel or not (result.atol or result.rtol) or result.divergence:
            results.append(result)
        elif rule is Rule.ORACLE and result.oracle:
            within = result.oracle.within
            verdict = Verdict.PASS if within else Verdict.FAIL
            reason = "" if within else describe_limit(result.oracle)
            used = result.oracle.used
            results.append(replace(result, verdict=verdict, reason=reason, tolerance_used=used))
        else:
            judged = _by_table(result, atol, rtol)
            undecided += [] if judged else [f"{result.phase} / {result.case} / {result.tensor}"]
            results.append(judged or result)
    if undecided:
        raise SnapError(
            f"the figures of the report do not decide {len(undecided)} tensors by this tolerance, "
            f"first {undecided[0]}",
            f"check again: {report.command}",
        )
    return replace(report, rule=rule, results=tuple(results))


def _by_table(result: Result, atol: float | None, rtol: float | None) -> Result | None:
    """Return a result judged by a tolerance, or None if its figures do not decide."""
    if result.max_abs is None or result.max_rel is None or result.worst is None:
        return result
    own = Tolerance(result.atol or 0.0, result.rtol or 0.0)
    tolerance = Tolerance(own.atol if atol is None else atol, own.rtol if rtol is None else rtol)
    worst = result.worst
    difference = abs(worst.actual - worst.expected)
    allowed = tolerance.atol + tolerance.rtol * abs(worst.expected)
    if tolerance == own:
        passes = result.mismatched == 0
    elif own == Tolerance(1.0, 0.0):  # each element has its own limit, as in compact sets
        return None
    elif result.max_abs <= tolerance.atol or result.max_rel <= tolerance.rtol:
        passes = True
    elif not difference <= allowed or 0 in (tolerance.atol, tolerance.rtol):
        passes = False
    else:
        return None
    reason = ""
    if not passes:
        reason = (
            f"worst at {list(worst.index)}: expected {worst.expected:.6g}, actual "
            f"{worst.actual:.6g} (|diff| {difference:.3g} > {allowed:.3g} allowed)"
        )
    return replace(
        result,
        verdict=Verdict.PASS if passes else Verdict.FAIL,
        reason=reason,
        atol=tolerance.atol,
        rtol=tolerance.rtol,
        tolerance_used=difference / allowed if allowed else None,
        error_map=None if passes or tolerance != own else result.error_map,
    )

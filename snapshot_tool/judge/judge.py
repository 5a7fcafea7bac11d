"""Verdicts on the tensors of a phase, also of a finished check."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from snapshot_tool.base.errors import SnapError, UsageError
from snapshot_tool.base.protocol import Phase
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.results import Result, Verdict
from snapshot_tool.base.tolerance import (
    CAP,
    OracleComparison,
    Rule,
    Tolerance,
    default_rule,
    error_multiplier,
)
from snapshot_tool.goldens.golden import Golden, Rows, oracle_tensor, step_noise
from snapshot_tool.goldens.manifest import CaseEntry
from snapshot_tool.goldens.parts import NOISE
from snapshot_tool.judge.phases import POSITION_LOGPROBS, STEP_LOGPROBS, Pair
from snapshot_tool.numerics.compare import compare_with_oracle, judge_tensor, map_errors


@dataclass(frozen=True, slots=True)
class Judge:
    """The rule of one check.

    Args:
        golden: the set, with its tolerances and, if recorded, an oracle.
        dtype: the candidate's dtype.
        rule: the rule; a tensor without an oracle in the set is judged by the table.
        atol: used in place of the golden set's; None: the golden set's.
        rtol: the same.
    """

    golden: Golden
    dtype: str
    rule: Rule = Rule.TABLE
    atol: float | None = None
    rtol: float | None = None

    def judge(
        self,
        case: CaseEntry,
        phase: Phase,
        pair: Pair,
        *,
        seconds: float = 0.0,
        rows: Rows = None,
    ) -> Result:
        """Return the verdict on one tensor, with the figures of both rules if there are both.

        rows: the rows of the recorded tensor in the pair; None: all.
        """
        # Tokens are exact, their probabilities are not.
        of_phase = Phase.FORWARD if pair.tensor == STEP_LOGPROBS else phase
        limits = self._logprob_limits(case, pair) if self.rule is Rule.ORACLE else None
        if limits is not None:
            pair = replace(pair, allowed=lambda _tolerance: limits)
        pair, tolerance = pair.in_units(self.tolerance(case, of_phase))
        expected, actual = pair.expected, pair.actual
        verdict, reason = Verdict.FAIL, "the candidate did not return this tensor"
        comparison = figures = errors = used = None
        if actual is not None:
            dtype = getattr(torch, self.dtype)
            verdict, reason, comparison = judge_tensor(
                expected, actual, tolerance, computed_in=dtype
            )
        if comparison and isinstance(actual, torch.Tensor):
            used = comparison.worst.used(tolerance) if comparison.worst else None
            oracle = oracle_tensor(
                self.golden,
                case.name,
                phase,
                pair.tensor,
                reference=expected,
                dtype=self.dtype,
                rows=rows,
            )
            if oracle is not None:
                figures = compare_with_oracle(oracle, actual, tolerance=tolerance, dtype=self.dtype)
                if self.rule is Rule.ORACLE:
                    verdict = Verdict.PASS if figures.within else Verdict.FAIL
                    reason = "" if figures.within else describe_limit(figures)
                    used = figures.used
            if verdict is Verdict.FAIL:
                errors = map_errors(expected, actual, tolerance)
        if verdict is not Verdict.PASS and pair.note:
            reason = f"{pair.note}; {reason}"
        return Result(
            case.name,
            phase,
            pair.tensor,
            verdict,
            reason,
            **(vars(comparison) if comparison else {}),
            atol=tolerance.atol,
            rtol=tolerance.rtol,
            tolerance_used=used,
            seconds=round(seconds, 6),
            error_map=errors,
            oracle=figures,
            agreement=pair.agreement,
        )

    def _logprob_limits(self, case: CaseEntry, pair: Pair) -> torch.Tensor | None:
        """Return the allowed error of log-probabilities in this dtype, (rows, 1); None for others.

        A log-probability is the difference of two numbers, each with the error of a logit.
        """
        if pair.tensor == POSITION_LOGPROBS:
            name = NOISE.format(Phase.FORWARD, "position_topk_values", self.dtype)
            noise, cap = self.golden.oracle(case.name, name), CAP  # a root mean square
        elif pair.tensor == STEP_LOGPROBS:
            noise, cap = step_noise(self.golden, case.name, dtype=self.dtype), 1.0  # the greatest
        else:
            return None
        if noise is None or getattr(pair.actual, "shape", None) != pair.expected.shape:
            return None
        rows = noise[: len(pair.expected)].double()
        usual = float(rows.square().mean().sqrt())
        multiplier = 2 * cap * error_multiplier(pair.expected.numel(), dtype=self.dtype)
        room = self.tolerance(case, Phase.FORWARD).atol
        return (multiplier * rows.clamp(min=usual) + room)[:, None]

    def tolerance(self, case: CaseEntry, phase: Phase) -> Tolerance:
        """Return the tolerance of the user or of the golden set; tokens must always be equal."""
        own = self.golden.manifest.tolerances[phase].for_images(case.images)
        if phase is Phase.GENERATE:
            return own
        return Tolerance(
            own.atol if self.atol is None else self.atol,
            own.rtol if self.rtol is None else self.rtol,
        )


def describe_limit(figures: OracleComparison) -> str:
    """Return the limit that a tensor exceeds, as a reason."""
    if not figures.error <= figures.limit:
        return (
            f"its error against the oracle is {figures.error:.3g}, the reference's own "
            f"{figures.reference_error:.3g} ({figures.limit:.3g} allowed)"
        )
    return (
        f"its error against the oracle at position {list(figures.position)} is "
        f"{figures.position_error:.3g} ({figures.position_limit:.3g} allowed)"
    )


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
    exceeds = not worst.difference <= tolerance.at(worst.expected)
    if tolerance == own:
        passes = result.mismatched == 0
    elif own == Tolerance(1.0, 0.0):  # each element has its own limit, as in compact sets
        return None
    elif result.max_abs <= tolerance.atol or result.max_rel <= tolerance.rtol:
        passes = True
    elif exceeds or 0 in (tolerance.atol, tolerance.rtol):
        passes = False
    else:
        return None
    return replace(
        result,
        verdict=Verdict.PASS if passes else Verdict.FAIL,
        reason="" if passes else worst.describe(tolerance),
        atol=tolerance.atol,
        rtol=tolerance.rtol,
        tolerance_used=worst.used(tolerance),
        error_map=None if passes or tolerance != own else result.error_map,
    )

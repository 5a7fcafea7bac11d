"""What a comparison measured, and what was concluded from it."""

from dataclasses import dataclass
from enum import StrEnum

from snapshot_tool.base.error_map import ErrorMap
from snapshot_tool.base.generation import TokenDivergence
from snapshot_tool.base.oracle import OracleComparison
from snapshot_tool.base.phases import Phase, phase_order
from snapshot_tool.base.tolerance import Rule, Tolerance


class Verdict(StrEnum):
    """pass; fail (it differs); skip (not compared, with the reason); error (it could not run)."""

    PASS = "pass"  # noqa: S105 - a verdict, no password
    FAIL = "fail"
    SKIP = "skip"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Worst:
    """The element furthest beyond the tolerance: its index and both values."""

    index: tuple[int, ...]
    expected: float
    actual: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Figures of one tensor against its golden.

    Args:
        max_abs: greatest |actual - expected|.
        max_rel: greatest |actual - expected| / |expected|; 0 where both are 0, inf where only the
            expected value is 0.
        mean_abs: mean of |actual - expected|.
        rmse: root of the mean squared difference.
        cosine: cosine of the angle between both tensors as flat vectors; 1 where both are all 0,
            0 where one is.
        mismatched: number of elements beyond the tolerance, or NaN or Inf without an equal partner.
        numel: number of elements compared.
        worst: the element furthest beyond the tolerance; None for empty tensors.
        errors: where the errors lie; None where all are within a tolerance, or there is none.
    """

    max_abs: float
    max_rel: float
    mean_abs: float
    rmse: float
    cosine: float
    mismatched: int
    numel: int
    worst: Worst | None
    errors: ErrorMap | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """The verdict on one tensor of one case, or on a whole phase of a case (tensor is empty).

    `rule` is what the verdict is by; `oracle` has the figures of the second rule, where the golden
    set has an oracle; `divergence` says where a generation leaves the golden.
    """

    case: str
    phase: Phase
    tensor: str
    verdict: Verdict
    reason: str = ""
    tolerance: Tolerance | None = None
    comparison: Comparison | None = None
    seconds: float = 0.0
    oracle: OracleComparison | None = None
    divergence: TokenDivergence | None = None
    rule: Rule = Rule.TABLE


def tolerance_used(result: Result) -> float | None:
    """Return how much of what is allowed was used; None where the tolerance is exact.

    By the table that is |diff| / allowed at the worst element.
    """
    if result.rule is Rule.ORACLE and result.oracle:
        return result.oracle.used
    if result.comparison is None or result.tolerance is None or result.comparison.worst is None:
        return None
    worst = result.comparison.worst
    allowed = result.tolerance.atol + result.tolerance.rtol * abs(worst.expected)
    return abs(worst.actual - worst.expected) / allowed if allowed else None


def overall_verdict(results: tuple[Result, ...]) -> Verdict:
    """Return the verdict on a run: fail, before error, before skip; pass only where all passed.

    A run without a single pass is never a pass: nothing was compared.
    """
    verdicts = {result.verdict for result in results}
    for verdict in (Verdict.FAIL, Verdict.ERROR):
        if verdict in verdicts:
            return verdict
    return Verdict.PASS if Verdict.PASS in verdicts else Verdict.SKIP


def first_divergence(results: tuple[Result, ...]) -> Result | None:
    """Return the first failing result in the order of phases, or None.

    Phases are fed with the golden's own inputs, so the earliest failing phase has the fault.
    """
    bad = [r for r in results if r.verdict in (Verdict.FAIL, Verdict.ERROR)]
    return min(bad, key=lambda r: phase_order(r.phase), default=None)

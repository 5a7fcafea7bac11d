"""Results of a check: figures of a tensor, of a generation, and the verdict on each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from snapshot_tool.base.phases import Phase, phase_order
from snapshot_tool.base.tolerance import OracleComparison, Rule, Tolerance

# Bounds of the sizes that are counted: four to a decade, from 1e-4 to 1e4 times the tolerance.
SIZE_BOUNDS: tuple[float, ...] = tuple(10 ** (step / 4) for step in range(-16, 17))


@dataclass(frozen=True, slots=True)
class ErrorMap:
    """The errors of one tensor, |actual - expected| / (atol + rtol * |expected|).

    Args:
        shape: rows and columns of the map before binning: tiles and positions of a vision tensor,
            ranks and positions of the records of logits, one row of a vector. What is left (width,
            channels) is reduced to its greatest error.
        cells: the greatest error in each bin; infinite where a NaN or Inf has no partner.
        counts: elements by size: below SIZE_BOUNDS[0], between each two bounds, and beyond the
            last.
    """

    shape: tuple[int, int]
    cells: tuple[tuple[float, ...], ...]
    counts: tuple[int, ...]


class DivergenceKind(StrEnum):
    """Whether a token differs by chance: near-tie; real divergence; unknown without an oracle."""

    NEAR_TIE = "near-tie"
    REAL = "real divergence"
    UNKNOWN = "near-tie or not is unknown: the golden set has no oracle"


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """A token and its text; None where the generation has ended before."""

    token: int | None
    text: str | None

    def __str__(self) -> str:
        """Show the id and the text."""
        if self.token is None:
            return "nothing (it has ended)"
        return str(self.token) if self.text is None else f"{self.token} {self.text!r}"


@dataclass(frozen=True, slots=True)
class TokenDivergence:
    """The first step whose token is not the golden's.

    Args:
        step: counted from 0.
        expected: the golden's token.
        actual: the candidate's.
        margin: by how much the golden's logits prefer `expected` to `actual`; None where one of
            them is no token, or `actual` is not among the golden's best.
        margin_above: the same as a lower bound, where `actual` is not among the golden's best.
        rounding: how far rounding can part two margins at this very step: twice the error of a
            logit that the oracle measured there in the golden's dtype, and the same in the
            candidate's; None without an oracle.
        candidate_margin: the candidate's own margin at this step, given the golden's tokens before
            it; None where its forward cannot tell.
        golden: every token of the golden's generation.
        candidate: every token of the candidate's.
    """

    step: int
    expected: TokenChoice
    actual: TokenChoice
    margin: float | None = None
    margin_above: float | None = None
    rounding: float | None = None
    candidate_margin: float | None = None
    golden: tuple[TokenChoice, ...] = ()
    candidate: tuple[TokenChoice, ...] = ()

    @property
    def kind(self) -> DivergenceKind:
        """Say whether rounding could have chosen the other token."""
        if self.margin is None:
            return DivergenceKind.REAL
        if self.rounding is None:
            return DivergenceKind.UNKNOWN
        return DivergenceKind.NEAR_TIE if self.margin <= self.rounding else DivergenceKind.REAL

    @property
    def forward_agrees(self) -> bool:
        """Whether the candidate's forward pass would have chosen the golden's token, clearly."""
        chosen = self.candidate_margin is not None and self.candidate_margin > (self.rounding or 0)
        return chosen and self.kind is not DivergenceKind.NEAR_TIE

    def __str__(self) -> str:
        """Say it in words."""
        facts = [self.kind.value]
        if self.margin is not None:
            facts.append(f"the golden prefers the former by {self.margin:.3g}")
        elif self.margin_above is not None:
            facts.append(f"the golden prefers the former by more than {self.margin_above:.3g}")
        if self.rounding is not None:
            facts.append(f"rounding there reaches {self.rounding:.2g}")
        if self.candidate_margin is not None:
            prefers = f"given the golden's tokens the candidate does by {self.candidate_margin:.3g}"
            loop = ": its generation loop or cache is at fault, not its forward pass"
            facts.append(prefers + (loop if self.forward_agrees else ""))
        return (
            f"first other token at step {self.step}: expected {self.expected}, actual "
            f"{self.actual} ({'; '.join(facts)})"
        )


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

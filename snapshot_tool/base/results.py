"""Results of a check: figures of a tensor, of a generation, and the verdict on each.

The names of fields are those of the JSON report; docs/run.schema.json is made from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from snapshot_tool.base.errors import Place
from snapshot_tool.base.protocol import Phase, phase_order
from snapshot_tool.base.tolerance import OracleComparison, Tolerance

# Bounds of the sizes that are counted: four to a decade, from 1e-4 to 1e4 times the tolerance.
SIZE_BOUNDS: tuple[float, ...] = tuple(10 ** (step / 4) for step in range(-16, 17))


@dataclass(frozen=True, slots=True)
class ErrorMap:
    """The errors of one tensor, |actual - expected| / (atol + rtol * |expected|).

    Args:
        shape: rows and columns of the map before binning: tiles and positions of a vision tensor,
            ranks and positions of the records of logits, one row of a vector. Other dimensions
            (width, channels) are reduced to their greatest error.
        cells: the greatest error in each bin, one string for each row, figures separated by
            blanks; "inf" for NaN and Inf without a partner.
        counts: elements by size: below SIZE_BOUNDS[0], between each two bounds, and beyond the
            last.
    """

    shape: tuple[int, int]
    cells: tuple[str, ...]
    counts: tuple[int, ...]

    @property
    def rows(self) -> list[list[float]]:
        """The cells as numbers."""
        return [[float(cell) for cell in row.split()] for row in self.cells]


class DivergenceKind(StrEnum):
    """Whether rounding could have chosen the other token; unknown without an oracle."""

    NEAR_TIE = "near_tie"
    REAL = "real"
    UNKNOWN = "unknown"

    @property
    def words(self) -> str:
        """The kind in words."""
        return {
            DivergenceKind.NEAR_TIE: "near-tie",
            DivergenceKind.REAL: "real divergence",
            DivergenceKind.UNKNOWN: "near-tie or not is unknown: the golden set has no oracle",
        }[self]


@dataclass(frozen=True, slots=True)
class TokenDivergence:
    """The first step whose token is not the golden's.

    Args:
        step: counted from 0.
        expected: the golden's token; None if its generation has ended before.
        expected_text: its text, if it is known.
        actual: the candidate's token; None if its generation has ended before.
        actual_text: its text, if it is known.
        kind: derived from `margin` and `rounding`.
        margin: by how much the golden's logits prefer `expected` to `actual`; None if one of
            them is not a token, or `actual` is not among the golden's best.
        margin_above: the same as a lower bound, if `actual` is not among the golden's best.
        rounding: how far rounding can part two margins at this very step: twice the error of a
            logit that the oracle measured there in the golden's dtype, and the same in the
            candidate's; None without an oracle.
        candidate_margin: the candidate's own margin at this step, given the golden's tokens before
            it; None if its forward does not return it.
        golden: every token of the golden's generation, as "ID" or "ID TEXT".
        candidate: every token of the candidate's.
    """

    step: int
    expected: int | None
    expected_text: str | None
    actual: int | None
    actual_text: str | None
    kind: DivergenceKind = DivergenceKind.REAL
    margin: float | None = None
    margin_above: float | None = None
    rounding: float | None = None
    candidate_margin: float | None = None
    golden: tuple[str, ...] = ()
    candidate: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Set `kind`."""
        kind = DivergenceKind.REAL
        if self.margin is not None and self.rounding is None:
            kind = DivergenceKind.UNKNOWN
        elif self.margin is not None and self.margin <= (self.rounding or 0.0):
            kind = DivergenceKind.NEAR_TIE
        object.__setattr__(self, "kind", kind)

    @property
    def forward_agrees(self) -> bool:
        """Whether the candidate's forward pass would have chosen the golden's token, clearly."""
        chosen = self.candidate_margin is not None and self.candidate_margin > (self.rounding or 0)
        return chosen and self.kind is not DivergenceKind.NEAR_TIE

    def __str__(self) -> str:
        """Return the divergence in words."""
        facts = [self.kind.words]
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
        expected = _token_text(self.expected, self.expected_text)
        actual = _token_text(self.actual, self.actual_text)
        return (
            f"first other token at step {self.step}: expected {expected}, actual {actual} "
            f"({'; '.join(facts)})"
        )


def _token_text(token: int | None, text: str | None) -> str:
    if token is None:
        return "nothing (it has ended)"
    return str(token) if text is None else f"{token} {text!r}"


class Verdict(StrEnum):
    """pass; fail (it differs); skip (not compared, with the reason); error (it could not run)."""

    PASS = "pass"  # noqa: S105 - a verdict, no password
    FAIL = "fail"
    SKIP = "skip"
    ERROR = "error"

    @property
    def is_bad(self) -> bool:
        """Whether something differs or raised."""
        return self in (Verdict.FAIL, Verdict.ERROR)


@dataclass(frozen=True, slots=True)
class Worst:
    """The element furthest beyond the tolerance: its index and both values."""

    index: tuple[int, ...]
    expected: float
    actual: float

    @property
    def difference(self) -> float:
        """|actual - expected|."""
        return abs(self.actual - self.expected)

    def used(self, tolerance: Tolerance) -> float | None:
        """Return the difference in units of what is allowed; None if nothing is."""
        allowed = tolerance.at(self.expected)
        return self.difference / allowed if allowed else None

    def describe(self, tolerance: Tolerance) -> str:
        """Return the element and what is allowed, as part of a reason."""
        return (
            f"worst at {list(self.index)}: expected {self.expected:.6g}, actual {self.actual:.6g} "
            f"(|diff| {self.difference:.3g} > {tolerance.at(self.expected):.3g} allowed)"
        )


@dataclass(frozen=True)  # without slots: vars() returns the fields
class Comparison:
    """Figures of one tensor against its golden.

    Args:
        max_abs: greatest |actual - expected|.
        max_rel: greatest |actual - expected| / |expected|; 0 if both are 0, inf if only the
            expected value is 0.
        mean_abs: mean of |actual - expected|.
        rmse: root of the mean squared difference.
        cosine: cosine of the angle between both tensors as flat vectors; 1 if both are all 0,
            0 if one is.
        mismatched: number of elements beyond the tolerance, or NaN or Inf without an equal partner.
        numel: number of elements compared.
        worst: the element furthest beyond the tolerance; None for empty tensors.
    """

    max_abs: float
    max_rel: float
    mean_abs: float
    rmse: float
    cosine: float
    mismatched: int
    numel: int
    worst: Worst | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far the probabilities of an answer agree with the golden's, over some positions.

    Args:
        positions: how many.
        top1: at how many both have the same best token.
        kl: mean of the Kullback-Leibler divergence, in nats: sum of p * log(p / q) over the
            golden's best tokens and one for all others, with p of the golden and q of the answer.
    """

    positions: int
    top1: int
    kl: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on one tensor of one case, or on a whole phase of a case (tensor is empty)."""

    case: str
    phase: Phase
    tensor: str
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Result(Judgement):
    """A verdict and what it is based on; figures are None if nothing could be measured.

    The figures from `max_abs` to `numel`, and `worst`, are those of `Comparison`.

    Args:
        atol: of the tolerance that judged.
        rtol: the same.
        tolerance_used: how much of what is allowed was used, at the worst element; None if the
            tolerance is exact, or nothing was measured.
        seconds: of the candidate's phase, the same for all tensors of it.
        error_map: where the errors of a tensor that failed lie.
        oracle: the figures of the second rule, if the golden set has an oracle.
        divergence: where a generation leaves the golden.
        agreement: of log-probabilities.
        place: the line of the candidate's code that raised.
        traceback: of what it raised; "" if it raised nothing.
    """

    max_abs: float | None = None
    max_rel: float | None = None
    mean_abs: float | None = None
    rmse: float | None = None
    cosine: float | None = None
    mismatched: int | None = None
    numel: int | None = None
    atol: float | None = None
    rtol: float | None = None
    tolerance_used: float | None = None
    worst: Worst | None = None
    seconds: float = 0.0
    error_map: ErrorMap | None = None
    oracle: OracleComparison | None = None
    divergence: TokenDivergence | None = None
    agreement: Agreement | None = None
    place: Place | None = None
    traceback: str = ""


def overall_verdict(results: Iterable[Result]) -> Verdict:
    """Return the verdict on a run; see `combine`."""
    return combine(result.verdict for result in results)


def combine(verdicts: Iterable[Verdict]) -> Verdict:
    """Return fail, before error, before pass, before skip.

    Without a single pass it is never a pass: nothing was compared.
    """
    there = set(verdicts)
    for verdict in (Verdict.FAIL, Verdict.ERROR, Verdict.PASS):
        if verdict in there:
            return verdict
    return Verdict.SKIP


def first_divergence(results: Iterable[Result]) -> Result | None:
    """Return the first failing result in the order of phases, or None.

    Phases are fed with the golden's own inputs, so the earliest failing phase has the fault.
    """
    bad = [r for r in results if r.verdict.is_bad]
    return min(bad, key=lambda r: phase_order(r.phase), default=None)

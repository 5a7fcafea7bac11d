"""How far a candidate may be from the golden: torch.allclose's rule, defaults by phase."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from snapshot_tool.base.protocol import Phase

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Tolerance:
    """|candidate - golden| <= atol + rtol * |golden|, element by element (torch.allclose)."""

    atol: float
    rtol: float

    def __post_init__(self) -> None:
        """Refuse what cannot bound anything: negative, infinite or NaN values."""
        if not (0 <= self.atol < float("inf") and 0 <= self.rtol < float("inf")):
            raise ValueError(f"atol and rtol must be finite and >= 0, not {self.atol}, {self.rtol}")

    def at(self, expected: float) -> float:
        """Return the difference from an expected value that is allowed."""
        # Zero times infinity is NaN.
        return self.atol + (self.rtol * abs(expected) if self.rtol else 0.0)


class Rule(StrEnum):
    """What decides: the golden's table of tolerances, or its oracle."""

    TABLE = "table"
    ORACLE = "oracle"


def default_rule(recorded: str, computed: str) -> Rule:
    """Return what judges a candidate that computes in a dtype, against a golden of another.

    The table of tolerances is made for float32, in the golden as in the candidate.
    """
    return Rule.TABLE if recorded == computed == "float32" else Rule.ORACLE


EXACT = Tolerance(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class PhaseTolerance:
    """A phase's tolerance for cases with at most one image, and for cases with several."""

    single: Tolerance
    several_images: Tolerance

    def for_images(self, images: int) -> Tolerance:
        """Return the tolerance that holds for a case with this number of images."""
        return self.several_images if images > 1 else self.single


def _same(atol: float, rtol: float) -> PhaseTolerance:
    return PhaseTolerance(Tolerance(atol, rtol), Tolerance(atol, rtol))


DEFAULT_TOLERANCES: dict[Phase, PhaseTolerance] = {
    Phase.PREPROCESSING: _same(1e-6, 0.0),
    Phase.VISION: _same(3e-4, 3e-4),
    Phase.CONNECTOR: _same(1e-5, 1e-5),
    Phase.FORWARD: PhaseTolerance(Tolerance(5e-5, 5e-5), Tolerance(7e-5, 7e-5)),
    Phase.GENERATE: PhaseTolerance(EXACT, EXACT),
}


# The dtypes in which the reference's own error is measured.
ORACLE_DTYPES = ("float32", "bfloat16", "float16")
HALF_DTYPES = ("bfloat16", "float16")

ULPS = 4  # units in the last place; no implementation is exact to fewer
# How far the greatest error of a position may stick out of the root mean square there. Correct
# ports were seen to reach 11 in any dtype; error_multiplier makes it 20 to 100.
CAP = 10.0


@dataclass(frozen=True, slots=True)
class OracleTensor:
    """A recorded tensor, its oracle and the reference's own errors in the candidate's dtype.

    Args:
        reference: the recorded tensor, float32, (..., width).
        delta: oracle - reference, of the same shape; bfloat16 in a float32 golden, since three
            digits of a rounding error are enough, and float32 in others.
        noise: root mean square of (reference in that dtype - oracle) at each position, float32, of
            the shape without the last dimension.
    """

    reference: torch.Tensor
    delta: torch.Tensor
    noise: torch.Tensor


@dataclass(frozen=True, slots=True)
class OracleComparison:
    """A candidate's error against the oracle, beside the reference's own error.

    Args:
        error: root mean square of actual - oracle, over the whole tensor.
        reference_error: the same of the reference, run in the candidate's dtype.
        limit: the most that `error` may be.
        position: index of the position that is nearest to its limit, or furthest beyond it.
        position_error: the greatest |actual - oracle| at that position.
        position_limit: the most that it may be.
        within: whether the whole and each position are within their limits; NaN never is.
    """

    error: float
    reference_error: float
    limit: float
    position: tuple[int, ...]
    position_error: float
    position_limit: float
    within: bool = False

    def __post_init__(self) -> None:
        """Set `within`."""
        whole = self.error <= self.limit
        position = self.position_error <= self.position_limit
        object.__setattr__(self, "within", whole and position)

    @property
    def used(self) -> float:
        """The part of the nearer limit that was used; above 1 it fails, and NaN counts as inf."""
        parts = self.error / self.limit, self.position_error / self.position_limit
        return max(math.inf if math.isnan(part) else part for part in parts)


def error_multiplier(numel: int, *, dtype: str) -> float:
    """Return how many times the reference's error is allowed: more if few elements average."""
    if numel <= 10:  # noqa: PLR2004 - the steps are those of torch._dynamo.utils.same
        return 10.0
    if numel <= 500:  # noqa: PLR2004
        return 8.0
    return 3.0 if numel < 1000 or dtype in HALF_DTYPES else 2.0  # noqa: PLR2004

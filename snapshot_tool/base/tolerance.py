"""How far a candidate may be from the golden: torch.allclose's rule, defaults by phase."""

from dataclasses import dataclass
from enum import StrEnum

from snapshot_tool.base.phases import Phase


@dataclass(frozen=True, slots=True)
class Tolerance:
    """|candidate - golden| <= atol + rtol * |golden|, element by element (torch.allclose)."""

    atol: float
    rtol: float

    def __post_init__(self) -> None:
        """Refuse what cannot bound anything: negative, infinite or NaN values."""
        if not (0 <= self.atol < float("inf") and 0 <= self.rtol < float("inf")):
            raise ValueError(f"atol and rtol must be finite and >= 0, not {self.atol}, {self.rtol}")


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

"""A candidate's weights beside the checkpoint's: what no case uses is judged here alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from snapshot_tool.base.localisation import Localisation
from snapshot_tool.base.results import Result, Verdict

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class WeightDifference:
    """A weight that is not as the checkpoint has it.

    Args:
        name: the candidate's name of it.
        modules: the reference's modules that it belongs to, where they are known; several where the
            candidate fuses their weights into one.
        mismatched: how many elements differ at all.
        numel: of how many.
        max_abs: the greatest |actual - expected|; NaN where either is.
    """

    name: str
    modules: tuple[str, ...]
    mismatched: int
    numel: int
    max_abs: float

    def __str__(self) -> str:
        """Say how far it is off, and where it belongs."""
        share = f"{self.mismatched} of {self.numel} elements differ"
        belongs = f" ({', '.join(self.modules)})" if self.modules else ""
        return f"{self.name}{belongs}: {share} from the checkpoint's, by up to {self.max_abs:.3g}"


@dataclass(frozen=True, slots=True)
class WeightReport:
    """What became of the weights that a candidate showed.

    Args:
        compared: how many were compared.
        differing: those that are not the checkpoint's, in the checkpoint's order.
        not_compared: those for which the candidate showed no partner.
        unset: the candidate's weights that the checkpoint leaves unset, by its own names.
        harmful: those of them from which NaN came; None where that is not known.
    """

    compared: int
    differing: tuple[WeightDifference, ...] = ()
    not_compared: tuple[str, ...] = ()
    unset: tuple[str, ...] = ()
    harmful: tuple[str, ...] | None = ()

    def __str__(self) -> str:
        """Count them."""
        equal = self.compared - len(self.differing)
        left = f", {len(self.not_compared)} not compared" if self.not_compared else ""
        off = f", {len(self.differing)} not" if self.differing else ""
        return f"{equal} as in the checkpoint{off}{left}"

    @property
    def unset_text(self) -> str:
        """Name the first of the weights that the checkpoint leaves unset, or return "" for none."""
        names = self.harmful or self.unset
        if not names:
            return ""
        use = "unused" if self.harmful == () else "and used" if self.harmful else "and NaN came out"
        more = f" and {len(names) - 1} more" if names[1:] else ""
        return f"unset, {use}: {names[0]}{more}"


def find_harmful(
    unset: Sequence[str], results: Sequence[Result], found: Localisation | None
) -> tuple[str, ...] | None:
    """Return the unset weights from which NaN came into a result, or None where it is not known.

    unset: the candidate's names; each weight is NaN, and lies in the module named first wrong.
    """
    if not unset or not any(map(_is_nan, results)):
        return ()
    culprit = found.culprit.candidate if found and found.culprit else ""
    inside = tuple(name for name in unset if culprit and name.startswith(f"{culprit}."))
    return inside or None


def name_harmful(results: Sequence[Result], harmful: Sequence[str]) -> tuple[Result, ...]:
    """Return results whose reason says from which unset weight their NaN came."""
    if not harmful:
        return tuple(results)
    source = f"NaN comes from {', '.join(harmful[:_SHOWN])}, which the checkpoint leaves unset"
    return tuple(
        replace(result, reason=f"{source}; {result.reason}") if _is_nan(result) else result
        for result in results
    )


def _is_nan(result: Result) -> bool:
    worst = result.comparison.worst if result.comparison else None
    return result.verdict is Verdict.FAIL and worst is not None and math.isnan(worst.actual)

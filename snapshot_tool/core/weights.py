"""A candidate's weights beside the checkpoint's: what no case uses is judged here alone."""

from dataclasses import dataclass


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
    """

    compared: int
    differing: tuple[WeightDifference, ...] = ()
    not_compared: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Count them."""
        equal = self.compared - len(self.differing)
        left = f", {len(self.not_compared)} not compared" if self.not_compared else ""
        off = f", {len(self.differing)} not" if self.differing else ""
        return f"{equal} as in the checkpoint{off}{left}"

"""Where a tensor's errors lie and how large they are, in units of its tolerance."""

from dataclasses import dataclass

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

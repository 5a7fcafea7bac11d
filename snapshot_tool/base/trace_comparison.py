"""What comparing two traces found, as plain data."""

from dataclasses import dataclass
from enum import StrEnum

from snapshot_tool.base.mapping import ModuleMapping


class Metric(StrEnum):
    """The figure shown of each tensor, beside its relative error."""

    MAX_ABS = "max_abs"
    MEAN_ABS = "mean_abs"
    SUM_ABS = "sum_abs"
    COSINE = "cosine"


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One tensor of both traces.

    Args:
        module: the reference's module.
        partner: the other's.
        run: the pass through the model.
        call: which call of the module in that pass.
        tensor: the tensor's place among the module's inputs or outputs.
        other_tensor: the same in the other trace.
        shape: the reference's.
        other_shape: the other's.
        figures: by metric; None where nothing could be measured.
        relative_error: root mean square of the difference, by the reference's root mean square;
            None where nothing could be measured.
        sampled: whether figures and error were taken from sketches, not from all elements.
        mismatch: whether the shapes do not fit.
        problem: why nothing could be measured; "" where something was.
    """

    module: str
    partner: str
    run: int
    call: int
    tensor: str
    other_tensor: str
    shape: tuple[int, ...]
    other_shape: tuple[int, ...]
    figures: dict[Metric, float] | None
    relative_error: float | None
    sampled: bool
    mismatch: bool = False
    problem: str = ""

    def beyond(self, limit: float) -> bool:
        """Tell whether it differs: in shape, or by more than `limit`. NaN is beyond."""
        if self.relative_error is None:
            return self.mismatch
        return not self.relative_error <= limit


@dataclass(frozen=True, slots=True)
class TraceComparison:
    """Two traces, side by side.

    Args:
        reference: what the first one says of itself, on one line.
        other: what the second one says.
        mapping: how modules were matched.
        limit: the greatest relative error that is no difference.
        rows: in order of execution.
        missing: what the mapping or the reference has and the other trace lacks.
        alone: the reference's modules without a partner.
        other_alone: the other's.
        tensors_alone: tensors without a partner, of modules that have one.
    """

    reference: str
    other: str
    mapping: ModuleMapping
    limit: float
    rows: tuple[TraceRow, ...]
    missing: tuple[str, ...]
    alone: tuple[str, ...]
    other_alone: tuple[str, ...]
    tensors_alone: tuple[str, ...]

    @property
    def differing(self) -> tuple[TraceRow, ...]:
        """The rows that are beyond the limit."""
        return tuple(row for row in self.rows if row.beyond(self.limit))

    @property
    def exit_code(self) -> int:
        """0: all agree; 1: a row differs or something is missing; 3: nothing was compared."""
        if self.differing or self.missing:
            return 1
        return 0 if any(row.relative_error is not None for row in self.rows) else 3

"""Comparing two traces: every tensor of every module that has a partner, in order of execution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.localisation import (
    ERROR_LIMIT,
    Metric,
    ModuleMapping,
    TraceComparison,
    TraceRow,
)
from snapshot_tool.base.protocol import Side
from snapshot_tool.base.results import Comparison
from snapshot_tool.base.taps import Sketch, moments_error, relative_error
from snapshot_tool.base.tolerance import Tolerance
from snapshot_tool.numerics.compare import compare_tensors
from snapshot_tool.traces.format import Call, Trace, TracedTensor, open_trace
from snapshot_tool.traces.match import match_modules, module_names, read_map, sketch_of

if TYPE_CHECKING:
    import torch


_TEXT_DIMENSIONS = 3  # (batch, length, width)
_Pair = tuple[TracedTensor, TracedTensor]


def compare_traces(
    one: Trace, two: Trace, *, prefixes: Mapping[str, str] | None, side: Side, limit: float
) -> TraceComparison:
    """Compare two traces of the same inputs; that of the reference comes first, if there is one.

    prefixes: the user's map of modules, or None. limit: see TraceComparison.
    """
    reference, other = (two, one) if two.header.impl == "hf" != one.header.impl else (one, two)
    _require_comparable(reference, other)
    mapping = match_modules(reference, other, prefixes)
    rows, missing, alone = _Walk(reference, other, mapping, side, limit).compare()
    names, others = module_names(reference), module_names(other)
    taken = {name.partition("[")[0] for name in mapping.names.values()}
    lacking = tuple(name for name in names if name not in mapping.names)
    if mapping.by == "equal names":
        missing = (*missing, *(f"module {name}" for name in lacking))
    compared = any(row.relative_error is not None for row in rows)
    differs = bool(missing) or any(row.beyond for row in rows)
    return TraceComparison(
        exit_code=1 if differs else 0 if compared else 3,
        reference=_title(reference),
        other=_title(other),
        mapping=str(mapping),
        inferred=mapping.inferred,
        limit=limit,
        rows=rows,
        missing=missing,
        reference_alone=lacking,
        other_alone=tuple(name for name in others if name not in taken),
        tensors_alone=alone,
    )


def _title(trace: Trace) -> str:
    header = trace.header
    checkpoint = f"{header.checkpoint.name} at {header.checkpoint.revision[:12]}"
    return (
        f"{header.implementation}: {checkpoint}, {header.question}, {header.mode} in "
        f"{header.runs} {'pass' if header.runs == 1 else 'passes'} "
        f"({header.device}-{header.dtype})"
    )


def _require_comparable(one: Trace, two: Trace) -> None:
    """Raise UsageError for traces of other inputs or with other sketches."""
    pairs = zip(_input_tensors(one), _input_tensors(two), strict=True)
    if not all(_equal(*pair) for pair in pairs):
        raise UsageError(
            f"{one.path} and {two.path} are of different inputs",
            "trace the second one with --inputs and the first",
        )
    if one.header.seed != two.header.seed:
        raise UsageError(
            f"{one.path} and {two.path} have sketches of different seeds",
            "trace the second one with --inputs and the first",
        )


def _equal(one: torch.Tensor | None, two: torch.Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    return one.shape == two.shape and bool((one == two).all())


def _input_tensors(trace: Trace) -> list[torch.Tensor | None]:
    inputs = trace.inputs()
    return [inputs.input_ids, inputs.attention_mask, inputs.pixel_values]


@dataclass(frozen=True, slots=True)
class _Walk:
    """Goes through the reference's calls in order of execution."""

    reference: Trace
    other: Trace
    mapping: ModuleMapping
    side: Side
    limit: float

    def compare(self) -> tuple[tuple[TraceRow, ...], tuple[str, ...], tuple[str, ...]]:
        """Return the rows, what is missing, and the tensors without a partner."""
        calls = _by_place(self.other)
        rows: list[TraceRow] = []
        missing: dict[str, None] = {}
        alone: dict[str, None] = {}
        for (module, run, number), call in _by_place(self.reference).items():
            partner = self.mapping.names.get(module)
            if partner is None:
                continue
            place = partner.partition("[")[0], run, number
            if place not in calls:
                missing.setdefault(f"call {number} of {partner} in pass {run}")
                continue
            pairs, left = self._pair(call, calls[place], partner)
            rows += [self._row(module, partner, run, number, pair) for pair in pairs]
            alone.update(dict.fromkeys(f"{module} {self.side.value} {name}" for name in left))
        return tuple(rows), tuple(missing), tuple(alone)

    def _pair(self, call: Call, partner: Call, name: str) -> tuple[list[_Pair], list[str]]:
        """Return the pairs of tensors of two calls, and the names of the reference's left alone.

        A tensor that is said to be this module's is its partner; else the next of the same shape.
        The first two are partners where they have no other: their shapes differ.
        """
        mine, theirs = self._tensors(call), self._tensors(partner)
        named = [tensor for tensor in theirs if tensor.twin == call.module]
        free = [*named, *(tensor for tensor in theirs if tensor.name and tensor not in named)]
        pairs: list[_Pair] = []
        left: list[TracedTensor] = []
        for tensor in mine:
            fitting = [o for o in free if _fits(tensor, o, self._columns(name, o))]
            if not fitting:
                left.append(tensor)
                continue
            found = min(fitting, key=lambda o: o.twin != call.module and o.shape != tensor.shape)
            free.remove(found)
            pairs.append((tensor, found))
        if not pairs and left and free and self._are_one_argument(left[0], free[0]):
            pairs, left = [(left[0], free[0])], left[1:]
        return pairs, [tensor.name for tensor in left]

    def _are_one_argument(self, mine: TracedTensor, theirs: TracedTensor) -> bool:
        """Tell whether two tensors of other shapes must be partners: outputs are.

        Of inputs one side may be given ids where the other one is given embeddings.
        """
        alike = _kind(mine) == _kind(theirs) and len(mine.shape) == len(theirs.shape)
        return self.side is Side.OUTPUT or alike

    def _tensors(self, call: Call) -> tuple[TracedTensor, ...]:
        return call.inputs if self.side is Side.INPUT else call.outputs

    def _columns(self, partner: str, tensor: TracedTensor) -> slice | None:
        """Return the columns of the first output that "<module>[<first>:<end>]" names, or None."""
        bounds = partner.partition("[")[2].rstrip("]")
        if not bounds or self.side is Side.INPUT or tensor.name != "0":
            return None
        first, _, end = bounds.partition(":")
        return slice(int(first), int(end))

    def _row(self, module: str, partner: str, run: int, number: int, pair: _Pair) -> TraceRow:
        mine, theirs = pair
        columns = self._columns(partner, theirs)
        measured = self._measure(mine, theirs, columns)
        return TraceRow(
            module=module,
            partner=partner,
            run=run,
            call=number,
            tensor=f"{self.side.value} {mine.name}",
            other_tensor=f"{self.side.value} {theirs.name}".strip(),
            shape=mine.shape,
            other_shape=_narrowed(theirs.shape, columns),
            **(measured.figures or {}),
            relative_error=measured.error,
            sampled=measured.sampled,
            # Not "greater": NaN is beyond every limit.
            beyond=measured.mismatch
            if measured.error is None
            else not measured.error <= self.limit,
            problem=measured.problem,
        )

    def _measure(
        self, mine: TracedTensor, theirs: TracedTensor, columns: slice | None
    ) -> _Measured:
        """Measure two tensors where they are whole, or else their sketches."""
        shape = _common_shape(mine.shape, _narrowed(theirs.shape, columns))
        if shape is None:
            shapes = f"{list(mine.shape)} and {list(theirs.shape)}"
            return _Measured(problem=f"shape mismatch: {shapes}", mismatch=True)
        if not shape or 0 in shape:
            return _Measured(problem="no elements to compare")
        one, two = self.reference.whole(mine), self.other.whole(theirs)
        if two is not None and columns is not None:
            two = two[..., columns]
        one, two = _cut(one, shape), _cut(two, shape)
        golden = sketch_of(self.reference, mine, whole=one)
        actual = sketch_of(self.other, theirs, whole=two)
        if one is not None and two is not None:
            found = _measure_whole(one, two)
        elif golden is None or actual is None:
            return _Measured(problem="not kept")
        elif golden.shape != actual.shape:
            return _Measured(problem="only a part is comparable, and only a sketch is kept")
        else:
            found = _measure_sketches(golden, actual)
        return self._excused(found, golden, actual)

    def _excused(self, found: _Measured, golden: Sketch | None, actual: Sketch | None) -> _Measured:
        """Let pass what an inferred partner keeps in another order: the figures say nothing."""
        if not self.mapping.inferred or found.error is None or golden is None or actual is None:
            return found
        if found.error > self.limit and moments_error(golden, actual) <= self.limit:
            return _Measured(problem="the same values in another order")
        return found


@dataclass(frozen=True, slots=True)
class _Measured:
    """What was found of two tensors; mismatch: their shapes do not fit. See TraceRow."""

    figures: dict[Metric, float] | None = None
    error: float | None = None
    sampled: bool = False
    mismatch: bool = False
    problem: str = ""


def _by_place(trace: Trace) -> dict[tuple[str, int, int], Call]:
    """Return the calls by module, pass, and number in the pass, in order of execution."""
    found: dict[tuple[str, int, int], Call] = {}
    for call in trace.header.calls:
        number = 0
        while (call.module, call.run, number) in found:
            number += 1
        found[call.module, call.run, number] = call
    return found


def _narrowed(shape: tuple[int, ...], columns: slice | None) -> tuple[int, ...]:
    return shape if columns is None else (*shape[:-1], columns.stop - columns.start)


def _common_shape(mine: tuple[int, ...], theirs: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape in which two tensors are compared, None where there is none.

    One row may stand for the whole batch, and the last position, (batch, 1, width), for all of
    them, which is what a head computes when generating.
    """
    if mine == theirs:
        return mine
    if theirs[:1] == (1,) and theirs[1:] == mine[1:]:
        return mine
    if len(mine) == len(theirs) == _TEXT_DIMENSIONS and 1 in (mine[1], theirs[1]):
        return (mine[0], 1, mine[2]) if mine[::2] == theirs[::2] else None
    return None


def _cut(tensor: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Bring a tensor into the common shape."""
    if tensor is None or tuple(tensor.shape) == shape:
        return tensor
    if tensor.shape[0] == 1 != shape[0]:
        return tensor.expand(shape)
    return tensor[:, -1:]


def _fits(mine: TracedTensor, theirs: TracedTensor, columns: slice | None) -> bool:
    shape = _common_shape(mine.shape, _narrowed(theirs.shape, columns))
    # Ids, positions and masks have one shape: only their names tell them apart.
    same_name = mine.name == theirs.name or _kind(mine) == "float"
    return shape is not None and _kind(mine) == _kind(theirs) and same_name


def _kind(tensor: TracedTensor) -> str:
    """Return "float", "int", "bool" …: precision is no kind."""
    return tensor.dtype.removeprefix("b").rstrip("0123456789")


def _measure_whole(one: torch.Tensor, two: torch.Tensor) -> _Measured:
    found = compare_tensors(one, two, Tolerance(0.0, 0.0))
    scale = float(one.double().square().mean().sqrt())
    error = found.rmse / scale if scale else (math.inf if found.rmse else 0.0)
    return _Measured(_figures(found, one.numel()), error)


def _measure_sketches(one: Sketch, two: Sketch) -> _Measured:
    """Measure at the sampled places; the error also by the projection, which sees all elements."""
    found = compare_tensors(one.sample, two.sample, Tolerance(0.0, 0.0))
    return _Measured(_figures(found, math.prod(one.shape)), relative_error(one, two), sampled=True)


def _figures(found: Comparison, numel: int) -> dict[Metric, float]:
    return {
        Metric.MAX_ABS: found.max_abs,
        Metric.MEAN_ABS: found.mean_abs,
        Metric.SUM_ABS: found.mean_abs * numel,
        Metric.COSINE: found.cosine,
    }


@dataclass(frozen=True, slots=True)
class CompareTracesRequest:
    """Which traces to compare, and how; `limit` is the relative error that is no difference."""

    one: Path
    two: Path
    map_path: Path | None = None
    side: Side = Side.OUTPUT
    limit: float = ERROR_LIMIT


def compare_trace_files(request: CompareTracesRequest) -> TraceComparison:
    """Read two traces and compare them."""
    prefixes = None if request.map_path is None else read_map(request.map_path)
    one, two = open_trace(request.one), open_trace(request.two)
    return compare_traces(one, two, prefixes=prefixes, side=request.side, limit=request.limit)

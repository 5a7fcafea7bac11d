"""Comparing two traces: every tensor of every module that has a partner, in order of execution.

Partners are found by a map, by names, or inferred from shapes, order and values.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.files import open_plain
from snapshot_tool.base.localisation import ERROR_LIMIT, ModuleMapping, TraceComparison, TraceRow
from snapshot_tool.base.protocol import Side
from snapshot_tool.base.tolerance import Tolerance
from snapshot_tool.diagnose.localise import (
    FusedWidths,
    as_batch,
    fused_parts,
    fused_widths,
    infer,
    output_shapes,
)
from snapshot_tool.families import find_family
from snapshot_tool.families.family import pairs_of
from snapshot_tool.numerics.compare import compare_tensors
from snapshot_tool.taps.sketches import (
    MAX_DIMENSIONS,
    Sketch,
    Tap,
    moments_error,
    relative_error,
    sketch,
)
from snapshot_tool.traces.trace import Call, Trace, TracedTensor, open_trace

_MAX_MAP = 2**20  # bytes
_TEXT_DIMENSIONS = 3  # (batch, length, width)


def compare_traces(
    one: Path,
    two: Path,
    *,
    map_path: Path | None = None,
    side: Side = Side.OUTPUT,
    limit: float = ERROR_LIMIT,
) -> TraceComparison:
    """Compare two traces of the same inputs; that of the reference comes first, if there is one.

    map_path: a file with a JSON object of module prefixes. limit: the greatest relative error that
    counts as equal.

    Raises UsageError for a map that matches nothing and for traces of different inputs.
    """
    prefixes = None if map_path is None else read_map(map_path)
    reference, other = open_trace(one), open_trace(two)
    if other.header.impl == "hf" != reference.header.impl:
        reference, other = other, reference
    _require_comparable(reference, other)
    mapping = _match_modules(reference, other, prefixes)
    comparer = _Comparer(reference, other, mapping, side, limit)
    rows: list[TraceRow] = []
    missing: dict[str, None] = {}
    tensors_alone: dict[str, None] = {}
    other_calls = _calls(other)
    for (module, run, number), call in _calls(reference).items():
        partner = mapping.names.get(module)
        if partner is None:
            continue
        other_call = other_calls.get((partner.partition("[")[0], run, number))
        if other_call is None:
            missing[f"call {number} of {partner} in pass {run}"] = None
            continue
        pairs, left = comparer.pair(call, other_call, partner)
        rows += [comparer.compare(call, number, partner, *pair) for pair in pairs]
        tensors_alone |= dict.fromkeys(f"{module} {side.value} {tensor.name}" for tensor in left)
    alone = tuple(name for name in _module_names(reference) if name not in mapping.names)
    if mapping.by == "equal names":
        missing |= dict.fromkeys(f"module {name}" for name in alone)
    taken = {name.partition("[")[0] for name in mapping.names.values()}
    compared = any(row.relative_error is not None for row in rows)
    differs = bool(missing) or any(row.beyond for row in rows)
    return TraceComparison(
        exit_code=1 if differs else 0 if compared else 3,
        reference=_title(reference),
        other=_title(other),
        mapping=str(mapping),
        inferred=mapping.inferred,
        limit=limit,
        rows=tuple(rows),
        missing=tuple(missing),
        reference_alone=alone,
        other_alone=tuple(name for name in _module_names(other) if name not in taken),
        tensors_alone=tuple(tensors_alone),
    )


def _require_comparable(one: Trace, two: Trace) -> None:
    """Raise UsageError if the inputs or the seeds of the sketches differ."""
    problem = "" if one.header.seed == two.header.seed else "have sketches of different seeds"
    inputs, others = one.inputs(), two.inputs()
    for name in ("input_ids", "attention_mask", "pixel_values"):
        mine, theirs = getattr(inputs, name), getattr(others, name)
        both = mine is not None and theirs is not None
        if not (torch.equal(mine, theirs) if both else mine is theirs):
            problem = "are of different inputs"
    if problem:
        raise UsageError(
            f"{one.path} and {two.path} {problem}",
            "trace the second one with --inputs and the first",
        )


def _calls(trace: Trace) -> dict[tuple[str, int, int], Call]:
    """Return the calls by module, pass, and number in the pass, in order of execution."""
    found: dict[tuple[str, int, int], Call] = {}
    counts: Counter[tuple[str, int]] = Counter()
    for call in trace.header.calls:
        found[call.module, call.run, counts[call.module, call.run]] = call
        counts[call.module, call.run] += 1
    return found


def _module_names(trace: Trace) -> list[str]:
    """Return the modules of a trace, in the order in which they first finished."""
    return list(dict.fromkeys(call.module for call in trace.header.calls))


def _title(trace: Trace) -> str:
    header = trace.header
    checkpoint = f"{header.checkpoint.name} at {header.checkpoint.revision[:12]}"
    return (
        f"{header.implementation}: {checkpoint}, {header.question}, {header.mode} in "
        f"{header.runs} {'pass' if header.runs == 1 else 'passes'} "
        f"({header.device}-{header.dtype})"
    )


def read_map(path: Path) -> dict[str, str]:
    """Read a JSON object of module prefixes; raise UsageError if it is not valid."""
    try:
        with open_plain(path) as file:
            return msgspec.json.decode(file.read(_MAX_MAP), type=dict[str, str])
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(
            f"--map {path} is not a JSON object of names: {error}", "see docs/traces.md"
        ) from error


def _match_modules(
    reference: Trace, other: Trace, prefixes: Mapping[str, str] | None
) -> ModuleMapping:
    """Return the other's name of each of the reference's modules that has a partner.

    prefixes: the user's map. Without one, equal names match if both traces are of one
    implementation, else the family's names, else values.
    """
    names, others = _module_names(reference), _module_names(other)
    if prefixes is not None:
        return ModuleMapping(_by_prefix(names, set(others), prefixes), by="--map")
    one, two = reference.header, other.header
    if one.impl == two.impl:
        return ModuleMapping({n: n for n in names if n in set(others)}, by="equal names")
    family = find_family(one.family)
    if (one.impl, two.impl) == ("hf", "fms") and family and family.fms.module_pairs:
        twins = {hf: name for name in others for hf, _ in pairs_of(name, family.fms.module_pairs)}
        return ModuleMapping({name: twins[name] for name in names if name in twins})
    golden = _taps(reference, widths={}, shapes=())
    taps = _taps(other, widths=fused_widths(golden), shapes=output_shapes(golden))
    return infer(golden, taps).mapping


def _by_prefix(
    names: Sequence[str], others: Collection[str], prefixes: Mapping[str, str]
) -> dict[str, str]:
    """Map each name by its longest prefix; raise UsageError for an entry that names no module.

    "*" in a prefix stands for one part of a name, and for the same part in its target.
    """
    used: set[str] = set()
    mapping = {}
    for name in names:
        for prefix in sorted(prefixes, key=len, reverse=True):
            pattern = r"([^.]+)".join(map(re.escape, prefix.split("*"))) + r"((?:\..+)?)"
            if match := re.fullmatch(pattern, name):
                *stars, below = match.groups()
                target = prefixes[prefix]
                for part in stars:
                    target = target.replace("*", part, 1)
                if target + below in others:
                    mapping[name] = target + below
                    used.add(prefix)
                break
    if unused := [prefix for prefix in prefixes if prefix not in used]:
        raise UsageError(
            f"--map: {unused[0]} -> {prefixes[unused[0]]} matches no modules of the two traces",
            "compare with the names in the traces",
        )
    return mapping


def _taps(trace: Trace, *, widths: FusedWidths, shapes: Collection[tuple[int, ...]]) -> list[Tap]:
    """Return the first call of each module in the first pass, with parts of fused outputs."""
    found: dict[str, Tap] = {}
    for call in trace.header.calls:
        if call.run or call.module in found or not call.outputs or not _is_float(call.outputs[0]):
            continue
        given = None
        if call.inputs and _is_float(call.inputs[0]):
            given = _sketch_of(trace, call.inputs[0], trace.whole(call.inputs[0]))
        whole = trace.whole(call.outputs[0])
        batch = None if whole is None else as_batch(whole, shapes)
        if (output := _sketch_of(trace, call.outputs[0], batch)) is None:
            continue
        found[call.module] = Tap(call.module, given, output)
        if whole is not None and whole.dim() <= MAX_DIMENSIONS:
            for columns, part in fused_parts(whole, widths):
                name = f"{call.module}{columns}"
                found[name] = Tap(name, given, sketch(part, seed=trace.header.seed))
    return list(found.values())


def _is_float(tensor: TracedTensor) -> bool:
    return tensor.dtype.startswith(("float", "bfloat"))


def _sketch_of(trace: Trace, tensor: TracedTensor, whole: torch.Tensor | None) -> Sketch | None:
    """Return the sketch of `whole`, or else the one that the trace has; None without either."""
    if whole is None:
        return trace.sketch(tensor)
    if not whole.numel() or not whole.dim():
        return None
    return sketch(whole.flatten(0, max(0, whole.dim() - MAX_DIMENSIONS)), seed=trace.header.seed)


@dataclass(frozen=True, slots=True)
class _Comparer:
    """Pairs and compares the tensors of two calls."""

    reference: Trace
    other: Trace
    mapping: ModuleMapping
    side: Side
    limit: float

    def pair(
        self, call: Call, other_call: Call, partner: str
    ) -> tuple[list[tuple[TracedTensor, TracedTensor]], list[TracedTensor]]:
        """Return the pairs of tensors of two calls, and the reference's tensors left alone.

        A tensor's partner is the one marked as this module's, else the next of the same shape. If
        no tensor has a partner, the first two are paired and their shapes are reported.
        """
        if self.side is Side.INPUT:
            mine, theirs = call.inputs, other_call.inputs
        else:
            mine, theirs = call.outputs, other_call.outputs
        named = [tensor for tensor in theirs if tensor.twin == call.module]
        free = [*named, *(tensor for tensor in theirs if tensor.name and tensor not in named)]
        pairs, left = [], []
        for tensor in mine:
            fitting = [o for o in free if _fits(tensor, o, self._columns(partner, o))]
            if not fitting:
                left.append(tensor)
                continue
            found = min(fitting, key=lambda o: o.twin != call.module and o.shape != tensor.shape)
            free.remove(found)
            pairs.append((tensor, found))
        if not pairs and left and free:
            one, two = left[0], free[0]
            # An input may be another argument: ids on one side, embeddings on the other.
            alike = _kind(one) == _kind(two) and len(one.shape) == len(two.shape)
            if self.side is Side.OUTPUT or alike:
                return [(one, two)], left[1:]
        return pairs, left

    def _columns(self, partner: str, tensor: TracedTensor) -> slice | None:
        """Return the columns of the first output that "<module>[<first>:<end>]" names, or None."""
        bounds = partner.partition("[")[2].rstrip("]")
        if not bounds or self.side is Side.INPUT or tensor.name != "0":
            return None
        first, _, end = bounds.partition(":")
        return slice(int(first), int(end))

    def compare(
        self, call: Call, number: int, partner: str, mine: TracedTensor, theirs: TracedTensor
    ) -> TraceRow:
        """Compare two tensors if they are whole, or else their sketches."""
        columns = self._columns(partner, theirs)
        other_shape = _narrowed(theirs.shape, columns)

        def row(problem: str = "", *, beyond: bool = False, **figures: float) -> TraceRow:
            return TraceRow(
                module=call.module,
                partner=partner,
                run=call.run,
                call=number,
                tensor=f"{self.side.value} {mine.name}",
                other_tensor=f"{self.side.value} {theirs.name}".strip(),
                shape=mine.shape,
                other_shape=other_shape,
                relative_error=figures.pop("relative_error", None),
                sampled=sampled and not problem,
                beyond=beyond,
                problem=problem,
                **figures,
            )

        sampled = False
        shape = _common_shape(mine.shape, other_shape)
        if shape is None:
            shapes = f"{list(mine.shape)} and {list(theirs.shape)}"
            return row(f"shape mismatch: {shapes}", beyond=True)
        if not shape or 0 in shape:
            return row("no elements to compare")
        one, two = self.reference.whole(mine), self.other.whole(theirs)
        if two is not None and columns is not None:
            two = two[..., columns]
        one, two = _cut(one, shape), _cut(two, shape)
        golden = _sketch_of(self.reference, mine, one)
        actual = _sketch_of(self.other, theirs, two)
        if one is not None and two is not None:
            found, numel = compare_tensors(one, two, Tolerance(0.0, 0.0)), one.numel()
            scale = float(one.double().square().mean().sqrt())
            error = found.rmse / scale if scale else (math.inf if found.rmse else 0.0)
        elif golden is None or actual is None:
            return row("not kept")
        elif golden.shape != actual.shape:
            return row("only a part is comparable, and only a sketch is kept")
        else:
            # The figures are those of the sample. The error is also measured by the projection,
            # which sees all elements.
            sampled = True
            found = compare_tensors(golden.sample, actual.sample, Tolerance(0.0, 0.0))
            numel, error = math.prod(golden.shape), relative_error(golden, actual)
        unexplained = self.mapping.inferred and error > self.limit
        if unexplained and golden and actual and moments_error(golden, actual) <= self.limit:
            # The partner keeps the values in another order, so the figures mean nothing.
            return row("the same values in another order")
        return row(
            beyond=not error <= self.limit,  # NaN is beyond every limit
            relative_error=error,
            max_abs=found.max_abs,
            mean_abs=found.mean_abs,
            sum_abs=found.mean_abs * numel,
            cosine=found.cosine,
        )


def _fits(mine: TracedTensor, theirs: TracedTensor, columns: slice | None) -> bool:
    shape = _common_shape(mine.shape, _narrowed(theirs.shape, columns))
    # Ids, positions and masks have the same shape. Only their names distinguish them.
    same_name = mine.name == theirs.name or _is_float(mine)
    return shape is not None and _kind(mine) == _kind(theirs) and same_name


def _kind(tensor: TracedTensor) -> str:
    """Return "float", "int", "bool" …, whatever the precision."""
    return tensor.dtype.replace("bfloat", "float").rstrip("0123456789")


def _narrowed(shape: tuple[int, ...], columns: slice | None) -> tuple[int, ...]:
    return shape if columns is None else (*shape[:-1], columns.stop - columns.start)


def _common_shape(mine: tuple[int, ...], theirs: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape in which two tensors are compared, or None if there is none.

    One row may stand for the whole batch, and the last position, (batch, 1, width), for all of
    them: that is what a head computes when generating.
    """
    if mine == theirs or (theirs[:1] == (1,) and theirs[1:] == mine[1:]):
        return mine
    is_text = len(mine) == len(theirs) == _TEXT_DIMENSIONS
    if is_text and 1 in (mine[1], theirs[1]) and mine[::2] == theirs[::2]:
        return (mine[0], 1, mine[2])
    return None


def _cut(tensor: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    if tensor is None or tuple(tensor.shape) == shape:
        return tensor
    if tensor.shape[0] == 1 != shape[0]:
        return tensor.expand(shape)
    return tensor[:, -1:]

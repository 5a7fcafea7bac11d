"""Which module of one trace is which of another: by a map, by names, or inferred."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.files import open_plain
from snapshot_tool.base.localisation import ModuleMapping
from snapshot_tool.base.taps import MAX_DIMENSIONS, Sketch, Tap, sketch
from snapshot_tool.diagnose.localise import as_batch, fused_widths, infer, output_shapes
from snapshot_tool.families import find_family
from snapshot_tool.families.family import pairs_of
from snapshot_tool.traces.format import Trace, TracedTensor

if TYPE_CHECKING:
    import torch

_REFERENCE = "hf"
_MAX_MAP = 2**20  # bytes


def module_names(trace: Trace) -> list[str]:
    """Return the modules of a trace, in the order in which they first finished."""
    return list(dict.fromkeys(call.module for call in trace.header.calls))


def match_modules(
    reference: Trace, other: Trace, prefixes: Mapping[str, str] | None
) -> ModuleMapping:
    """Return the other's name of each of the reference's modules that has a partner.

    prefixes: the user's map, from names or prefixes of them to the other's; None: equal names where
    both traces are of one implementation, else the family's twins, else inferred.
    """
    names, others = module_names(reference), module_names(other)
    if prefixes is not None:
        return ModuleMapping(_by_prefix(names, others, prefixes), by="--map")
    one, two = reference.header, other.header
    if one.impl == two.impl:
        return ModuleMapping({n: n for n in names if n in set(others)}, by="equal names")
    family = find_family(one.family)
    if (one.impl, two.impl) == (_REFERENCE, "fms") and family and family.fms.module_pairs:
        twins = {hf: name for name in others for hf, _ in pairs_of(name, family.fms.module_pairs)}
        return ModuleMapping({name: twins[name] for name in names if name in twins})
    return _infer(reference, other)


def read_map(path: Path) -> dict[str, str]:
    """Read a JSON object of module prefixes; raise UsageError where it is none."""
    try:
        with open_plain(path) as file:
            found = json.loads(file.read(_MAX_MAP))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--map {path} is no JSON: {error}", "see docs/traces.md") from error
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise UsageError(f"--map {path} is no object of names", "see docs/traces.md")
    return found


def _by_prefix(
    names: Sequence[str], others: Sequence[str], prefixes: Mapping[str, str]
) -> dict[str, str]:
    """Map each name by its longest prefix; raise UsageError for an entry that names no module."""
    there = set(others)
    patterns = {prefix: _pattern(prefix) for prefix in prefixes}
    used: set[str] = set()
    mapping = {}
    for name in names:
        for prefix in sorted(prefixes, key=len, reverse=True):
            if match := patterns[prefix].fullmatch(name):
                target = _fill(prefixes[prefix], match.groups()[:-1]) + match.groups()[-1]
                if target in there:
                    mapping[name] = target
                    used.add(prefix)
                break
    if dead := [prefix for prefix in prefixes if prefix not in used]:
        raise UsageError(
            f"--map: {dead[0]} -> {prefixes[dead[0]]} matches no modules of the two traces",
            "compare with the names that the traces hold",
        )
    return mapping


def _pattern(prefix: str) -> re.Pattern[str]:
    """Return a pattern of the prefix and what lies below it; "*" stands for one part of a name."""
    parts = (re.escape(part) for part in prefix.split("*"))
    return re.compile(r"([^.]+)".join(parts) + r"((?:\..+)?)")


def _fill(target: str, values: Sequence[str]) -> str:
    """Put what each "*" stood for in the place of the target's own."""
    left = list(values)
    return re.sub(r"\*", lambda _: left.pop(0) if left else "*", target)


def _infer(reference: Trace, other: Trace) -> ModuleMapping:
    """Align the modules of the first pass by shapes, order and values."""
    golden = _taps(reference)
    taps = _taps(other, widths=fused_widths(golden), shapes=output_shapes(golden))
    return infer(golden, taps).mapping


def _taps(
    trace: Trace,
    *,
    widths: Mapping[int, Sequence[tuple[int, ...]]] | None = None,
    shapes: Collection[tuple[int, ...]] = (),
) -> list[Tap]:
    """Return the first call of each module in the first pass, with parts of fused outputs."""
    found: dict[str, Tap] = {}
    for call in trace.header.calls:
        if call.run or call.module in found or not call.outputs:
            continue
        given = _sketch(trace, call.inputs[0]) if call.inputs else None
        output = call.outputs[0]
        if (whole := _sketch(trace, output, shapes=shapes)) is None:
            continue
        found[call.module] = Tap(call.module, given, whole)
        for start, end, part in _parts(trace, output, widths or {}):
            name = f"{call.module}[{start}:{end}]"
            found[name] = Tap(name, given, part)
    return list(found.values())


def _parts(
    trace: Trace, output: TracedTensor, widths: Mapping[int, Sequence[tuple[int, ...]]]
) -> list[tuple[int, int, Sketch]]:
    """Return the parts that several modules may be fused into; a sketch cannot be cut."""
    tensor = trace.whole(output)
    if tensor is None or not 1 <= tensor.dim() <= MAX_DIMENSIONS:
        return []
    parts = []
    for cuts in widths.get(tensor.shape[-1], ()):
        start = 0
        for width in cuts:
            part = tensor[..., start : start + width]
            parts.append((start, start + width, sketch(part, seed=trace.header.seed)))
            start += width
    return parts


def _sketch(
    trace: Trace, tensor: TracedTensor, *, shapes: Collection[tuple[int, ...]] = ()
) -> Sketch | None:
    """Return the sketch of numbers that are not whole; None of anything else."""
    if not tensor.dtype.startswith(("float", "bfloat")):
        return None
    whole = trace.whole(tensor)
    return sketch_of(trace, tensor, whole=None if whole is None else as_batch(whole, shapes))


def sketch_of(
    trace: Trace, tensor: TracedTensor, *, whole: torch.Tensor | None = None
) -> Sketch | None:
    """Return a tensor's sketch, kept or made from the whole; None where neither is there.

    whole: what to sketch in place of the tensor that is kept.
    """
    whole = trace.whole(tensor) if whole is None else whole
    if whole is None:
        return trace.sketch(tensor)
    if not whole.numel() or not whole.dim():
        return None
    return sketch(whole.flatten(0, max(0, whole.dim() - MAX_DIMENSIONS)), seed=trace.header.seed)

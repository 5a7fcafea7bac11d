"""Running a model with every module watched, into a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from snapshot_tool.base.errors import SnapError
from snapshot_tool.base.protocol import CaseInputs, Side
from snapshot_tool.base.taps import MAX_DIMENSIONS, sketch, without_padding
from snapshot_tool.taps.hooks import named_modules, named_tensors, run_eagerly, watch_modules
from snapshot_tool.traces.format import Call, TracedTensor, TraceHeader, TraceWriter

if TYPE_CHECKING:
    import torch

# From a module's name and its output to the outputs of the reference's modules in it, by name.
TwinOutputs = Callable[[str, object], Mapping[str, "torch.Tensor"]]


class Mode(StrEnum):
    """What is traced: one pass over the prompt, or all passes of a generation."""

    FORWARD = "forward"
    GENERATE = "generate"


@dataclass(slots=True)
class Tracer:
    """A watcher that writes every call of a module.

    Args:
        writer: where tensors go.
        attention_mask: (1, length), by which text activations are rid of padding.
        max_elements: tensors up to this size are kept whole.
        seed: of the sketches.
        twin_outputs: finds the reference's outputs in the candidate's.
    """

    writer: TraceWriter
    attention_mask: torch.Tensor
    max_elements: int
    seed: int
    twin_outputs: TwinOutputs
    calls: list[Call] = field(default_factory=list)
    _entered: list[tuple[TracedTensor, ...]] = field(default_factory=list)

    def __call__(self, module: str, side: Side, value: object) -> None:
        """Take in what a module is given, or returns."""
        if side is Side.INPUT:
            # (arguments, keywords): their names are theirs alone.
            found = [(name.partition(".")[2], tensor) for name, tensor in named_tensors(value)]
            self._entered.append(tuple(self._trace(name, tensor) for name, tensor in found))
            return
        inputs = self._entered.pop()
        outputs = tuple(self._outputs(module, value))
        self.calls.append(Call(module=module, run=0, inputs=inputs, outputs=outputs))

    def _outputs(self, module: str, value: object) -> Iterable[TracedTensor]:
        """Trace what is returned, and what of it the reference has as a module's own output."""
        twins = dict(self.twin_outputs(module, value))
        for name, tensor in named_tensors(value):
            same = [hf for hf, view in twins.items() if _is_same(view, tensor)]
            yield self._trace(name, tensor, twin=same[0] if same else "")
            for hf in same:
                del twins[hf]
        for hf, view in twins.items():
            yield self._trace("", view, twin=hf)

    def _trace(self, name: str, tensor: torch.Tensor, *, twin: str = "") -> TracedTensor:
        real = without_padding(tensor, self.attention_mask)
        kept = TracedTensor(
            name=name,
            shape=tuple(real.shape),
            dtype=str(real.dtype).removeprefix("torch."),
            twin=twin,
        )
        if real.numel() <= self.max_elements:
            return msgspec.structs.replace(kept, key=self.writer.keep(real))
        if real.is_complex() or not real.dim():
            return kept
        leading = max(0, real.dim() - MAX_DIMENSIONS)
        row = self.writer.sketch(sketch(real.flatten(0, leading), seed=self.seed))
        return msgspec.structs.replace(kept, sketch=row)


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors are one and the same memory, seen in the same way."""
    same_memory = one.data_ptr() == other.data_ptr()
    return same_memory and (one.shape, one.stride()) == (other.shape, other.stride())


def write_trace(
    target: Path,
    model: torch.nn.Module,
    answer: Callable[[], object],
    *,
    header: TraceHeader,
    inputs: CaseInputs,
    twin_outputs: TwinOutputs = lambda _module, _output: {},
) -> TraceHeader:
    """Run `answer` with every module of `model` watched, and write the trace.

    header: what the trace says of itself; its calls are filled in. The target is written whole or
    not at all.
    """
    try:
        writer = TraceWriter(target)
    except OSError as error:
        raise SnapError(f"cannot write {target}: {error.strerror}", "name another file") from error
    tracer = Tracer(writer, inputs.attention_mask, header.max_elements, header.seed, twin_outputs)
    try:
        with run_eagerly(), watch_modules(named_modules(model), tracer):
            answer()
        header = msgspec.structs.replace(header, calls=number_runs(tracer.calls))
        writer.finish(header, inputs)
    except OSError as error:
        raise SnapError(f"cannot write {target}: {error.strerror}") from error
    finally:
        writer.discard()
    return header


def number_runs(calls: list[Call]) -> tuple[Call, ...]:
    """Number the passes through the model: each ends with the module that finishes last of all."""
    numbered, run = [], 0
    for call in calls:
        numbered.append(msgspec.structs.replace(call, run=run))
        run += call.module == calls[-1].module
    return tuple(numbered)


def require_free(target: Path, *, force: bool) -> None:
    """Raise SnapError where a file is in the way, before anything is computed."""
    if target.exists() and not force:
        raise SnapError(f"{target} is there already", "replace it with --force, or name another")

"""Running a model and writing the inputs and outputs of every module to a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec
import torch

from snapshot_tool.base.errors import SnapError
from snapshot_tool.base.protocol import CaseInputs, Side
from snapshot_tool.base.taps import MAX_DIMENSIONS, Sketch, sketch, without_padding
from snapshot_tool.goldens.parts import stack_sketches
from snapshot_tool.goldens.tensors import TORCH_DTYPES, Span, write_file
from snapshot_tool.goldens.transaction import sync_folder
from snapshot_tool.numerics.compare import tensor_bytes
from snapshot_tool.taps.hooks import named_modules, named_tensors, run_eagerly, watch_modules
from snapshot_tool.traces.format import (
    INPUT_NAMES,
    METADATA_KEY,
    SKETCHES,
    Call,
    TracedTensor,
    TraceHeader,
)

_LETTERS = {name: letters for letters, name in TORCH_DTYPES.items()}

# From a module's name and its output to the outputs of the reference's modules in it, by name.
TwinOutputs = Callable[[str, object], Mapping[str, torch.Tensor]]


def write_trace(
    target: Path,
    model: torch.nn.Module,
    run: Callable[[], object],
    *,
    header: TraceHeader,
    inputs: CaseInputs,
    twin_outputs: TwinOutputs = lambda _module, _output: {},
) -> TraceHeader:
    """Call `run` with every module of `model` watched, and write the trace.

    Args:
        target: the file, which is written whole or not at all.
        model: the model.
        run: runs it.
        header: the description of the trace, without calls.
        inputs: the model's inputs.
        twin_outputs: finds the reference's outputs in the candidate's.

    Returns the header with the calls. Raises SnapError if the file cannot be written.
    """
    try:
        writer = _TraceWriter(target, header, inputs, twin_outputs)
        try:
            with run_eagerly(), watch_modules(named_modules(model), writer):
                run()
            return writer.finish()
        finally:
            writer.discard()
    except OSError as error:
        raise SnapError(f"cannot write {target}: {error.strerror}", "name another file") from error


class _TraceWriter:
    """A watcher that writes tensors to a file beside the target, so that memory stays bounded."""

    def __init__(
        self, target: Path, header: TraceHeader, inputs: CaseInputs, twin_outputs: TwinOutputs
    ) -> None:
        self._target, self._header = target, header
        self._inputs, self._twin_outputs = inputs, twin_outputs
        self._data = target.with_name(f".{target.name}.data")
        self._partial = target.with_name(f".{target.name}.partial")
        self._file = self._data.open("wb")
        self._spans: list[tuple[str, Path, Span]] = []
        self._sketches: list[Sketch] = []
        self._calls: list[Call] = []
        self._entered: list[tuple[TracedTensor, ...]] = []  # inputs of the running modules

    def __call__(self, module: str, side: Side, value: object) -> None:
        if side is Side.INPUT:
            # The value is (arguments, keywords). Their names do not need the number before.
            inputs = [(name.partition(".")[2], tensor) for name, tensor in named_tensors(value)]
            self._entered.append(tuple(self._trace(name, tensor) for name, tensor in inputs))
            return
        outputs = tuple(self._trace_outputs(module, value))
        call = Call(module=module, run=0, inputs=self._entered.pop(), outputs=outputs)
        self._calls.append(call)

    def _trace_outputs(self, module: str, value: object) -> Iterator[TracedTensor]:
        """Write the outputs, and the parts of them that are outputs of the reference's modules."""
        twins = dict(self._twin_outputs(module, value))
        for name, tensor in named_tensors(value):
            same = [hf for hf, view in twins.items() if _is_same_view(view, tensor)]
            yield self._trace(name, tensor, twin=same[0] if same else "")
            for hf in same:
                del twins[hf]
        for hf, view in twins.items():
            yield self._trace("", view, twin=hf)

    def _trace(self, name: str, tensor: torch.Tensor, *, twin: str = "") -> TracedTensor:
        real = without_padding(tensor, self._inputs.attention_mask)
        key, row = None, None
        if real.numel() <= self._header.max_elements:
            key = self._keep(real)
        elif real.dim() and not real.is_complex():
            leading = max(0, real.dim() - MAX_DIMENSIONS)
            row = len(self._sketches)
            self._sketches.append(sketch(real.flatten(0, leading), seed=self._header.seed))
        dtype = str(real.dtype).removeprefix("torch.")
        return TracedTensor(
            name=name, shape=tuple(real.shape), dtype=dtype, key=key, sketch=row, twin=twin
        )

    def _keep(self, tensor: torch.Tensor, key: str | None = None) -> str | None:
        """Write a whole tensor and return its key; None for a dtype that the format lacks."""
        letters = _LETTERS.get(str(tensor.dtype).removeprefix("torch."))
        if letters is None:
            return None
        key = key or f"tensors/{len(self._spans):06d}"
        start = self._file.tell()
        self._file.write(tensor_bytes(tensor))
        span = Span(letters, tuple(tensor.shape), start, self._file.tell())
        self._spans.append((key, self._data, span))
        return key

    def finish(self) -> TraceHeader:
        """Write the whole trace to its target, in one step."""
        for name in INPUT_NAMES:
            if (tensor := getattr(self._inputs, name)) is not None:
                self._keep(tensor, f"inputs/{name}")
        for name, tensor in stack_sketches(self._sketches).items():
            self._keep(tensor, f"{SKETCHES}/{name}")
        self._file.close()
        numbered, run = [], 0
        for call in self._calls:
            numbered.append(msgspec.structs.replace(call, run=run))
            # A pass through the model ends with the module that finishes last of all.
            run += call.module == self._calls[-1].module
        header = msgspec.structs.replace(self._header, calls=tuple(numbered))
        text = msgspec.json.encode(header).decode()
        write_file(self._partial, self._spans, metadata={METADATA_KEY: text})
        self._partial.replace(self._target)
        sync_folder(self._target.parent)
        return header

    def discard(self) -> None:
        """Remove what was written besides the target."""
        self._file.close()
        self._data.unlink(missing_ok=True)
        self._partial.unlink(missing_ok=True)


def _is_same_view(one: torch.Tensor, other: torch.Tensor) -> bool:
    same_memory = one.data_ptr() == other.data_ptr()
    return same_memory and (one.shape, one.stride()) == (other.shape, other.stride())

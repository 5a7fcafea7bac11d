"""A trace: the inputs and outputs of every module, in order, in one safetensors file.

The file's metadata describes it, as JSON. The schema is these classes; docs/traces.md explains it.
Tensors up to a size are kept whole, and a sketch of larger ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from snapshot_tool.base.errors import SnapError, TraceInvalid
from snapshot_tool.base.files import sync_folder
from snapshot_tool.base.protocol import CaseInputs, Side
from snapshot_tool.goldens.manifest import Count, Digest, RelativePath
from snapshot_tool.goldens.parts import INPUT_NAMES, as_inputs, stack_sketches, unstack_sketches
from snapshot_tool.goldens.tensors import TORCH_DTYPES, Span, TensorFile, open_tensors, write_file
from snapshot_tool.numerics.compare import tensor_bytes
from snapshot_tool.taps.hooks import named_modules, named_tensors, run_eagerly, watch_modules
from snapshot_tool.taps.sketches import (
    MAX_DIMENSIONS,
    MOMENTS,
    PROJECTION_SIZE,
    SAMPLE_SIZE,
    Sketch,
    sketch,
    without_padding,
)

_LETTERS = {name: letters for letters, name in TORCH_DTYPES.items()}
# From a module's name and its output to the outputs of the reference's modules in it, by name.
TwinOutputs = Callable[[str, object], Mapping[str, torch.Tensor]]

SCHEMA = "snap-trace/1"
_METADATA_KEY = "snap-trace"
_SKETCHES = "sketches"
_SKETCH_WIDTHS = {
    "shapes": MAX_DIMENSIONS,
    "moments": len(MOMENTS),
    "sample": SAMPLE_SIZE,
    "projection": PROJECTION_SIZE,
}


class TracedTensor(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """One input or output of a module.

    Args:
        name: its position, "0" and so on, or an argument's name; "0.1" inside the first one.
        shape: without padding, see docs/traces.md.
        dtype: torch's name of it.
        key: the file's key of the whole tensor; None if it is not kept whole.
        sketch: the row of its sketch; None if it has none.
        twin: the reference's module whose output it is, as the reference lays it out; or "".
    """

    name: str
    shape: tuple[Count, ...]
    dtype: str
    key: str | None = None
    sketch: Count | None = None
    twin: str = ""


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One call of a module; `run` counts the passes through the model from 0."""

    module: str
    run: Count
    inputs: tuple[TracedTensor, ...]
    outputs: tuple[TracedTensor, ...]


class TracedCheckpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The weights that were run, and the reference's configuration with all defaults."""

    name: str
    revision: str
    files: dict[RelativePath, Digest]
    config: dict[str, Any]


class TraceHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The description of a trace; `calls` are in the order in which modules finished."""

    schema: str
    impl: str
    implementation: str
    family: str
    checkpoint: TracedCheckpoint
    question: str
    mode: str
    device: str
    dtype: str
    seed: Count
    max_elements: Count
    max_new_tokens: Count
    eos_token_ids: tuple[int, ...]
    environment: dict[str, str]
    calls: tuple[Call, ...]

    @property
    def runs(self) -> int:
        """The number of passes through the model."""
        return 1 + max((call.run for call in self.calls), default=-1)


@dataclass(frozen=True, slots=True)
class Trace:
    """An open trace; a tensor is read on request."""

    path: Path
    header: TraceHeader
    _file: TensorFile
    _sketches: Sequence[Sketch | None]

    def whole(self, tensor: TracedTensor) -> torch.Tensor | None:
        """Return a tensor that is kept whole, or None."""
        return None if tensor.key is None else self._file.read(tensor.key)

    def sketch(self, tensor: TracedTensor) -> Sketch | None:
        """Return a tensor's sketch if only that is kept, or None."""
        return None if tensor.sketch is None else self._sketches[tensor.sketch]

    def inputs(self) -> CaseInputs:
        """Return the model's inputs."""
        names = [name for name in INPUT_NAMES if f"inputs/{name}" in self._file.spans]
        return as_inputs({name: self._file.read(f"inputs/{name}") for name in names})


def open_trace(path: Path) -> Trace:
    """Open a trace; raise TraceInvalid, or GoldenDamaged if the file itself is damaged."""
    file = open_tensors(path)
    if _METADATA_KEY not in file.metadata:
        raise TraceInvalid(f"{path} is not a trace", "make one with snap trace")
    try:
        header = msgspec.json.decode(file.metadata[_METADATA_KEY], type=TraceHeader)
        if header.schema != SCHEMA:
            raise TraceInvalid(f"{path} has schema {header.schema}, this snap reads {SCHEMA}")
        sketches = _read_sketches(file)
        _require_consistent(header, file.spans, rows=len(sketches))
    except (msgspec.DecodeError, ValueError, IndexError, RecursionError) as error:
        raise TraceInvalid(f"{path} is not a valid trace: {error}") from error
    return Trace(path, header, file, sketches)


def _read_sketches(file: TensorFile) -> list[Sketch | None]:
    keys = {part: f"{_SKETCHES}/{part}" for part in _SKETCH_WIDTHS}
    if missing := [key for key in keys.values() if key not in file.spans]:
        raise ValueError(f"it has no {missing[0]}")
    rows = file.spans[keys["shapes"]].shape[:1]
    for part, width in _SKETCH_WIDTHS.items():
        if file.spans[keys[part]].shape != (*rows, width):
            raise ValueError(f"{keys[part]} has another shape than sketches have")
    return unstack_sketches({part: file.read(key) for part, key in keys.items()})


def _require_consistent(header: TraceHeader, spans: Mapping[str, Span], *, rows: int) -> None:
    """Raise ValueError if the header describes tensors that the file does not have."""
    if {"inputs/input_ids", "inputs/attention_mask"} - spans.keys():
        raise ValueError("it does not have the inputs")
    for call in header.calls:
        for tensor in (*call.inputs, *call.outputs):
            span = spans.get(tensor.key) if tensor.key is not None else None
            if tensor.key is not None and (span is None or span.shape != tensor.shape):
                raise ValueError(f"{call.module} has a tensor that the file does not have")
            if tensor.sketch is not None and tensor.sketch >= rows:
                raise ValueError(f"{call.module} has a sketch that the file does not have")


def write_trace(
    target: Path,
    model: torch.nn.Module,
    run: Callable[[], object],
    *,
    header: TraceHeader,
    inputs: CaseInputs,
    twin_outputs: TwinOutputs = lambda _module, _output: {},
) -> TraceHeader:
    """Call `run` with every module of `model` watched, and write the trace, whole or not at all.

    Return the header, which is given without calls, with the calls. Raises SnapError if the file
    cannot be written.
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
            self._keep(tensor, f"{_SKETCHES}/{name}")
        self._file.close()
        numbered, run = [], 0
        for call in self._calls:
            numbered.append(msgspec.structs.replace(call, run=run))
            # A pass through the model ends with the module that finishes last of all.
            run += call.module == self._calls[-1].module
        header = msgspec.structs.replace(self._header, calls=tuple(numbered))
        text = msgspec.json.encode(header).decode()
        write_file(self._partial, self._spans, metadata={_METADATA_KEY: text})
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

"""A trace: the inputs and outputs of every module, in order, in one safetensors file.

The file's metadata describes it, as JSON. The schema is these classes; docs/traces.md explains it.
Tensors up to a size are kept whole, and a sketch of larger ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from snapshot_tool.base.errors import TraceInvalid
from snapshot_tool.base.protocol import CaseInputs
from snapshot_tool.base.taps import MAX_DIMENSIONS, MOMENTS, PROJECTION_SIZE, SAMPLE_SIZE, Sketch
from snapshot_tool.goldens.manifest import Count, Digest, RelativePath
from snapshot_tool.goldens.parts import unstack_sketches
from snapshot_tool.goldens.tensors import Span, TensorFile, open_tensors, read_metadata

if TYPE_CHECKING:
    import torch

SCHEMA = "snap-trace/1"
METADATA_KEY = "snap-trace"
SKETCHES = "sketches"
INPUT_NAMES = tuple(field.name for field in fields(CaseInputs))
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
        return CaseInputs(**{name: self._file.read(f"inputs/{name}") for name in names})


def open_trace(path: Path) -> Trace:
    """Open a trace; raise TraceInvalid, or GoldenDamaged if the file itself is damaged."""
    file, metadata = open_tensors(path), read_metadata(path)
    if METADATA_KEY not in metadata:
        raise TraceInvalid(f"{path} is not a trace", "make one with snap trace")
    try:
        header = msgspec.json.decode(metadata[METADATA_KEY], type=TraceHeader)
        if header.schema != SCHEMA:
            raise TraceInvalid(f"{path} has schema {header.schema}, this snap reads {SCHEMA}")
        sketches = _read_sketches(file)
        _require_consistent(header, file.spans, rows=len(sketches))
    except (msgspec.DecodeError, ValueError, IndexError, RecursionError) as error:
        raise TraceInvalid(f"{path} is not a valid trace: {error}") from error
    return Trace(path, header, file, sketches)


def _read_sketches(file: TensorFile) -> list[Sketch | None]:
    keys = {part: f"{SKETCHES}/{part}" for part in _SKETCH_WIDTHS}
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

"""A trace: what every module was given and returned, in order, in one safetensors file.

The file says what it holds in its metadata, as JSON; the schema is these classes and docs/traces.md
explains it. Tensors up to a size are kept whole, of larger ones a sketch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from snapshot_tool.base.errors import TraceInvalid
from snapshot_tool.base.memory import tensor_bytes
from snapshot_tool.base.protocol import CaseInputs
from snapshot_tool.base.taps import MAX_DIMENSIONS, MOMENTS, PROJECTION_SIZE, SAMPLE_SIZE, Sketch
from snapshot_tool.goldens.manifest import Count, Digest, RelativePath
from snapshot_tool.goldens.parts import stack_sketches, unstack_sketches
from snapshot_tool.goldens.tensors import TORCH_DTYPES, Span, read_header, read_metadata, write_file
from snapshot_tool.goldens.transaction import sync_folder

if TYPE_CHECKING:
    import torch

SCHEMA = "snap-trace/1"
_KEY = "snap-trace"
_SKETCHES = "sketches"
_INPUTS = tuple(field.name for field in fields(CaseInputs))
_LETTERS = {name: letters for letters, name in TORCH_DTYPES.items()}


class TracedTensor(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """One tensor that a module was given or returned.

    Args:
        name: its place: "0" and so on, or an argument's name; "0.1" inside the first one.
        shape: without padding, see docs/traces.md.
        dtype: torch's name of it.
        key: the file's key of the whole tensor; None where it is not kept whole.
        sketch: the row of its sketch; None where it has none.
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
    """What a trace says of itself; `calls` are in the order in which modules finished."""

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


class TraceWriter:
    """Writes a trace as it comes: whole tensors go to the disk at once, whatever their number.

    Nothing is at `target` until `finish`; `discard` takes back what was written.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._data = target.with_name(f".{target.name}.data")
        self._partial = target.with_name(f".{target.name}.partial")
        self._file = self._data.open("wb")
        self._spans: list[tuple[str, Span]] = []
        self._sketches: list[Sketch] = []

    def keep(self, tensor: torch.Tensor, *, key: str | None = None) -> str | None:
        """Write a whole tensor and return its key; None for a dtype that the format lacks."""
        letters = _LETTERS.get(str(tensor.dtype).removeprefix("torch."))
        if letters is None:
            return None
        key = key or f"tensors/{len(self._spans):06d}"
        start = self._file.tell()
        self._file.write(tensor_bytes(tensor))
        self._spans.append((key, Span(letters, tuple(tensor.shape), start, self._file.tell())))
        return key

    def sketch(self, sketch: Sketch) -> int:
        """Keep a sketch and return its row."""
        self._sketches.append(sketch)
        return len(self._sketches) - 1

    def finish(self, header: TraceHeader, inputs: CaseInputs) -> None:
        """Put the whole trace at its target, in one step."""
        for name in _INPUTS:
            tensor = getattr(inputs, name)
            if tensor is not None:
                self.keep(tensor, key=f"inputs/{name}")
        for name, tensor in stack_sketches(self._sketches).items():
            self.keep(tensor, key=f"{_SKETCHES}/{name}")
        self._file.close()
        sources = [(key, self._data, span) for key, span in self._spans]
        text = msgspec.json.encode(header).decode()
        write_file(self._partial, sources, metadata={_KEY: text})
        self._partial.replace(self._target)
        sync_folder(self._target.parent)
        self.discard()

    def discard(self) -> None:
        """Remove what was written besides the target."""
        self._file.close()
        self._data.unlink(missing_ok=True)
        self._partial.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace, opened for reading: a tensor is read when it is asked for."""

    path: Path
    header: TraceHeader
    _sketches: Sequence[Sketch | None]
    _handles: list[Any] = field(default_factory=list, repr=False, compare=False)

    def whole(self, tensor: TracedTensor) -> torch.Tensor | None:
        """Return a tensor that is kept whole, or None."""
        return None if tensor.key is None else self._read(tensor.key)

    def sketch(self, tensor: TracedTensor) -> Sketch | None:
        """Return a tensor's sketch where that is what is kept of it, or None."""
        return None if tensor.sketch is None else self._sketches[tensor.sketch]

    def inputs(self) -> CaseInputs:
        """Return what the model was given."""
        keys = read_header(self.path)
        found = {name: self._read(f"inputs/{name}") for name in _INPUTS if f"inputs/{name}" in keys}
        return CaseInputs(**found)

    def _read(self, key: str) -> torch.Tensor:
        return read_tensors(self.path, [key], handles=self._handles)[key]


def open_trace(path: Path) -> Trace:
    """Open a trace; raise TraceInvalid, or GoldenDamaged where the file itself is damaged."""
    spans, metadata = read_header(path), read_metadata(path)
    if _KEY not in metadata:
        raise TraceInvalid(f"{path} is no trace", "make one with snap trace")
    try:
        header = msgspec.json.decode(metadata[_KEY], type=TraceHeader)
        if header.schema != SCHEMA:
            raise TraceInvalid(f"{path} has schema {header.schema}, this snap reads {SCHEMA}")
        sketches = _read_sketches(path, spans)
        _require_consistent(header, spans, rows=len(sketches))
    except (msgspec.DecodeError, ValueError, IndexError, RecursionError) as error:
        raise TraceInvalid(f"{path} is no valid trace: {error}") from error
    return Trace(path, header, sketches)


def _read_sketches(path: Path, spans: Mapping[str, Span]) -> list[Sketch | None]:
    names = ("shapes", "moments", "sample", "projection")
    keys = [f"{_SKETCHES}/{name}" for name in names]
    if missing := [key for key in keys if key not in spans or not spans[key].shape]:
        raise ValueError(f"it has no {missing[0]}")
    rows = spans[keys[0]].shape[0]
    widths = (MAX_DIMENSIONS, len(MOMENTS), SAMPLE_SIZE, PROJECTION_SIZE)
    for key, width in zip(keys, widths, strict=True):
        if spans[key].shape != (rows, width):
            raise ValueError(f"{key} has another shape than sketches have")
    tensors = read_tensors(path, keys)
    return unstack_sketches({name: tensors[f"{_SKETCHES}/{name}"] for name in names})


def _require_consistent(header: TraceHeader, spans: Mapping[str, Span], *, rows: int) -> None:
    """Raise ValueError where the header speaks of what the file does not hold."""
    if {"inputs/input_ids", "inputs/attention_mask"} - spans.keys():
        raise ValueError("it does not hold the inputs")
    for call in header.calls:
        for tensor in (*call.inputs, *call.outputs):
            span = spans.get(tensor.key) if tensor.key is not None else None
            if tensor.key is not None and (span is None or span.shape != tensor.shape):
                raise ValueError(f"{call.module} has a tensor that the file does not hold")
            if tensor.sketch is not None and tensor.sketch >= rows:
                raise ValueError(f"{call.module} has a sketch that the file does not hold")


def read_tensors(
    path: Path, keys: Sequence[str], *, handles: list[Any] | None = None
) -> dict[str, torch.Tensor]:
    """Return tensors of a safetensors file; `handles` keeps the file open for a next call."""
    from safetensors import SafetensorError, safe_open

    handles = [] if handles is None else handles
    try:
        if not handles:
            handles.append(safe_open(path, framework="pt"))
        return {key: handles[0].get_tensor(key) for key in keys}
    except (SafetensorError, OSError, KeyError) as error:
        raise TraceInvalid(f"{path} cannot be read: {error}") from error

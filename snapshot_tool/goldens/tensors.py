"""safetensors files without torch: headers, digests, and joining many small files into one.

The format (https://huggingface.co/docs/safetensors): eight bytes of header length, a JSON header of
dtype, shape and data offsets for each key, then the data without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from snapshot_tool.base.errors import GoldenDamaged
from snapshot_tool.base.files import file_size, open_plain, require_bounded_json
from snapshot_tool.goldens.manifest import DtypeLetters, FileEntry, TensorEntry

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

# The format's dtypes: torch's name and bytes of an element.
_DTYPES: dict[DtypeLetters, tuple[str, int]] = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "I16": ("int16", 2), "U16": ("uint16", 2), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I32": ("int32", 4), "U32": ("uint32", 4), "F32": ("float32", 4),
    "I64": ("int64", 8), "U64": ("uint64", 8), "F64": ("float64", 8),
}  # fmt: skip
TORCH_DTYPES: dict[DtypeLetters, str] = {letters: name for letters, (name, _) in _DTYPES.items()}
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
_BLOCK = 2**20
_Natural = Annotated[int, msgspec.Meta(ge=0)]


# gc=False: a header may have a million tensors.
class Span(msgspec.Struct, frozen=True, gc=False):
    """One tensor's place in a file: dtype letters, shape, and the bytes from start to end."""

    dtype: DtypeLetters
    shape: tuple[int, ...]
    start: int
    end: int


class _Fields(msgspec.Struct, frozen=True, gc=False):
    """The header's fields of one tensor."""

    dtype: DtypeLetters
    shape: tuple[_Natural, ...]
    data_offsets: tuple[_Natural, _Natural]


def read_header(path: Path) -> dict[str, Span]:
    """Return each tensor's place in a safetensors file; raise GoldenDamaged if it is not valid."""
    with open_plain(path) as file:
        return _read_header(file, path)[0]


def _read_header(file: BufferedReader, path: Path) -> tuple[dict[str, Span], dict[str, str]]:
    """Return the spans and the metadata of an open file, from its start."""
    size = file_size(file)
    try:
        prefix = file.read(_LENGTH.size)
        length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else size
        if length > size - _LENGTH.size:
            raise ValueError("it is cut short")
        if length > _MAX_HEADER:
            raise ValueError(f"its header claims {length} bytes")
        text = require_bounded_json(file.read(length)).decode()
        header = json.loads(text, object_pairs_hook=_unique)
        metadata = msgspec.convert(header.pop(_METADATA, {}), dict[str, str])
        fields = msgspec.convert(header, dict[str, _Fields])
        return _spans(fields, first=_LENGTH.size + length, size=size), metadata
    except OSError as error:
        raise GoldenDamaged(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise GoldenDamaged(f"{path} is not a valid safetensors file: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header names a tensor or a field twice")
    return found


def _spans(header: Mapping[str, _Fields], *, first: int, size: int) -> dict[str, Span]:
    """Return each tensor's span; raise ValueError unless they fill the file without gaps.

    first: the place of the first byte after the header.
    """
    end = first
    for key, fields in sorted(header.items(), key=lambda item: item[1].data_offsets):
        length = _DTYPES[fields.dtype][1] * math.prod(fields.shape)
        if fields.data_offsets != (end - first, end - first + length):
            raise ValueError(f"the place of {key} does not fit its shape")
        end += length
    if end != size:
        raise ValueError("it is cut short" if end > size else "it has bytes that no tensor owns")
    return {
        key: Span(f.dtype, f.shape, *(first + offset for offset in f.data_offsets))
        for key, f in header.items()
    }


def describe_file(path: Path) -> FileEntry:
    """Return a safetensors file's manifest entry, digests included."""
    opened = open_tensors(path)
    with opened.file:
        return opened.describe()


def open_tensors(path: Path, *, size: int | None = None) -> TensorFile:
    """Open a safetensors file; raise GoldenDamaged if it is not a valid one.

    size: in bytes, as recorded; None: any.
    """
    file = open_plain(path)
    if size is not None and file_size(file) != size:
        raise GoldenDamaged(f"{path} has {file_size(file)} bytes, recorded were {size}")
    return TensorFile(path, file, *_read_header(file, path))


@dataclass(frozen=True, slots=True)
class TensorFile:
    """An open safetensors file: reading continues to see this file if another takes its name.

    A tensor is read into memory of its own. Pages of a mapped file would stay in memory beside it.
    """

    path: Path
    file: BufferedReader
    spans: Mapping[str, Span]
    metadata: Mapping[str, str]

    def describe(self) -> FileEntry:
        """Return the file's manifest entry: one pass feeds the digests of file and tensors."""
        whole, tensors = hashlib.sha256(), {}
        ordered = sorted(self.spans.items(), key=lambda item: (item[1].start, item[1].end))
        first = ordered[0][1].start if ordered else file_size(self.file)
        for block in _blocks(self.file, self.path, 0, first):
            whole.update(block)
        for key, span in ordered:  # tensors follow each other without gaps
            own = hashlib.sha256()
            for block in _blocks(self.file, self.path, span.start, span.end):
                own.update(block)
                whole.update(block)
            tensors[key] = TensorEntry(shape=span.shape, dtype=span.dtype, sha256=own.hexdigest())
        return FileEntry(
            size=file_size(self.file),
            sha256=whole.hexdigest(),
            tensors=dict(sorted(tensors.items())),
        )

    def read(self, key: str) -> torch.Tensor:
        """Return a tensor; raise GoldenDamaged if it is missing or cannot be read."""
        import torch

        memory, span = self.read_bytes(key), self.spans[key]
        dtype = getattr(torch, TORCH_DTYPES[span.dtype])
        if not len(memory):
            return torch.empty(span.shape, dtype=dtype)
        # The format's bytes are those of memory: little-endian, the last dimension first.
        return torch.from_numpy(memory).view(dtype).reshape(span.shape)

    def read_bytes(self, key: str) -> NDArray[np.uint8]:
        """Return a tensor's bytes, (bytes,); raise GoldenDamaged as `read` does."""
        import numpy as np

        if key not in self.spans:
            raise GoldenDamaged(f"{self.path} has no {key}")
        span = self.spans[key]
        # numpy's memory: torch fills its own if algorithms are to be deterministic.
        memory = np.empty(span.end - span.start, np.uint8)
        left, start = memory.data, span.start
        try:
            while left and (count := os.preadv(self.file.fileno(), [left], start)):
                left, start = left[count:], start + count
        except OSError as error:
            raise GoldenDamaged(f"{self.path} cannot be read: {error.strerror}") from error
        if left:
            raise GoldenDamaged(f"{self.path} is cut short")
        return memory


def _blocks(file: BufferedReader, path: Path, start: int, end: int) -> Iterable[bytes]:
    while start < end:
        # pread, since forked processes share the file's position.
        block = os.pread(file.fileno(), min(_BLOCK, end - start), start)
        if not block:
            raise GoldenDamaged(f"{path} is cut short")
        start += len(block)
        yield block


def join_files(parts: Mapping[str, Path], target: Path) -> None:
    """Write one safetensors file whose keys are `<prefix>/<key>` of the parts, by prefix.

    One block of data is in memory at a time. The same parts give the same bytes.
    """
    sources = []
    for prefix, path in parts.items():
        sources += [(f"{prefix}/{key}", path, span) for key, span in read_header(path).items()]
    write_file(target, sources)


def write_file(
    target: Path,
    sources: Iterable[tuple[str, Path, Span]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file of tensors that lie in other files, block by block.

    metadata: one string at most, since safetensors' own order of several is another every time.
    """
    # Wide types first, so that every tensor is aligned for its dtype, as safetensors itself does.
    ordered = sorted(sources, key=lambda source: (-_DTYPES[source[2].dtype][1], source[0]))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for key, _, span in ordered:
        end = offset + span.end - span.start
        header[key] = {"dtype": span.dtype, "shape": span.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(_LENGTH.pack(len(text)) + text)
        for _, path, span in ordered:
            with open_plain(path) as part:
                for block in _blocks(part, path, span.start, span.end):
                    file.write(block)
        file.flush()
        os.fsync(file.fileno())

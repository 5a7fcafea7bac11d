"""Keeping what an FMS model's image encoder returned: no phase of a case encodes a tile again.

Vision, forward and generate all give the encoder the golden's tiles, and at the true shape nearly
all the time of a check is spent there. What is returned from the cache was computed on the same
input, bit for bit, by the same call; all code around the encoder runs in every phase.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from snapshot_tool.base.memory import fingerprint

Forward = Callable[..., Any]
Call = tuple[Sequence[Any], Mapping[str, Any]]

_CHUNK = 2**20  # elements of the tiles that an encoder is given at once: one tile of 512 x 512


@dataclass(slots=True)
class OutputCache:
    """What an encoder returned, for the case at hand.

    Args:
        encoder: the module that encodes images.
        tiles_apart: whether it takes (tiles, channels, height, width) and computes each tile by
            itself: large tiles then go through it a few at a time, which bounds memory.
    """

    encoder: torch.nn.Module
    tiles_apart: bool = False
    _outputs: dict[str, Any] = field(default_factory=dict)
    _case: str = ""
    _active: bool = False
    _installed: bool = False

    @contextmanager
    def serving(self, case: str) -> Iterator[None]:
        """Let the encoder answer from the cache inside the block; another case empties it."""
        if case != self._case:
            self._case = case
            self._outputs.clear()
        self._install()
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def _install(self) -> None:
        """Put the cache before the encoder's forward, once: torch.compile compiles it only once."""
        if self._installed:
            return
        compute = self.encoder.forward
        self.encoder.forward = lambda *given, **options: self._forward(compute, given, options)
        self._installed = True

    def _forward(self, compute: Forward, given: Sequence[Any], options: Mapping[str, Any]) -> Any:
        # Digests cannot be traced into a graph: a compiled encoder computes.
        if torch.compiler.is_compiling() or not self._active:
            return compute(*given, **options)
        call = inspect.signature(compute).bind(*given, **options)
        # A default that is passed and one that is not are the same call.
        call.apply_defaults()
        chunks = self._chunks(call)
        if len(chunks) > 1:
            outputs = [self._output(compute, chunk) for chunk in chunks]
            if all(map(_has_batch, outputs)):
                return _joined(outputs)  # a copy
        return _copied(self._output(compute, (call.args, call.kwargs)))

    def _chunks(self, call: inspect.BoundArguments) -> list[Call]:
        """Return the call in calls for a few tiles each, or the call alone if it has one part.

        Tensors besides the tiles, such as a patch mask, are split with them.
        """
        whole = [(call.args, call.kwargs)]
        given = [
            value for value in _flat([call.args, call.kwargs]) if isinstance(value, torch.Tensor)
        ]
        if not self.tiles_apart or not given or any(len(t.shape) == 0 for t in given):
            return whole
        count = len(given[0])
        size = max(1, _CHUNK // max(1, given[0][:1].numel()))
        if count <= size or any(len(tensor) != count for tensor in given):
            return whole
        return [
            _sliced((call.args, call.kwargs), slice(start, start + size))
            for start in range(0, count, size)
        ]

    def _output(self, compute: Forward, call: Call) -> Any:
        """Return what the encoder makes of a call; it must not be changed."""
        args, options = call
        key = _digest([args, options])
        if key not in self._outputs:
            output = compute(*args, **options)
            if not _is_plain(output):
                return output
            self._outputs[key] = output
        return self._outputs[key]


def _sliced(value: Any, rows: slice) -> Any:
    """Return some rows of every tensor in lists, tuples and mappings."""
    if isinstance(value, torch.Tensor):
        return value[rows]
    if isinstance(value, Mapping):
        return {name: _sliced(part, rows) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_sliced(part, rows) for part in value)
    return value


def _digest(value: Any) -> str:
    """Return what is equal for values that a module cannot tell apart, and for no others."""
    return fingerprint("\n".join(map(_described, _flat(value))).encode())


def _described(part: Any) -> str:
    if not isinstance(part, torch.Tensor):
        return repr(part)
    return f"{part.dtype} {part.shape} {part.stride()} {part.device} {fingerprint(part)}"


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for name in sorted(value):
            yield name
            yield from _flat(value[name])
    elif isinstance(value, list | tuple):
        yield len(value)
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _is_plain(output: Any) -> bool:
    """Tell whether an output is tensors in lists and tuples, which can be copied."""
    if type(output) in (list, tuple):
        return all(map(_is_plain, output))
    return output is None or isinstance(output, torch.Tensor)


def _has_batch(output: Any) -> bool:
    """Tell whether an output can be joined with others: plain, and no tensor a number."""
    tensors = [part for part in _flat(output) if isinstance(part, torch.Tensor)]
    return _is_plain(output) and all(tensor.ndim for tensor in tensors)


def _copied(output: Any) -> Any:
    """Return an output in memory of its own, laid out as it was."""
    if isinstance(output, torch.Tensor):
        return output.clone()
    if isinstance(output, list | tuple):
        return type(output)(_copied(part) for part in output)
    return output


def _joined(outputs: Sequence[Any]) -> Any:
    """Return plain outputs for parts of a batch as one for the whole."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return _cat(outputs)
    if isinstance(first, list | tuple):
        return type(first)(_joined(parts) for parts in zip(*outputs, strict=True))
    return None


def _cat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return torch.cat of the parts, laid out in memory as they are.

    FMS's encoder returns a transposed view. A port that views it as contiguous raises, and must
    raise here, too.
    """
    strides = parts[0].stride()
    # Of a single tile the first one says nothing: tiles mostly follow each other.
    order = sorted(range(len(strides)), key=lambda d: (d > 0 or len(parts[0]) > 1, -strides[d]))
    joined = torch.cat([part.permute(order) for part in parts], dim=order.index(0))
    return joined.permute([order.index(d) for d in range(len(order))])

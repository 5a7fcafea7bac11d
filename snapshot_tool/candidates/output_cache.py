"""Keep the outputs of an FMS model's image encoder: no phase of a case encodes a tile again.

Vision, forward and generate all encode the golden's tiles, and at the true shape a check spends
nearly all its time there. What the cache returns was computed by the same call on the same input,
bit for bit. All code around the encoder runs in every phase.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from snapshot_tool.numerics.compare import fingerprint

Call = tuple[Sequence[Any], Mapping[str, Any]]

_CHUNK = 2**20  # elements of the tiles that are encoded at once: one tile of 512 x 512


class OutputCache:
    """The encoder's outputs for the case at hand.

    Args:
        encoder: the module that encodes images. Its forward is replaced once, so that torch.compile
            compiles it only once; outside of `for_case` it computes.
        tiles_apart: whether it takes (tiles, channels, height, width) and computes each tile by
            itself. Large tiles are then encoded a few at a time, which bounds memory.
    """

    def __init__(self, encoder: torch.nn.Module, *, tiles_apart: bool = False) -> None:
        self._compute = encoder.forward
        self._tiles_apart = tiles_apart
        self._outputs: dict[tuple[str, ...], Any] = {}
        self._case = ""
        self._active = False
        encoder.forward = self._forward

    @contextmanager
    def for_case(self, case: str) -> Iterator[None]:
        """Let the encoder return known outputs inside the block; another case empties the cache."""
        if case != self._case:
            self._case = case
            self._outputs.clear()
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def _forward(self, *given: Any, **options: Any) -> Any:
        # Digests cannot be traced into a graph: a compiled encoder computes.
        if torch.compiler.is_compiling() or not self._active:
            return self._compute(*given, **options)
        call = inspect.signature(self._compute).bind(*given, **options)
        # A default that is passed and one that is not are the same call.
        call.apply_defaults()
        whole = (call.args, call.kwargs)
        parts = self._split(whole)
        if len(parts) > 1:
            outputs = [self._output(part) for part in parts]
            if all(map(_can_be_joined, outputs)):
                return _map_tensors(_concatenate, *outputs)
        output = self._output(whole)
        return _map_tensors(torch.clone, output) if _is_plain(output) else output

    def _split(self, call: Call) -> list[Call]:
        """Return the call as calls for a few tiles each, or alone if it cannot be split.

        Tensors besides the tiles, such as a patch mask, are split with them.
        """
        given = [value for value in _flat(call) if isinstance(value, torch.Tensor)]
        if not self._tiles_apart or not given or any(tensor.ndim == 0 for tensor in given):
            return [call]
        count = len(given[0])
        if any(len(tensor) != count for tensor in given):
            return [call]
        size = max(1, _CHUNK // max(1, given[0][:1].numel()))

        def part(start: int) -> Call:
            sliced: Call = _map_tensors(lambda tensor: tensor[start : start + size], call)
            return sliced

        return [part(start) for start in range(0, count, size)] or [call]

    def _output(self, call: Call) -> Any:
        """Return what the encoder returns; the caller must not change it."""
        key = tuple(map(_description, _flat(call)))
        if key in self._outputs:
            return self._outputs[key]
        args, options = call
        output = self._compute(*args, **options)
        if _is_plain(output):
            self._outputs[key] = output
        return output


def _map_tensors(function: Callable[..., torch.Tensor], *values: Any) -> Any:
    """Return values of one structure as one, with the function's result for each tensor of it."""
    first = values[0]
    if isinstance(first, torch.Tensor):
        return function(*values)
    if isinstance(first, Mapping):
        return {n: _map_tensors(function, *(value[n] for value in values)) for n in first}
    if isinstance(first, list | tuple):
        parts = zip(*values, strict=True)
        return type(first)(_map_tensors(function, *part) for part in parts)
    return first


def _description(part: Any) -> str:
    """Return a text that is equal only for values that a module cannot tell apart."""
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
    """Return whether an output is tensors in lists and tuples, which can be copied."""
    if type(output) in (list, tuple):
        return all(map(_is_plain, output))
    return output is None or isinstance(output, torch.Tensor)


def _can_be_joined(output: Any) -> bool:
    """Return whether an output is plain and every tensor in it has a batch dimension."""
    tensors = [part for part in _flat(output) if isinstance(part, torch.Tensor)]
    return _is_plain(output) and all(tensor.ndim for tensor in tensors)


def _concatenate(*parts: torch.Tensor) -> torch.Tensor:
    """Return torch.cat of the parts, in their memory layout.

    FMS's encoder returns a transposed view. A port that views it as contiguous raises, and must
    raise here, too.
    """
    strides = parts[0].stride()
    # The stride of a single tile's first dimension says nothing: tiles mostly follow each other.
    order = sorted(range(len(strides)), key=lambda d: (d > 0 or len(parts[0]) > 1, -strides[d]))
    joined = torch.cat([part.permute(order) for part in parts], dim=order.index(0))
    return joined.permute([order.index(d) for d in range(len(order))])

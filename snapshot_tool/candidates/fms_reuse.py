"""Serving between phases what an FMS model has computed: no module works twice on one input.

The phases of a case overlap. The encoder is given the golden's tiles by vision, forward and
generate alike, and generation begins with the pass that forward was. Served is only what was
computed on the same input, bit for bit, by the same call: whatever a port does before and after it
runs each time.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from snapshot_tool.memory import fingerprint

Forward = Callable[..., Any]

_KEPT = 2**28  # bytes of the encoder's answers: 80 tiles of SmolVLM
_CHUNK = 2**20  # elements of the tiles that an encoder is given at once: one tile of 512 x 512


@dataclass(slots=True)
class Reuse:
    """What an FMS model's encoder and decoder have computed, and how it is served.

    Args:
        encoder: the module that encodes images, if there is one.
        decoder: the module that the generation loop calls, if there is one. It answers with logits,
            and with (logits, cache) when it is called with use_cache.
        tiles_apart: whether the encoder takes (tiles, channels, height, width) and knows no
            neighbours: large tiles then go through it a few at a time, which bounds memory.
    """

    encoder: torch.nn.Module | None
    decoder: torch.nn.Module | None
    tiles_apart: bool = False
    _encoded: _Answers = field(default_factory=lambda: _Answers(_KEPT))
    _prefill: tuple[str, Any] | None = None
    _case: str = ""

    @contextmanager
    def serving(self, case: str, *, prefill: bool) -> Iterator[None]:
        """Serve inside the block; `prefill` says whether forward keeps its cache for generate.

        What neither this case nor the one before it asked for is forgotten.
        """
        if case != self._case:
            self._case, self._prefill = case, None
            self._encoded.forget_unasked()
        with ExitStack() as stack:
            if self.encoder is not None and not _is_compiled(self.encoder):
                stack.enter_context(_forward_by(self.encoder, self._encode))
            if self.decoder is not None and prefill and not _is_compiled(self.decoder):
                stack.enter_context(_forward_by(self.decoder, self._decode))
            yield

    def _encode(self, compute: Forward, given: Sequence[Any], options: Mapping[str, Any]) -> Any:
        chunks = self._chunks(given, options)
        if len(chunks) > 1:
            answers = [self._encoded.ask(compute, (chunk,), options) for chunk in chunks]
            if all(map(_has_batch, answers)):
                return _joined(answers)  # a copy
        return _copied(self._encoded.ask(compute, given, options))

    def _chunks(self, given: Sequence[Any], options: Mapping[str, Any]) -> Sequence[Any]:
        """Return the tiles in parts; nothing where they cannot be parted."""
        if not self.tiles_apart or len(given) != 1 or any(map(torch.is_tensor, options.values())):
            return ()
        tiles: torch.Tensor = given[0]
        return torch.split(tiles, max(1, _CHUNK // max(1, tiles[:1].numel())))

    def _decode(self, compute: Forward, given: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Run a prompt with its cache, whether it is asked for or not, and serve both once."""
        arguments = inspect.signature(compute).bind(*given, **options).arguments
        extra = arguments.pop("attn_kwargs", {})
        asked = {k: v for k, v in {**arguments, **extra}.items() if v is not None}
        with_cache = bool(asked.pop("use_cache", False))
        if asked.get("past_key_value_states"):
            return compute(*given, **options)
        question = _digest(asked)
        if with_cache:
            kept, self._prefill = self._prefill, None
            return kept[1] if kept and kept[0] == question else compute(*given, **options)
        logits, cache = compute(**{**asked, "use_cache": True})
        # No copy: forward has been judged when generate is given them.
        self._prefill = (question, (logits, cache))
        return logits


class _Answers:
    """Answers by their question, the least recently used forgotten beyond `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._asked: set[str] = set()

    def forget_unasked(self) -> None:
        """Keep only what was asked for since the last time."""
        for question in self._kept.keys() - self._asked:
            self._forget(question)
        self._asked.clear()

    def _forget(self, question: str) -> None:
        self._bytes -= sum(tensor.nbytes for tensor in _tensors(self._kept.pop(question)))

    def ask(self, compute: Forward, given: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Return the answer, computed unless it is known; it is kept, and must not be changed."""
        question = _digest([list(given), dict(options)])
        self._asked.add(question)
        if question in self._kept:
            self._kept.move_to_end(question)
            return self._kept[question]
        answer = compute(*given, **options)
        size = sum(tensor.nbytes for tensor in _tensors(answer))
        if size <= self._limit and _is_plain(answer):
            self._kept[question] = answer
            self._bytes += size
        while self._bytes > self._limit:
            self._forget(next(iter(self._kept)))
        return answer


def _is_compiled(module: torch.nn.Module) -> bool:
    """Tell whether torch.compile traces the module's forward: digests cannot be traced."""
    return getattr(module, "_compiled_call_impl", None) is not None


@contextmanager
def _forward_by(
    module: torch.nn.Module, serve: Callable[[Forward, Sequence[Any], Mapping[str, Any]], Any]
) -> Iterator[None]:
    """Let `serve` answer in place of a module's forward, which it is given, inside the block."""
    own = module.__dict__.get("forward")
    compute = module.forward
    module.forward = lambda *given, **options: serve(compute, given, options)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


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


def _tensors(answer: Any) -> list[torch.Tensor]:
    return [part for part in _flat(answer) if isinstance(part, torch.Tensor)]


def _is_plain(answer: Any) -> bool:
    """Tell whether an answer is tensors in lists and tuples, which can be copied."""
    if type(answer) in (list, tuple):
        return all(map(_is_plain, answer))
    return answer is None or isinstance(answer, torch.Tensor)


def _has_batch(answer: Any) -> bool:
    """Tell whether an answer can be joined with others: plain, and no tensor a number."""
    return _is_plain(answer) and all(tensor.ndim for tensor in _tensors(answer))


def _copied(answer: Any) -> Any:
    """Return an answer in memory of its own, laid out as it was."""
    if isinstance(answer, torch.Tensor):
        return answer.clone()
    if isinstance(answer, list | tuple):
        return type(answer)(_copied(part) for part in answer)
    return answer


def _joined(answers: Sequence[Any]) -> Any:
    """Return plain answers for parts of a batch as one for the whole."""
    first = answers[0]
    if isinstance(first, torch.Tensor):
        return _cat(answers)
    if isinstance(first, list | tuple):
        return type(first)(_joined(parts) for parts in zip(*answers, strict=True))
    return None


def _cat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return torch.cat of the parts, laid out in memory as they are.

    FMS's encoder answers with a transposed view. A port that takes it for another raises, and is to
    raise here; and its bytes are copied in a quarter of the time.
    """
    strides = parts[0].stride()
    # Of a single tile the first one says nothing: tiles mostly follow each other.
    order = sorted(range(len(strides)), key=lambda d: (d > 0 or len(parts[0]) > 1, -strides[d]))
    joined = torch.cat([part.permute(order) for part in parts], dim=order.index(0))
    return joined.permute([order.index(d) for d in range(len(order))])

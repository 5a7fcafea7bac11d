"""The real reference, asked once: the same answers in every forked process, without computing.

Recording is killed at hundreds of points; what is tried there are the writes, and what is written
are transformers' own answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from snapshot_tool import reference
from snapshot_tool.taps import sketches

Seen = tuple[Any, ...]


class Remembered:
    """Passes every call on once, and answers from memory afterwards; observers see it again."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self._answers: dict[str, tuple[Any, list[Seen]]] = {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if name.startswith("_") or not callable(value):
            return value

        def ask(*arguments: Any, **options: Any) -> Any:
            observe = options.pop("observe", None)
            key = f"{name} {_fingerprint(arguments)} {_fingerprint(options)} {observe is None}"
            if key not in self._answers:
                self._answers[key] = self._ask(value, arguments, options, observe=observe)
            elif observe is not None:
                for seen in self._answers[key][1]:
                    observe(*seen)
            answer = self._answers[key][0]
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return ask

    def _ask(
        self, method: Callable[..., Any], arguments: Any, options: Any, *, observe: Any
    ) -> tuple[Any, list[Seen]]:
        seen: list[Seen] = []

        def remember(*what: Any) -> None:
            seen.append(tuple(w.clone() if isinstance(w, torch.Tensor) else w for w in what))
            observe(*what)

        if observe is not None:
            options = {**options, "observe": remember}
        try:
            return method(*arguments, **options), seen
        except Exception as error:
            return error, seen


def _fingerprint(value: Any) -> str:
    """Return the same text for arguments that are the same to a reference."""
    if isinstance(value, torch.Tensor):
        data = value.contiguous().view(torch.uint8) if value.numel() else value
        digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()
        return f"{value.dtype} {tuple(value.shape)} {digest}"
    if isinstance(value, Image.Image):
        return f"{value.mode} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, list | tuple):
        return " ".join(_fingerprint(item) for item in value)
    if isinstance(value, dict):
        return " ".join(f"{k}={_fingerprint(v)}" for k, v in sorted(value.items()))
    fields = getattr(value, "__dataclass_fields__", None)
    if fields is not None:
        return _fingerprint({name: getattr(value, name) for name in fields})
    return repr(value)


_LOADED: dict[str, Any] = {}
_SKETCHES: dict[str, Any] = {}


def remember_references() -> None:
    """Make every recording of this process, and of those forked from it, share its references.

    Sketches are remembered as well: they are most of what is left to compute.
    """
    if _LOADED:
        return
    load, draw = reference.load_reference, vars(sketches)["sketch"]

    def sketch_remembered(tensor: torch.Tensor, *, seed: int) -> Any:
        key = f"{seed} {_fingerprint(tensor)}"
        if key not in _SKETCHES:
            _SKETCHES[key] = draw(tensor, seed=seed)
        return _SKETCHES[key]

    def load_remembered(*arguments: Any, **options: Any) -> Any:
        key = _fingerprint([str(a) for a in arguments]) + _fingerprint(options)
        if key not in _LOADED:
            _LOADED[key] = Remembered(load(*arguments, **options))
        return _LOADED[key]

    reference.load_reference = load_remembered
    setattr(sketches, "sketch", sketch_remembered)  # noqa: B010 - mypy knows its type

"""A candidate behind glass: every call is watched, and what it does besides answering is said."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef

from snapshot_tool.base.errors import PhaseUnsupported, SnapError
from snapshot_tool.base.foreign_code import foreign_code
from snapshot_tool.base.memory import fingerprint
from snapshot_tool.judge.watch import CountProducts, Watch

_BLAMED = "_raised_by_snaps_candidate"
_WHO = "the candidate"


def raised_by_candidate(error: BaseException) -> bool:
    """Tell what a guarded candidate's own code raised from what reading a golden's tensors did."""
    return bool(getattr(error, _BLAMED, False))


class Guarded:
    """Passes everything on to a candidate, and collects warnings.

    A candidate that overwrites its inputs, hands them back, or returns one buffer for every call is
    named; so is what `Watch` sees of its modules, and answers that are not the same twice.
    """

    def __init__(self, candidate: Any, *, dtype: str, settings: Mapping[str, str]) -> None:
        self._candidate = candidate
        self._warnings: dict[str, None] = {}
        self._watch = Watch(getattr(torch, dtype), settings, self._warn)
        self._first_answers: dict[str, list[_Answered]] = {}
        self._reused: set[str] = set()
        self._recorded: list[list[torch.Tensor]] | None = None
        self._replayed: Iterator[list[torch.Tensor]] | None = None
        self._products: CountProducts | None = None
        self.overwrote = False  # an input, since this was last set
        self._watch.look_at_settings()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was seen so far, each thing once."""
        return tuple(self._warnings)

    @property
    def modules_run(self) -> int:
        """How many torch modules have run so far."""
        return self._watch.modules_run

    @contextmanager
    def counting_products(self) -> Iterator[CountProducts]:
        """Count what the candidate multiplies inside the block, and nobody else."""
        self._products = CountProducts()
        try:
            yield self._products
        finally:
            self._products = None

    def record_answers(self) -> None:
        """Keep the answers from here on, to be compared with those of the same calls again."""
        self._recorded, self._replayed = [], None

    def replay_answers(self) -> None:
        """Compare the answers from here on with those that were kept."""
        self._replayed = iter(self._recorded or [])

    def forget_answers(self) -> None:
        """Keep no answers."""
        self._recorded = self._replayed = None

    def __getattr__(self, name: str) -> Any:
        with foreign_code(_WHO):
            attribute = getattr(self._candidate, name)
        if name.startswith("_") or not callable(attribute):
            return attribute
        if name == "info":
            return functools.partial(_run, attribute)
        return functools.partial(self._call, name, attribute)

    def _call(self, name: str, method: Callable[..., Any], *given: Any, **options: Any) -> Any:
        arguments = _named_arguments(method, given, options)
        inputs = dict(_tensors_in(arguments))
        before = _fingerprints(inputs, given)
        drawn = torch.get_rng_state()
        try:
            with foreign_code(_WHO), self._watch.watching(), self._products or nullcontext():
                answer = method(*given, **options)
            if isinstance(answer, Iterator):
                return _each(answer)
            if isinstance(answer, AbstractContextManager):
                return _around(answer)
            outputs = [_plain(tensor, name) for _, tensor in _tensors_in({"answer": answer})]
        except (PhaseUnsupported, SnapError):
            raise
        except Exception as error:
            setattr(error, _BLAMED, True)
            raise
        if not torch.equal(drawn, torch.get_rng_state()):
            self._warn(f"{name} drew random numbers: dropout or sampling is on")
        for label, now in _fingerprints(inputs, given).items():
            if now != before[label]:
                self.overwrote = True
                self._warn(f"{name} overwrote its input {label}")
        self._look_at_answer(name, inputs, outputs)
        copied = name in self._reused or self._recorded is not None
        return _settled(answer, copied=copied)

    def _look_at_answer(
        self, name: str, inputs: Mapping[str, torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        answered = [output for output in outputs if output.numel()]
        theirs = {_memory(output) for output in answered}
        given = {label: _memory(tensor) for label, tensor in inputs.items() if tensor.numel()}
        for label, memory in given.items():
            if memory in theirs:
                self._warn(f"{name} returned the memory of its input {label}")
        if any(output.requires_grad for output in outputs):
            self._warn(f"{name} returned a tensor that requires gradients")
        # An input may be lent twice: its memory is no buffer of the candidate's.
        own = [output for output in answered if _memory(output) not in given.values()]
        if own:
            self._look_for_reuse(name, own)
        self._compare_answers(name, outputs)

    def _look_for_reuse(self, name: str, outputs: list[torch.Tensor]) -> None:
        """Compare a method's second answer with its first: memory that is still in use twice."""
        if name not in self._first_answers:
            self._first_answers[name] = [_Answered.of(output) for output in outputs]
            return
        first, self._first_answers[name] = self._first_answers[name], []
        memory = {_memory(output) for output in outputs}
        if any(answered.memory in memory and answered.in_use for answered in first):
            self._reused.add(name)
            self._warn(f"{name} returns views of one buffer: the next call overwrites the last")

    def _compare_answers(self, name: str, outputs: list[torch.Tensor]) -> None:
        if self._recorded is None:
            return
        if self._replayed is None:
            self._recorded.append([output.clone() for output in outputs])
            return
        for before, now in zip(next(self._replayed, []), outputs, strict=False):
            if not _same(before, now):
                self._warn(f"{name} is not deterministic: {_spread(before, now)}")

    def _warn(self, text: str) -> None:
        self._warnings.setdefault(text)


def _run(function: Callable[..., Any], *given: Any) -> Any:
    with foreign_code(_WHO):
        return function(*given)


def _each(items: Iterator[Any]) -> Iterator[Any]:
    """Yield what a candidate yields, its code run as foreign code."""
    end = object()
    while (item := _run(next, items, end)) is not end:
        yield item


@contextmanager
def _around(context: AbstractContextManager[Any]) -> Iterator[Any]:
    """Enter and leave a candidate's context, its code run as foreign code."""
    value = _run(context.__enter__)
    try:
        yield value
    except BaseException as error:
        if not _run(context.__exit__, type(error), error, error.__traceback__):
            raise
    else:
        _run(context.__exit__, None, None, None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Answered:
    """Where an answer lay, without keeping it there: logits take hundreds of megabytes.

    Memory that is not torch's own (NumPy's, say) is kept: nobody else can tell whether it is free.
    """

    memory: tuple[str, int]
    holder: StorageWeakRef | torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Answered:
        storage = tensor.untyped_storage()
        own = storage.resizable()
        return cls(_memory(tensor), StorageWeakRef(storage) if own else tensor)  # type: ignore[no-untyped-call]

    @property
    def in_use(self) -> bool:
        """Whether the memory was not given back meanwhile."""
        if isinstance(self.holder, torch.Tensor):
            return True
        return not self.holder.expired()  # type: ignore[no-untyped-call]


def _named_arguments(
    method: Callable[..., Any], given: tuple[Any, ...], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return arguments under the names that the candidate's own method gives them."""
    try:
        return inspect.signature(method).bind(*given, **options).arguments
    except (TypeError, ValueError):
        return {**{f"argument {i}": value for i, value in enumerate(given, 1)}, **options}


def _tensors_in(values: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors among named values, those in records and mappings by their own names."""
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _tensors_in(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.fields(value)
            yield from _tensors_in({field.name: getattr(value, field.name) for field in fields})


def _images_in(given: tuple[Any, ...]) -> Iterator[tuple[str, Image.Image]]:
    for value in given:
        if isinstance(value, list | tuple):
            for index, image in enumerate(value):
                if isinstance(image, Image.Image):
                    yield f"image {index}", image


def _fingerprints(inputs: Mapping[str, torch.Tensor], given: tuple[Any, ...]) -> dict[str, str]:
    """Return what changes where an input is written to; a copy would take its memory again."""
    found = {label: fingerprint(tensor) for label, tensor in inputs.items()}
    return found | {label: fingerprint(image.tobytes()) for label, image in _images_in(given)}


def _plain(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return a tensor that has its elements in memory; raise TypeError for any other kind."""
    if tensor.is_meta or tensor.is_quantized or tensor.is_nested or tensor.is_complex():
        raise TypeError(f"{name} returned a tensor without plain elements: {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} returned a {tensor.layout} tensor, not a dense one")
    return tensor


def _settled(answer: Any, *, copied: bool) -> Any:
    """Return an answer without its gradients and, where its memory is used again, as a copy."""
    if isinstance(answer, torch.Tensor):
        return answer.detach().clone() if copied else answer.detach()
    if isinstance(answer, Mapping):
        return {name: _settled(value, copied=copied) for name, value in answer.items()}
    return answer


def _memory(tensor: torch.Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors have the same bits: NaN equals itself here."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    # The first look takes no memory; the second is for NaN.
    if torch.equal(one, other):
        return True
    return bool(((one == other) | ((one != one) & (other != other))).all())  # noqa: PLR0124 - NaN


def _spread(one: torch.Tensor, other: torch.Tensor) -> str:
    if one.shape != other.shape:
        return f"two runs gave {tuple(one.shape)} and {tuple(other.shape)}"
    differ = int((one != other).sum())
    spread = float((one.to("cpu", torch.float64) - other.to("cpu", torch.float64)).abs().max())
    return f"two runs differ in {differ} of {one.numel()} elements, by up to {spread:.3g}"

"""Watch a candidate while it runs: exceptions, side effects, and outputs that vary."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from snapshot_tool.base.environment import precision_settings
from snapshot_tool.base.errors import (
    GoldenDamaged,
    PhaseUnsupported,
    SnapError,
    describe_error,
    is_out_of_memory,
    place_of_error,
    traceback_of,
)
from snapshot_tool.base.foreign_code import foreign_code
from snapshot_tool.base.protocol import CANDIDATE_METHODS, Candidate, Phase
from snapshot_tool.base.results import Result, Verdict
from snapshot_tool.numerics.compare import fingerprint

_RAISED = "_raised_by_snaps_candidate"
_WHO = "the candidate"
# Operators that multiply: without one of them no layer of a model was computed.
_PRODUCTS = ("mm", "matmul", "linear", "conv", "attention", "dot", "einsum")
# Methods that describe the candidate and compute nothing.
_DESCRIBING = ("info", "output_cache")


def result_of_exception(
    error: Exception, *, case: str, phase: Phase, question: str = "", seconds: float = 0.0
) -> Result:
    """Return the result of a phase, or of a derived question, in which the candidate raised.

    Raises errors of snap, and of memory that ran out, as they are. Raises GoldenDamaged if snap's
    own code failed, because the golden set's tensors then do not fit together.
    """
    if isinstance(error, PhaseUnsupported):
        return Result(case, phase, question, Verdict.SKIP, str(error))
    if isinstance(error, SnapError) or is_out_of_memory(error):
        raise error
    if not getattr(error, _RAISED, False):
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        where = f"{case} ({question})" if question else case
        raise GoldenDamaged(
            f"{phase} of case {where}: tensors of the golden set do not fit together ({what})",
            "record the set again, or copy it again from its source",
        ) from error
    return Result(
        case,
        phase,
        question,
        Verdict.ERROR,
        describe_error(error),
        seconds=round(seconds, 6),
        place=place_of_error(error),
        traceback=traceback_of(error),
    )


class CountProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the matrix products that torch computes while it is active.

    Its base class is documented (Extending PyTorch), but up to torch 2.13 only at this path.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, counting it if it multiplies."""
        if any(part in func.__name__ for part in _PRODUCTS):
            self.count += 1
        return func(*args, **(kwargs or {}))


class WatchedCandidate(Candidate):
    """Runs a candidate's methods as foreign code, and collects warnings.

    It warns if the candidate overwrites or returns its inputs, or returns one buffer for every
    call; if modules run in train mode, with weights in a coarser dtype, gradients or autocast; if
    precision settings change; and if outputs differ between runs.

    Args:
        dtype: the name of its expected dtype.
        settings: torch's precision settings before the candidate was loaded.
        sees_modules: whether modules are inspected. It makes torch.compile compile them again at
            each call, since every call has a new hook.
    """

    def __init__(
        self,
        candidate: Candidate,
        *,
        dtype: str,
        settings: Mapping[str, str],
        sees_modules: bool = True,
    ) -> None:
        self.modules_run = 0
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._settings = settings
        self._sees_modules = sees_modules
        self._warnings: dict[str, None] = {}
        self._seen_modules: set[int] = set()
        self._first_outputs: dict[str, list[_Place]] = {}
        self._shares_memory: set[str] = set()  # methods that return one buffer for every call
        self._kept: list[list[torch.Tensor]] | None = None
        self._earlier: Iterator[list[torch.Tensor]] | None = None
        self._products: CountProducts | None = None
        for name in filter(candidate.supports, CANDIDATE_METHODS):
            call: Callable[..., Any] = functools.partial(self._call, name)
            if name in _DESCRIBING:
                call = _run_foreign
            setattr(self, name, functools.partial(call, getattr(candidate, name)))
        self._check_settings()

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings so far, each once."""
        return tuple(self._warnings)

    @contextmanager
    def counting_products(self) -> Iterator[CountProducts]:
        """Count the products that the candidate computes inside the block."""
        self._products = CountProducts()
        try:
            yield self._products
        finally:
            self._products = None

    def start_run(self, number: int) -> None:
        """Keep the outputs of run 0; compare those of later runs with them."""
        if number == 0:
            self._kept = []
        self._earlier = iter(self._kept or []) if number else None

    def end_runs(self) -> None:
        """Discard the kept outputs."""
        self._kept = self._earlier = None

    def _call(self, name: str, method: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """Call a method and return its output without gradients."""
        arguments = _named_arguments(method, given, options)
        inputs = dict(_tensors_in(arguments))
        before = _fingerprints(inputs, given)
        drawn = torch.get_rng_state()
        try:
            with foreign_code(_WHO), self._watching(), self._products or nullcontext():
                answer = method(*given, **options)
            if isinstance(answer, Iterator):
                return _each(answer)
            if isinstance(answer, AbstractContextManager):
                return _around(answer)
            outputs = [_plain(tensor, name) for _, tensor in _tensors_in({"answer": answer})]
        except (PhaseUnsupported, SnapError):
            raise
        except Exception as error:
            setattr(error, _RAISED, True)
            raise
        if not torch.equal(drawn, torch.get_rng_state()):
            self._warn(f"{name} used random numbers: dropout or sampling is on")
        for label, now in _fingerprints(inputs, given).items():
            if now != before[label]:
                self._warn(f"{name} overwrote its input {label}")
        self._check_memory(name, inputs, outputs)
        self._compare_runs(name, outputs)
        return _settled(answer, copied=name in self._shares_memory or self._kept is not None)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Inspect every module that runs inside the block."""
        self._check_settings()
        if self._sees_modules:
            handle = register_module_forward_pre_hook(self._look_at_module)
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*global hooks on modules.*")
                    yield
            finally:
                handle.remove()
        else:
            self.modules_run += 1
            yield
        self._check_settings()

    def _check_settings(self) -> None:
        """Warn of torch's precision settings that changed."""
        for name, value in precision_settings().items():
            if value != self._settings.get(name, value):
                self._warn(
                    f"the candidate set {name} to {value} for all of torch: float32 products have "
                    "fewer digits"
                )

    def _look_at_module(self, module: torch.nn.Module, _arguments: Any) -> None:
        # A compiled graph is a module that is always in train mode.
        if torch.compiler.is_compiling() or isinstance(module, torch.fx.GraphModule):
            return
        self.modules_run += 1
        if torch.is_grad_enabled():
            self._warn("the candidate ran with gradients on, outside torch.inference_mode")
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                into = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
                self._warn(f"autocast is on: parts of the candidate ran in {into}")
        if id(module) in self._seen_modules:
            return
        self._seen_modules.add(id(module))
        if module.training:
            self._warn(
                "the candidate ran in train mode, in which dropout is random and batch norms are "
                "updated: call eval() on it"
            )
        for weight in module.parameters(recurse=False):
            if _is_coarser(weight.dtype, self._dtype):
                found, wanted = (str(d).removeprefix("torch.") for d in (weight.dtype, self._dtype))
                self._warn(f"the candidate ran with {found} weights instead of {wanted}")

    def _check_memory(
        self, name: str, inputs: Mapping[str, torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        """Warn of outputs that share memory with an input, or with an earlier output in use."""
        outputs = [output for output in outputs if output.numel()]
        memory = {_memory(output) for output in outputs}
        given = {label: _memory(tensor) for label, tensor in inputs.items() if tensor.numel()}
        for label, place in given.items():
            if place in memory:
                self._warn(f"{name} returned the memory of its input {label}")
        if any(output.requires_grad for output in outputs):
            self._warn(f"{name} returned a tensor that requires gradients")
        # The memory of an input is not a buffer of the candidate.
        own = [output for output in outputs if _memory(output) not in given.values()]
        if not own:
            return
        if name not in self._first_outputs:
            self._first_outputs[name] = [_place(output) for output in own]
            return
        first, self._first_outputs[name] = self._first_outputs[name], []
        if any(place in memory and _is_in_use(holder) for place, holder in first):
            self._shares_memory.add(name)
            self._warn(f"{name} returns views of one buffer: each call overwrites the last output")

    def _compare_runs(self, name: str, outputs: list[torch.Tensor]) -> None:
        if self._kept is not None and self._earlier is None:
            self._kept.append([output.clone() for output in outputs])
        elif self._earlier is not None:
            for before, now in zip(next(self._earlier, []), outputs, strict=False):
                if spread := _spread(before, now):
                    self._warn(f"{name} is not deterministic: {spread}")

    def _warn(self, text: str) -> None:
        self._warnings.setdefault(text)


def _is_coarser(found: torch.dtype, wanted: torch.dtype) -> bool:
    if not found.is_floating_point:
        return not found.is_complex
    return torch.finfo(found).eps > torch.finfo(wanted).eps


def _run_foreign(function: Callable[..., Any], *given: Any) -> Any:
    with foreign_code(_WHO):
        return function(*given)


def _each(items: Iterator[Any]) -> Iterator[Any]:
    """Yield the candidate's items, running its code as foreign code."""
    end = object()
    while (item := _run_foreign(next, items, end)) is not end:
        yield item


@contextmanager
def _around(context: AbstractContextManager[Any]) -> Iterator[Any]:
    """Enter and leave a candidate's context manager, running its code as foreign code."""
    value = _run_foreign(context.__enter__)
    try:
        yield value
    except BaseException as error:
        if not _run_foreign(context.__exit__, type(error), error, error.__traceback__):
            raise
    else:
        _run_foreign(context.__exit__, None, None, None)


# The memory of an output, and its holder, which tells whether it is in use. The output itself is
# not kept alive, because logits take hundreds of megabytes. A tensor in memory of another library
# (for example NumPy's) is, because torch cannot report whether that memory is free.
_Place = tuple[tuple[str, int], StorageWeakRef | torch.Tensor]


def _place(tensor: torch.Tensor) -> _Place:
    storage = tensor.untyped_storage()
    is_own = storage.resizable()
    return _memory(tensor), StorageWeakRef(storage) if is_own else tensor  # type: ignore[no-untyped-call]


def _is_in_use(holder: StorageWeakRef | torch.Tensor) -> bool:
    return isinstance(holder, torch.Tensor) or not holder.expired()  # type: ignore[no-untyped-call]


def _memory(tensor: torch.Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def _named_arguments(
    method: Callable[..., Any], given: tuple[Any, ...], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the arguments by the parameter names of the candidate's method."""
    try:
        return inspect.signature(method).bind(*given, **options).arguments
    except (TypeError, ValueError):
        return {**{f"argument {i}": value for i, value in enumerate(given, 1)}, **options}


def _tensors_in(values: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors among named values, and those in dataclasses and mappings by their keys."""
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _tensors_in(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.fields(value)
            yield from _tensors_in({field.name: getattr(value, field.name) for field in fields})


def _fingerprints(inputs: Mapping[str, torch.Tensor], given: tuple[Any, ...]) -> dict[str, str]:
    """Return digests that change if an input is overwritten; copies would double the memory."""
    found = {label: fingerprint(tensor) for label, tensor in inputs.items()}
    for value in given:
        for index, image in enumerate(value if isinstance(value, list | tuple) else ()):
            if isinstance(image, Image.Image):
                found[f"image {index}"] = fingerprint(image.tobytes())
    return found


def _plain(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return a dense tensor with plain elements; raise TypeError for any other kind."""
    if tensor.is_meta or tensor.is_quantized or tensor.is_nested or tensor.is_complex():
        raise TypeError(f"{name} returned a tensor without plain elements: {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} returned a {tensor.layout} tensor, not a dense one")
    return tensor


def _settled(answer: Any, *, copied: bool) -> Any:
    """Return an output without gradients, and as a copy if its memory is reused."""
    if isinstance(answer, torch.Tensor):
        return answer.detach().clone() if copied else answer.detach()
    if isinstance(answer, Mapping):
        return {name: _settled(value, copied=copied) for name, value in answer.items()}
    return answer


def _spread(one: torch.Tensor, other: torch.Tensor) -> str:
    """Return how two outputs differ, or "" if they are equal; NaN equals itself here."""
    if one.shape != other.shape:
        return f"two runs gave {tuple(one.shape)} and {tuple(other.shape)}"
    same_dtype = one.dtype == other.dtype
    if same_dtype and torch.equal(one, other):  # needs no memory
        return ""
    differ = int(((one != other) & ~(one.isnan() & other.isnan())).sum())
    if same_dtype and not differ:
        return ""
    spread = float((one.to("cpu", torch.float64) - other.to("cpu", torch.float64)).abs().max())
    return f"two runs differ in {differ} of {one.numel()} elements, by up to {spread:.3g}"

"""Watching a candidate while it runs: what it raises, changes, and repeats."""

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
from snapshot_tool.base.errors import GoldenDamaged, PhaseUnsupported, SnapError, is_out_of_memory
from snapshot_tool.base.foreign_code import foreign_code
from snapshot_tool.base.memory import fingerprint
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.results import Result, Verdict


def require_candidates_fault(
    candidate: object, error: BaseException, *, case: str, phase: str
) -> None:
    """Return where a phase failed in the candidate's own code; raise where it failed elsewhere.

    What snap's own code stumbles over, with a guarded candidate, are tensors of the golden set that
    do not belong together. A lack of memory says nothing about the candidate either.
    """
    if is_out_of_memory(error):
        raise error
    if isinstance(candidate, Guarded) and not raised_by_candidate(error):
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise GoldenDamaged(
            f"{phase} of case {case}: the golden's tensors do not belong together ({what})",
            "record the set again, or get it from where it was recorded",
        ) from error


# Operators that multiply: without one of them no layer of a model was computed.
_PRODUCTS = ("mm", "matmul", "linear", "conv", "attention", "dot", "einsum")


class Watch:
    """Sees the modules of one candidate run, and says what is wrong about them once.

    Args:
        dtype: the dtype that the candidate should compute in.
        settings: torch's precision settings as they were made before the candidate was loaded.
        warn: takes each warning.
    """

    def __init__(
        self, dtype: torch.dtype, settings: Mapping[str, str], warn: Callable[[str], None]
    ) -> None:
        self.modules_run = 0
        self._dtype = dtype
        self._settings = settings
        self._warn = warn
        self._known: set[int] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at every module that runs inside the block."""
        self.look_at_settings()
        handle = register_module_forward_pre_hook(self._see)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*global hooks on modules.*")
                yield
        finally:
            handle.remove()
        self.look_at_settings()

    def look_at_settings(self) -> None:
        """Say which of torch's precision settings are no longer as snap made them."""
        for name, value in precision_settings().items():
            if value != self._settings.get(name, value):
                self._warn(
                    f"the candidate set {name} to {value}, for all of torch: float32 products are "
                    "rounded to fewer digits"
                )

    def _see(self, module: torch.nn.Module, _arguments: Any) -> None:
        # A compiled graph runs as a module of its own, always in train mode.
        if torch.compiler.is_compiling() or isinstance(module, torch.fx.GraphModule):
            return
        self.modules_run += 1
        if torch.is_grad_enabled():
            self._warn("the candidate computed with gradients on: torch.inference_mode was left")
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                into = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
                self._warn(f"autocast is on: the candidate computed partly in {into}")
        if id(module) not in self._known:
            self._known.add(id(module))
            self._look_at(module)

    def _look_at(self, module: torch.nn.Module) -> None:
        if module.training:
            self._warn(
                "the candidate ran in train mode, where dropout is random and normalisation "
                "learns: call eval() on it"
            )
        for weight in module.parameters(recurse=False):
            if _is_coarser(weight.dtype, self._dtype):
                found, wanted = (str(d).removeprefix("torch.") for d in (weight.dtype, self._dtype))
                self._warn(f"the candidate ran with {found} weights, the golden is {wanted}")


def _is_coarser(found: torch.dtype, wanted: torch.dtype) -> bool:
    if not found.is_floating_point:
        return not found.is_complex
    return torch.finfo(found).eps > torch.finfo(wanted).eps


class CountProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the products that torch computes while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, counting it if it multiplies."""
        if any(part in func.__name__ for part in _PRODUCTS):
            self.count += 1
        return func(*args, **(kwargs or {}))


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


_MODEL_PHASES = (Phase.VISION, Phase.CONNECTOR, Phase.FORWARD)
_READ = (
    "equal to the golden bit for bit, and nothing was computed: the answer was read, not worked out"
)


def run_guarded(
    candidate: Guarded, phase: Phase, once: Callable[[], list[Result]], *, times: int
) -> list[Result]:
    """Return the results of a phase; of several runs, those of the first that does not pass.

    Answers that differ from run to run become a warning of the candidate, with their spread.
    """
    before = candidate.modules_run
    if times > 1:
        candidate.record_answers()
    results = once()
    for _ in range(1, times):
        candidate.replay_answers()
        again = once()
        results = again if _passed(results) else results
    candidate.forget_answers()
    if phase in _MODEL_PHASES and candidate.modules_run == before and _is_exact(results):
        return _require_computed(candidate, results, once)
    return results


def _require_computed(
    candidate: Guarded, results: list[Result], once: Callable[[], list[Result]]
) -> list[Result]:
    """Fail an answer that is the golden's own, of a phase in which not one product is computed.

    Rounding differs between implementations, so equal bits are rare where a model was computed,
    and impossible where none was: the answer then comes from the golden itself.
    """
    with candidate.counting_products() as products:
        once()
    if products.count:
        return results
    return [dataclasses.replace(r, verdict=Verdict.FAIL, reason=_READ) for r in results]


def _passed(results: list[Result]) -> bool:
    return all(result.verdict is Verdict.PASS for result in results)


def _is_exact(results: list[Result]) -> bool:
    return _passed(results) and all(result.max_abs == 0 for result in results)

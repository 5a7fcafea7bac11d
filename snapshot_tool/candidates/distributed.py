"""A candidate whose calls are made on every rank at once: the leader's side and the followers'."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapshot_tool.base.determinism import make_deterministic
from snapshot_tool.base.errors import CandidateUnavailable, PhaseUnsupported
from snapshot_tool.base.protocol import CandidateInfo, CandidateRequest, CaseInputs, Observer
from snapshot_tool.candidates.ranks import Ranks

if TYPE_CHECKING:
    import torch

# What runs the model, or a part of it. Preprocessing does not.
_CALLS = frozenset(
    {
        *("vision", "connector", "forward", "generate"),
        *("forward_batch", "forward_in_parts", "generate_batch"),
    }
)

Load = Callable[[str, CandidateRequest, Path | None], Any]


@dataclass(frozen=True, slots=True)
class _Loading:
    """The leader's first message: what to build."""

    spec: str
    request: CandidateRequest
    fms_path: Path | None
    seed: int


@dataclass(frozen=True, slots=True)
class _Call:
    """A method of the candidate to call, or a graft to begin or to end."""

    name: str
    given: tuple[Any, ...] = ()
    options: Mapping[str, Any] | None = None


_END_GRAFT = "end of graft"


class RanksDiffer(RuntimeError):
    """A call did not end on all ranks alike: the candidate's fault, and all ranks can go on."""


class Led:
    """Passes everything on to the leader's candidate; what runs the model is run everywhere."""

    # A module that one rank takes from a cache and another one computes would part them.
    output_cache = None

    def __init__(self, candidate: Any, ranks: Ranks, *, spec: str) -> None:
        self._candidate = candidate
        self._spec = spec
        self._ranks = ranks
        if not callable(getattr(candidate, "observe_forward", None)):
            self.observe_forward = None  # type: ignore[assignment,method-assign]
        if not callable(getattr(candidate, "graft", None)):
            self.graft = None  # type: ignore[assignment,method-assign]

    def info(self) -> CandidateInfo:
        """Say which implementation this is, and over how many ranks it is split."""
        own = getattr(self._candidate, "info", None)
        info: CandidateInfo = own() if callable(own) else CandidateInfo(self._spec)
        note = (
            f"on {self._ranks.size} ranks ({self._ranks.backend}); modules are compared where a "
            "rank has the whole output: blocks, attention, feed-forward"
        )
        return replace(info, notes=(*info.notes, note))

    def observe_forward(self, inputs: CaseInputs, observe: Observer) -> Mapping[str, str]:
        """Run forward everywhere and show the leader's modules."""
        self._ranks.send(_Call("observe_forward", (inputs, _look_away)))
        names: Mapping[str, str] = _run(
            self._ranks, "observe_forward", self._candidate.observe_forward, inputs, observe
        )
        return names

    @contextmanager
    def graft(self, module: str, output: torch.Tensor) -> Iterator[str]:
        """Replace a module's output on every rank meanwhile."""
        self._ranks.send(_Call("graft", (module, output)))
        with self._candidate.graft(module, output) as name:
            yield name
        self._ranks.send(_Call(_END_GRAFT))

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._candidate, name)
        return functools.partial(self._call, name, attribute) if name in _CALLS else attribute

    def _call(self, name: str, method: Callable[..., Any], *given: Any, **options: Any) -> Any:
        self._ranks.send(_Call(name, given, options))
        return _run(self._ranks, name, method, *given, **options)


def lead(
    ranks: Ranks, load: Load, spec: str, request: CandidateRequest, fms_path: Path | None
) -> Led:
    """Build the candidate on every rank; raise CandidateUnavailable where one of them cannot."""
    import torch

    ranks.send(_Loading(spec, request, fms_path, torch.initial_seed()))
    try:
        candidate = _run(ranks, "loading", _quietly(load), spec, request, fms_path)
    except RanksDiffer as error:
        raise CandidateUnavailable(f"the candidate cannot be loaded: {error}") from error
    return Led(candidate, ranks, spec=spec)


def dismiss(ranks: Ranks) -> None:
    """Let the followers go."""
    ranks.send(None)


def follow(ranks: Ranks, load: Load) -> None:
    """Build the candidate and make the leader's calls until it sends no more."""
    import torch

    loading = ranks.receive()
    if loading is None:
        return
    make_deterministic(loading.seed, strict=False)
    arguments = (loading.spec, loading.request, loading.fms_path)
    candidate = _try(ranks, "loading", _quietly(load), *arguments)
    grafts = ExitStack()
    with torch.inference_mode():
        while (call := ranks.receive()) is not None:
            if call.name == "graft":
                grafts.enter_context(candidate.graft(*call.given))
            elif call.name == _END_GRAFT:
                grafts.close()
            else:
                method = getattr(candidate, call.name)
                _try(ranks, call.name, method, *call.given, **(call.options or {}))


def _try(ranks: Ranks, what: str, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """Run on a follower: what all ranks raise, or one of them, is the leader's to report."""
    try:
        return _run(ranks, what, function, *given, **options)
    except _Alike:
        return None


class _Alike(Exception):
    """Stands on a follower for an exception that every rank has told."""


def _run(ranks: Ranks, what: str, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """Make a call here, as all ranks do, and see that it ends alike everywhere."""
    answer, raised = None, None
    try:
        answer = function(*given, **options)
        ending = f"the answer {_outline(answer)}"
    except BaseException as error:  # the other ranks must hear of it, whatever it is
        raised = error
        ending = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    endings = ranks.tell(ending, what=what, raised=raised is not None)
    differing = [rank for rank, other in enumerate(endings) if other != endings[0]]
    if ranks.rank and (raised or differing):
        raise _Alike
    if differing and not isinstance(raised, PhaseUnsupported):
        other = f"rank {differing[0]} with {endings[differing[0]]}"
        raise RanksDiffer(f"{what} ended on rank 0 with {endings[0]}, on {other}") from raised
    if raised:
        raise raised
    return answer


def _outline(answer: Any) -> str:
    """Return the form of an answer, and of token ids their values: what ranks have in common.

    Floating-point values may differ in their last bits from device to device.
    """
    import torch

    if isinstance(answer, torch.Tensor):
        ids = f" {answer.flatten().tolist()}" if answer.dtype == torch.int64 else ""
        return f"{tuple(answer.shape)} {answer.dtype}{ids}"
    if isinstance(answer, Mapping):
        return str({name: _outline(value) for name, value in answer.items()})
    if isinstance(answer, list | tuple):
        return str([_outline(value) for value in answer])
    return type(answer).__name__


def _quietly(load: Load) -> Load:
    """Send what FMS prints while loading to standard error: the report is on standard output."""

    def quiet(spec: str, request: CandidateRequest, fms_path: Path | None) -> Any:
        with redirect_stdout(sys.stderr):
            return load(spec, request, fms_path)

    return quiet


def _look_away(_module: str, _side: object, _tensor: object) -> None:
    """Observe nothing: the leader does."""

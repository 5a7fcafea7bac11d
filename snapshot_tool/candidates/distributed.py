"""A candidate whose calls are made on every rank at once: the leader's side and the followers'."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapshot_tool.base.environment import make_deterministic
from snapshot_tool.base.errors import CandidateUnavailable, PhaseUnsupported
from snapshot_tool.base.protocol import CandidateInfo, CandidateRequest, CaseInputs, Observer

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore


# The greatest time that one rank may wait inside a collective of the model for another one.
_MODEL_PATIENCE = dt.timedelta(minutes=10)
# A follower waits while the leader judges, reads and explores; torchrun ends it with the leader.
_LEADER_PATIENCE = dt.timedelta(days=7)
# A rank that raised waits so long for the others to raise, too, before it takes them for stuck.
RAISED_PATIENCE = dt.timedelta(seconds=60)


@dataclass(slots=True)
class Ranks:
    """This process among those of one torchrun.

    Args:
        rank: from 0.
        size: how many there are.
        backend: what torch.distributed moves tensors with.
        store: torchrun's key-value store.
        control: a group for calls, apart from the model's.
    """

    rank: int
    size: int
    backend: str
    store: PrefixStore
    control: dist.ProcessGroup
    _told: int = field(default=0)

    def send(self, message: object) -> None:
        """Send a message to all followers."""
        import torch.distributed as dist

        try:
            dist.broadcast_object_list([message], src=0, group=self.control)
        except RuntimeError as error:
            raise CandidateUnavailable(
                "another rank has ended before its time", "look at what it says"
            ) from error

    def receive(self) -> Any:
        """Return the leader's next message, None where there are no more."""
        import torch.distributed as dist

        box: list[Any] = [None]
        # Where the leader is gone, it has said why itself.
        with contextlib.suppress(RuntimeError):
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def tell(self, ending: str, *, what: str, raised: bool) -> list[str]:
        """Tell how a call ended here; return how it ended on every rank, in their order.

        Raises CandidateUnavailable where a rank does not say so in time: it is stuck in the model.
        """
        self._told += 1
        keys = [f"ending/{self._told}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], ending)
        try:
            self.store.wait(keys, RAISED_PATIENCE if raised else _MODEL_PATIENCE)
        except RuntimeError as error:
            here = f"rank {self.rank} ended it with {ending}" if raised else "this rank has"
            raise CandidateUnavailable(
                f"not all {self.size} ranks ended {what}, {here}",
                "look at the other ranks' output: torchrun --tee 3",
            ) from error
        return [self.store.get(key).decode() for key in keys]


_JOINED: list[Ranks] = []


def joined_ranks() -> Ranks | None:
    """Return the ranks that this process has joined, or None where it is alone."""
    return _JOINED[-1] if _JOINED else None


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Meet the other ranks, each with a GPU of its own where `device` is "cuda"."""
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if device == "cuda":
        # From here on, "cuda" means this one.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device == "cuda" else "gloo"
    store, rank, size = next(rendezvous("env://"))
    dist.init_process_group(
        backend,
        store=PrefixStore("model", store),
        rank=rank,
        world_size=size,
        timeout=_MODEL_PATIENCE,
    )
    control = dist.new_group(backend="gloo", timeout=_LEADER_PATIENCE)
    _JOINED.append(Ranks(rank, size, backend, PrefixStore("snap", store), control))
    try:
        yield _JOINED[-1]
    finally:
        _JOINED.pop()
        dist.destroy_process_group()


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

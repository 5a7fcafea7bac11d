"""A candidate that runs on every rank of one torchrun, on the leader and on the followers."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapshot_tool.base.environment import make_deterministic
from snapshot_tool.base.errors import CandidateUnavailable, PhaseUnsupported, describe_error
from snapshot_tool.base.protocol import (
    Candidate,
    CandidateInfo,
    CandidateRequest,
    CaseInputs,
    Observer,
    WeightPair,
)
from snapshot_tool.base.report import WeightReport
from snapshot_tool.numerics.compare import compare_weights

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore


# How long one rank waits for another inside a collective of the model.
_MODEL_TIMEOUT = dt.timedelta(minutes=10)
# How long a follower waits for a call while the leader judges and explores.
_LEADER_TIMEOUT = dt.timedelta(days=7)
# How long a rank that raised waits for the others, before it reports them as stuck.
RAISED_TIMEOUT = dt.timedelta(seconds=60)

Load = Callable[[str, CandidateRequest, Path | None], Candidate]


class RanksDiffer(RuntimeError):
    """A call ended differently on two ranks: the candidate's fault, and all ranks can go on."""


@dataclass(slots=True)
class Ranks:
    """This process among those of one torchrun.

    Args:
        rank: from 0; rank 0 is the leader.
        size: how many there are.
        backend: the backend of torch.distributed.
        store: torchrun's key-value store.
        control: a group for calls, apart from the model's.
    """

    rank: int
    size: int
    backend: str
    store: PrefixStore
    control: dist.ProcessGroup
    _calls: int = 0

    def send(self, message: object) -> None:
        """Send a message to all followers; None ends them."""
        import torch.distributed as dist

        try:
            dist.broadcast_object_list([message], src=0, group=self.control)
        except RuntimeError as error:
            raise CandidateUnavailable(
                "another rank ended too early", "look at its output"
            ) from error

    def receive(self) -> Any:
        """Return the leader's next message, None if there are no more."""
        import torch.distributed as dist

        box: list[Any] = [None]
        # If the leader is gone, it has reported the reason itself.
        with contextlib.suppress(RuntimeError):
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def run(self, what: str, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """Make a call that all ranks make, and return its output.

        On a follower, return None for a call that raises, or that ends otherwise elsewhere: the
        leader reports it. On the leader, raise what all ranks raised, or RanksDiffer. Raise
        CandidateUnavailable if another rank is stuck in the model.
        """
        output, raised = None, None
        try:
            output = function(*given, **options)
            ending = f"the answer {_outline(output)}"
        except BaseException as error:  # the other ranks must not wait for this one
            raised = error
            ending = describe_error(error)
        self._calls += 1
        keys = [f"ending/{self._calls}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], ending)
        try:
            self.store.wait(keys, RAISED_TIMEOUT if raised else _MODEL_TIMEOUT)
        except RuntimeError as error:
            here = f"rank {self.rank} ended it with {ending}" if raised else "this rank has"
            raise CandidateUnavailable(
                f"not all {self.size} ranks ended {what}, {here}",
                "look at the other ranks' output: torchrun --tee 3",
            ) from error
        endings = [self.store.get(key).decode() for key in keys]
        differing = [rank for rank, other in enumerate(endings) if other != endings[0]]
        if self.rank and (raised or differing):
            return None
        if differing and not isinstance(raised, PhaseUnsupported):
            other = f"rank {differing[0]} with {endings[differing[0]]}"
            raise RanksDiffer(f"{what} ended on rank 0 with {endings[0]}, on {other}") from raised
        if raised:
            raise raised
        return output

    def compare_weights(self, weights: Callable[[], Iterable[WeightPair]]) -> list[WeightReport]:
        """Let each rank compare its weights; return all reports on the leader, none elsewhere.

        weights: returns this rank's.
        """
        import torch.distributed as dist

        own = self.run("weights", lambda: compare_weights(weights()))
        reports: list[Any] = [] if self.rank else [None] * self.size
        if own is not None:  # else it raised on the leader
            dist.gather_object(own, reports or None, group=self.control)
        return reports


def join_weight_reports(reports: Sequence[WeightReport]) -> WeightReport:
    """Return the report of all ranks; each weight that differs has its rank."""
    return WeightReport(
        min(report.compared for report in reports),
        tuple(
            replace(weight, rank=rank)
            for rank, report in enumerate(reports)
            for weight in report.differing
        ),
        tuple(dict.fromkeys(name for report in reports for name in report.not_compared)),
    )


def _outline(output: Any) -> str:
    """Return the shape and dtype of an output, and the values of token ids.

    Floating-point values may differ in their last bits between devices.
    """
    import torch

    if isinstance(output, torch.Tensor):
        ids = f" {output.flatten().tolist()}" if output.dtype == torch.int64 else ""
        return f"{tuple(output.shape)} {output.dtype}{ids}"
    if isinstance(output, Mapping):
        return str({name: _outline(value) for name, value in output.items()})
    if isinstance(output, list | tuple):
        return str([_outline(value) for value in output])
    return type(output).__name__


_JOINED: list[Ranks] = []


def joined_ranks() -> Ranks | None:
    """Return the ranks that this process has joined, or None if it is alone."""
    return _JOINED[-1] if _JOINED else None


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the other ranks, each with its own GPU if `device` is "cuda"."""
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
        timeout=_MODEL_TIMEOUT,
    )
    control = dist.new_group(backend="gloo", timeout=_LEADER_TIMEOUT)
    _JOINED.append(Ranks(rank, size, backend, PrefixStore("snap", store), control))
    try:
        yield _JOINED[-1]
    finally:
        _JOINED.pop()
        dist.destroy_process_group()


# Methods that run the model, or a part of it.
_RUN_EVERYWHERE = (
    *("vision", "connector", "forward", "generate"),
    *("forward_batch", "forward_in_parts", "generate_batch", "run_module"),
)
_RUN_BY_LEADER = ("preprocess", "weights", "unset_weights", "modules", "twin_outputs")
_END_GRAFT = "end of graft"
_WEIGHTS = "compare weights"


class DistributedCandidate(Candidate):
    """The leader's candidate; what runs the model runs on every rank.

    It keeps no outputs: ranks diverge if one takes a module's output from a cache and another
    computes it.
    """

    def __init__(self, own: Candidate, ranks: Ranks, *, spec: str) -> None:
        self._own = own
        self._ranks = ranks
        self._spec = spec
        for name in _RUN_EVERYWHERE:
            setattr(self, name, functools.partial(self._run_everywhere, name))
        for name in _RUN_BY_LEADER:
            setattr(self, name, getattr(own, name))

    def supports(self, method: str) -> bool:
        """Return whether the leader's candidate has a method of this name."""
        # Another layout of the cache would be on the leader alone.
        return method == "info" or (method != "cache_layout" and self._own.supports(method))

    def info(self) -> CandidateInfo:
        """Return which implementation this is, and over how many ranks it is split."""
        own = self._own
        info = own.info() if own.supports("info") else CandidateInfo(self._spec)
        note = f"on {self._ranks.size} ranks ({self._ranks.backend})"
        return replace(info, notes=(*info.notes, note))

    def observe_forward(self, inputs: CaseInputs, observe: Observer) -> Mapping[str, str]:
        """Run forward everywhere and observe the leader's modules."""
        self._ranks.send(("observe_forward", (inputs, _ignore), {}))
        names: Mapping[str, str] = self._ranks.run(
            "observe_forward", self._own.observe_forward, inputs, observe
        )
        return names

    def compare_weights(self, weights: Callable[[], Iterable[WeightPair]]) -> WeightReport:
        """Compare every rank's weights with the checkpoint's; `weights` returns the leader's."""
        self._ranks.send((_WEIGHTS, (), {}))
        return join_weight_reports(self._ranks.compare_weights(weights))

    @contextmanager
    def graft(self, module: str, output: torch.Tensor) -> Iterator[str]:
        """Replace a module's output on every rank inside the block."""
        self._ranks.send(("graft", (module, output), {}))
        with self._own.graft(module, output) as name:
            yield name
        self._ranks.send((_END_GRAFT, (), {}))

    def _run_everywhere(self, name: str, *given: Any, **options: Any) -> Any:
        self._ranks.send((name, given, options))
        return self._ranks.run(name, getattr(self._own, name), *given, **options)


def _ignore(_module: str, _side: object, _tensor: object) -> None:
    """Observe nothing, on followers."""


def load_on_all_ranks(
    ranks: Ranks, load: Load, spec: str, request: CandidateRequest, fms_path: Path | None
) -> DistributedCandidate:
    """Build the candidate on every rank; raise CandidateUnavailable if one of them cannot."""
    import torch

    ranks.send((spec, request, fms_path, torch.initial_seed()))
    try:
        own = ranks.run("loading", load, spec, request, fms_path)
    except RanksDiffer as error:
        raise CandidateUnavailable(f"the candidate cannot be loaded: {error}") from error
    return DistributedCandidate(own, ranks, spec=spec)


def run_follower(ranks: Ranks, load: Load) -> None:
    """Build the candidate and make the leader's calls until it sends no more.

    The candidate's output goes to standard error.
    """
    import torch

    first = ranks.receive()
    if first is None:
        return
    spec, request, fms_path, seed = first
    make_deterministic(seed, strict=False)
    with redirect_stdout(sys.stderr):
        own = ranks.run("loading", load, spec, request, fms_path)
        with torch.inference_mode(), ExitStack() as grafts:
            while (call := ranks.receive()) is not None:
                name, given, options = call
                if name == "graft":
                    grafts.enter_context(own.graft(*given))
                elif name == _END_GRAFT:
                    grafts.close()
                elif name == _WEIGHTS:
                    ranks.compare_weights(own.weights)
                else:
                    ranks.run(name, getattr(own, name), *given, **options)

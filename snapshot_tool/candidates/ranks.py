"""The processes of one torchrun: rank 0 leads, the others follow.

The leader runs the whole check; followers only make the candidate's calls that it sends them, so
that a tensor-parallel model meets its other shards there. Nothing that a check decides on the way
(what is asked next, when shrinking stops) can so part the ranks.

How a call ended is told through torchrun's store, never through collectives: a rank that raised
must not enter one while another is still inside the model's own.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from snapshot_tool.base.errors import CandidateUnavailable

if TYPE_CHECKING:
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

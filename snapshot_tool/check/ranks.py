"""A check by the processes of one torchrun: which of them leads it, and what the others do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from snapshot_tool.base.devices import require_device
from snapshot_tool.base.environment import rank_here
from snapshot_tool.candidates import build_candidate
from snapshot_tool.candidates.ranks import join_ranks


def is_follower() -> bool:
    """Tell whether another process leads this check."""
    return (rank_here() or 0) > 0


def follow_leader(device: str) -> None:
    """Make the candidate's calls that the leader makes, until it has no more."""
    from snapshot_tool.candidates.distributed import follow

    require_device(device)
    with join_ranks(device) as ranks:
        follow(ranks, build_candidate)


@contextmanager
def leading(device: str) -> Iterator[None]:
    """Lead the other ranks inside the block; do nothing where there are none.

    Where the block raises, followers are not dismissed: they may be stuck in the model, and
    torchrun ends them with this process.
    """
    if rank_here() is None:
        yield
        return
    from snapshot_tool.candidates.distributed import dismiss

    require_device(device)
    with join_ranks(device) as ranks:
        yield
        dismiss(ranks)

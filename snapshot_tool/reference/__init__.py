"""The Hugging Face side: the only package that imports transformers or accelerate."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapshot_tool.base.environment import rank_here
from snapshot_tool.base.errors import ReferenceUnavailable
from snapshot_tool.base.protocol import LoadSettings

if TYPE_CHECKING:
    from snapshot_tool.reference.huggingface import HuggingFaceReference

# Shares of a recording may end hours apart.
_PATIENCE = dt.timedelta(days=7)


def load_reference(checkpoint: Path, *, dtype: str, settings: LoadSettings) -> HuggingFaceReference:
    """Load the model of a checkpoint's folder; raise ReferenceUnavailable without Hugging Face."""
    try:
        from snapshot_tool.reference.huggingface import HuggingFaceReference
    except ImportError as error:
        raise _lacking(error) from error
    return HuggingFaceReference.load(checkpoint, dtype=dtype, settings=settings)


def join_processes(device: str) -> Processes:
    """Return this process among those that were started together; raise as `load_reference`."""
    if rank_here() is None:
        return Processes()
    try:
        return _LaunchedProcesses(device)
    except ImportError as error:
        raise _lacking(error) from error


class Processes:
    """The processes that record together. This class stands for one process alone.

    index: which one this is, from 0. count: how many there are.
    """

    index = 0
    count = 1

    def share(self, value: Any) -> Any:
        """Return the first process's value in every process."""
        return value

    def wait(self) -> None:
        """Return when all processes have come here."""


class _LaunchedProcesses(Processes):
    """Processes that `accelerate launch` or torchrun started; each gets a GPU of its own."""

    def __init__(self, device: str) -> None:
        from accelerate import PartialState

        self._state = PartialState(cpu=device == "cpu", timeout=_PATIENCE)
        self.index = int(self._state.process_index)
        self.count = int(self._state.num_processes)

    def share(self, value: Any) -> Any:
        from accelerate.utils import broadcast_object_list

        box = [value]
        with _others_running():
            broadcast_object_list(box)
        return box[0]

    def wait(self) -> None:
        with _others_running():
            self._state.wait_for_everyone()


@contextmanager
def _others_running() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ReferenceUnavailable(
            "another process of this recording has ended too early",
            "see its message; then continue with --resume",
        ) from error


def _lacking(error: ImportError) -> ReferenceUnavailable:
    return ReferenceUnavailable(
        f"recording needs transformers and accelerate, which are not installed: {error}",
        "use the record environment; to make one, in a checkout of snap: make setup",
    )

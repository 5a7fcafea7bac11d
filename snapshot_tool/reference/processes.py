"""The processes that `accelerate launch` or torchrun started, by accelerate."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from snapshot_tool.base.environment import Processes
from snapshot_tool.base.errors import ReferenceUnavailable

# Shares of a recording may end hours apart.
_PATIENCE = dt.timedelta(days=7)


class LaunchedProcesses(Processes):
    """Processes of accelerate; each process of a machine gets a GPU of its own."""

    def __init__(self, device: str) -> None:
        self._state = PartialState(cpu=device == "cpu", timeout=_PATIENCE)
        self.index = int(self._state.process_index)
        self.count = int(self._state.num_processes)

    def share(self, value: Any) -> Any:
        """Return the first process's value in every process."""
        box = [value]
        with _others_running():
            broadcast_object_list(box)
        return box[0]

    def wait(self) -> None:
        """Return when all processes have come here."""
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

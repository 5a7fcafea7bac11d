"""Opening a checker without waiting in turn.

While code is imported, torch's library is loaded and then the checkpoint digested.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

from snapshot_tool.check_request import CheckRequest
from snapshot_tool.core.interfaces import Progress
from snapshot_tool.golden_choice import open_checkpoint_of
from snapshot_tool.memory import without_collection
from snapshot_tool.store.golden import Golden
from snapshot_tool.torch_library import find_library, import_meanwhile, load_library

if TYPE_CHECKING:
    from snapshot_tool.checker import Checker
    from snapshot_tool.checkpoint import Checkpoint

T = TypeVar("T")


def open_checker(request: CheckRequest, golden: Golden, progress: Progress) -> Checker:
    """Load the candidate from the checkpoint that the golden was recorded from."""

    def work() -> Checkpoint:
        load_library()
        return open_checkpoint_of(golden, request.checkpoint)

    opened = _begun(work)
    with without_collection():
        if find_library() is not None:  # else it would only come sooner, or for nothing
            import_meanwhile()
        from snapshot_tool.checker import load_checker  # imports torch

    return load_checker(request, golden, progress, open_checkpoint=opened)


def _begun(work: Callable[[], T]) -> Callable[[], T]:
    """Begin work on another thread, and return what waits for its answer.

    A daemon, which an executor's threads are not: whoever interrupts a download, or has mistyped
    the candidate's name, does not wait for it.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future.result

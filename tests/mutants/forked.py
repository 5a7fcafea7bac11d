"""Running jobs in forked processes: each starts with what the parent imported, and dies alone.

The parent must not have computed anything in parallel before: OpenMP's threads do not survive a
fork.
"""

from __future__ import annotations

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Crash:
    """A job that gave no result, and why."""

    why: str


@dataclass(frozen=True, slots=True)
class _Running(Generic[T]):
    name: str
    process: ForkProcess
    deadline: float


def run_forked(
    jobs: Mapping[str, Callable[[], T]], *, workers: int, seconds: float
) -> Iterator[tuple[str, T | Crash]]:
    """Run jobs in processes of their own, `workers` at a time; yield results as they come.

    seconds: how long one may take. Whatever a job raises or dies of is its own result.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(jobs.items())[::-1]
    running: dict[Connection, _Running[T]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            name, job = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(job, sender))
            process.start()
            sender.close()
            running[receiver] = _Running(name, process, time.monotonic() + seconds)
        ready = wait(list(running), timeout=1)
        for receiver in [r for r in running if r in ready]:
            done = running.pop(receiver)
            yield done.name, _receive(receiver, done.process)
        for receiver, late in [*running.items()]:
            if time.monotonic() > late.deadline:
                late.process.kill()
                late.process.join()
                del running[receiver]
                yield late.name, Crash(f"took more than {seconds:.0f} s")


def _work(job: Callable[[], T], sender: Connection) -> None:
    try:
        result: T | Crash = job()
    except BaseException:  # whatever it is, it is this job's result
        result = Crash(traceback.format_exc().strip())
    # Plain pickles: torch would share a tensor's memory with a process that is about to end.
    sender.send_bytes(pickle.dumps(result))
    sender.close()


def _receive(receiver: Connection, process: ForkProcess) -> T | Crash:
    try:
        result: T | Crash = pickle.loads(receiver.recv_bytes())
    except EOFError:
        process.join()
        return Crash(f"the process died with {process.exitcode}")
    process.join()
    return result

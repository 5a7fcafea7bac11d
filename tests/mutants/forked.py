"""Run jobs in forked processes: each starts with what the parent imported.

The parent must not have computed anything in parallel before: OpenMP's threads do not survive a
fork.
"""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Crash:
    """Why a job gave no result."""

    why: str


def run_forked(
    jobs: Mapping[str, Callable[[], T]], *, workers: int, seconds: float
) -> Iterator[tuple[str, T | Crash]]:
    """Run each job in a process of its own, `workers` at a time; yield results as they come.

    A job that raises, dies or takes more than `seconds` yields a Crash.
    """
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(_run_alone, job, seconds): name for name, job in jobs.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _run_alone(job: Callable[[], T], seconds: float) -> T | Crash:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            result: T | Crash = pickle.loads(receiver.recv_bytes())
        else:
            process.kill()
            result = Crash(f"took more than {seconds:.0f} s")
    except EOFError:
        process.join()
        result = Crash(f"the process died with {process.exitcode}")
    process.join()
    return result


def _work(job: Callable[[], T], sender: Connection) -> None:
    try:
        result: T | Crash = job()
    except BaseException:  # any end of the job is its result
        result = Crash(traceback.format_exc().strip())
    # Plain pickles: torch would share a tensor's memory with a process that is about to end.
    sender.send_bytes(pickle.dumps(result))

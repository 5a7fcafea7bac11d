"""Ending the process without taking a million objects apart first, as mypy does."""

from __future__ import annotations

import atexit
import os
import sys


class Ending:
    """Ends a process that imported torch once all that is registered to run at exit has run.

    Make it before anything else is imported: what is registered first runs last (`atexit`); what
    others registered before would never run. Python goes its usual way, which with torch and FMS
    takes 0.2 s, where somebody did, where `code` was not set, and where a file is still open for
    writing: a candidate's log, say, with lines in it that are on no disk yet.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        self._inherited = _descriptors()
        registered = getattr(atexit, "_ncallbacks", None)  # no public name has it
        if registered is not None and not registered():
            atexit.register(self._end)

    def _end(self) -> None:
        if self.code is None or "torch" not in sys.modules:
            return
        try:
            opened = _descriptors()
            # Nothing tells what is open where there is no Linux.
            if opened and not any(map(_may_hold_data, opened - self._inherited)):
                _flush()
                os._exit(self.code)
        except Exception:
            return


def _descriptors() -> set[int]:
    try:
        # Each command begins with this, and needs no pathlib yet.
        listed = map(int, os.listdir("/proc/self/fd"))  # noqa: PTH208
    except OSError:
        return set()
    return set(filter(_is_open, listed))  # what listed the folder is closed again


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _may_hold_data(descriptor: int) -> bool:
    """Tell whether a file is open for writing, and is not the null device."""
    import fcntl  # not on every system

    for_writing = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    return for_writing and os.fstat(descriptor).st_rdev != os.stat(os.devnull).st_rdev  # noqa: PTH116


def _flush() -> None:
    """Write what Python's standard streams and the C library's still hold; raise where it fails."""
    from snapshot_tool.c_library import function_of_c

    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()
    flush = function_of_c("fflush")
    if flush is None:
        raise LookupError("fflush")
    flush(None)

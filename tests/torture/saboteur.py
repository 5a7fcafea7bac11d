"""Failing at the N-th thing that a process does to the disk: killed, interrupted, or refused.

Every write, sync, rename, link and removal below a folder is counted, in the process itself, by
putting a counter before the system's functions. Nothing sleeps and nothing depends on time, so a
point that was survived is survived every time.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, Self


class Kind(StrEnum):
    """What happens at the point."""

    KILL = "kill"  # kill -9, a write being half done
    TERMINATE = "terminate"  # SIGTERM
    INTERRUPT = "interrupt"  # Ctrl-C
    FULL = "full"  # no space left on the device
    READ_ONLY = "read-only"  # the file system was remounted
    FAILING = "failing"  # the disk itself


_ERRORS = {Kind.FULL: errno.ENOSPC, Kind.READ_ONLY: errno.EROFS, Kind.FAILING: errno.EIO}
_SIGNALS = {
    Kind.KILL: signal.SIGKILL,
    Kind.TERMINATE: signal.SIGTERM,
    Kind.INTERRUPT: signal.SIGINT,
}


class Saboteur:
    """Counts what a process does to a folder; `at` 0 counts alone."""

    def __init__(self, folder: Path, *, at: int, kind: Kind) -> None:
        self.done: list[str] = []
        self._folder = os.path.realpath(folder)
        self._at = at
        self._kind = kind

    def arm(self) -> None:
        """Put the counter before the system's functions, for the rest of this process."""
        for name in ("fsync", "rename", "replace", "link", "mkdir", "unlink", "remove", "rmdir"):
            setattr(os, name, self._counted(name, getattr(os, name)))
        os.sendfile = self._counted("sendfile", os.sendfile)
        for module in (io, builtins):
            module.open = self._opener(module.open)  # type: ignore[attr-defined]

    def count(self, name: str, path: Any, before: Callable[[], object] | None = None) -> None:
        """Count one operation; at the point, do `before` and fail."""
        if not self._is_inside(path):
            return
        self.done.append(name)
        if len(self.done) != self._at:
            return
        if before is not None:
            before()
        if self._kind in _ERRORS:
            number = _ERRORS[self._kind]
            raise OSError(number, os.strerror(number), _name_of(path))
        os.kill(os.getpid(), _SIGNALS[self._kind])

    def _is_inside(self, path: Any) -> bool:
        return os.path.realpath(_name_of(path)).startswith(self._folder)

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            # Removing a tree names its files relative to an open folder.
            inside = options.get("dir_fd")
            self.count(name, arguments[0] if inside is None else inside)
            return function(*arguments, **options)

        return counted

    def _opener(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def opener(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if not set(mode) & set("wax") or isinstance(file, int):
                return function(file, mode, *rest, **options)
            self.count("open", file)
            sink = function(file, mode, *rest, **options)
            return _Sink(sink, self, file) if self._is_inside(file) else sink

        return opener


def _name_of(path: Any) -> str:
    """Return a path as text, that of an open file by its number."""
    return str(Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else path)


class _Sink:
    """A file that is written to, with a counter before each write."""

    def __init__(self, file: Any, saboteur: Saboteur, path: Any) -> None:
        self._file = file
        self._saboteur = saboteur
        self._path = path

    def write(self, data: Any) -> Any:
        """Write; at the point, half of it."""

        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._saboteur.count("write", self._path, half)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> Any:
        return self._file.__exit__(*error)

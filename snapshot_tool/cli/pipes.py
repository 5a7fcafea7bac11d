"""Output into a pipe whose reader has gone: the command goes on, and its exit code holds."""

from __future__ import annotations

import io
import sys
from typing import Any, TextIO


class _Pipe(io.FileIO):
    """A file that takes everything once nobody reads it any more."""

    def write(self, data: Any) -> int:
        """Write to the pipe, or to nowhere."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def keep_writing_to_closed_pipes() -> None:
    """Replace standard output and standard error, if they are not a terminal."""
    sys.stdout = _tolerant(sys.stdout)
    sys.stderr = _tolerant(sys.stderr)


def _tolerant(stream: TextIO) -> TextIO:
    """Return a stream of the same file that a missing reader does not break."""
    try:
        number = stream.fileno()
        if stream.isatty():
            return stream
    except (OSError, ValueError, AttributeError):
        return stream  # closed, or no file at all, as in tests
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(number, "w", closefd=False)),
        encoding=getattr(stream, "encoding", None),
        errors=getattr(stream, "errors", None),
        line_buffering=stream is sys.stderr,
    )

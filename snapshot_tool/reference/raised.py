"""What libraries raise about a checkpoint, as one line of snap's own errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from snapshot_tool.base.errors import InputRefused, SnapError, is_out_of_memory

_LONGEST = 300  # characters


@contextmanager
def raised_as(make: Callable[[str], Exception]) -> Iterator[None]:
    """Raise what `make` returns, given one line, in place of a library's error."""
    try:
        yield
    except (SnapError, InputRefused, KeyboardInterrupt):
        raise
    except BaseException as error:
        # BaseException: a panic in tokenizers is not an Exception, and code of the checkpoint
        # may call sys.exit.
        if is_out_of_memory(error):
            raise
        raise make(in_one_line(error)) from error


def in_one_line(error: BaseException) -> str:
    """Return the type of an error and the beginning of its text."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return f"{kind}: {text[:_LONGEST]}" if text else kind

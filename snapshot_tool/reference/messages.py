"""Errors and warnings of transformers and its libraries."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers

from snapshot_tool.base.errors import InputRefused, SnapError, is_out_of_memory, printable

_LONGEST_ERROR = 300  # characters


@contextmanager
def raised_as(make: Callable[[str], Exception]) -> Iterator[None]:
    """Raise what `make` returns, given one line of text, in place of a library's error."""
    try:
        yield
    except (SnapError, InputRefused, KeyboardInterrupt):
        raise
    except BaseException as error:
        # BaseException: a panic in tokenizers is not an Exception, and code of the checkpoint
        # may call sys.exit.
        if is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())[:_LONGEST_ERROR]
        kind = type(error).__name__
        raise make(f"{kind}: {text}" if text else kind) from error


_LONGEST_WARNING = 400
_MOST = 100
_LOGGER = "transformers"
_PACKAGE = Path(transformers.__file__).parent
# About the use of Python interfaces, not about what is computed.
_ABOUT_CODE = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


class Warned(logging.Handler):
    """Collects warnings, each once. The path of `checkpoint` is left out of their text."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(logging.WARNING)
        # Its cache drops what an earlier recording in this process was warned of.
        transformers.utils.logging.warning_once.cache_clear()
        self.checkpoint = checkpoint
        self._texts: set[str] = set()

    def texts(self) -> tuple[str, ...]:
        """Return the warnings, sorted: a resumed recording meets them in another order."""
        return tuple(sorted(self._texts))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Collect the warnings of transformers inside the block, logged or raised."""
        logger = logging.getLogger(_LOGGER)
        logger.addHandler(self)
        try:
            with warnings.catch_warnings(record=True) as raised:
                warnings.simplefilter("always")
                yield
        finally:
            logger.removeHandler(self)
            for warning in raised:
                of_transformers = Path(warning.filename).is_relative_to(_PACKAGE)
                if of_transformers and not issubclass(warning.category, _ABOUT_CODE):
                    self._add(str(warning.message))

    def emit(self, record: logging.LogRecord) -> None:
        """Collect a logged warning."""
        self._add(record.getMessage())

    def _add(self, text: str) -> None:
        """Keep a warning on one line, without the folder's path, which differs by machine."""
        line = " ".join(text.replace(str(self.checkpoint), self.checkpoint.name).split())
        short = line if len(line) <= _LONGEST_WARNING else line[: _LONGEST_WARNING - 1] + "…"
        if len(self._texts) < _MOST:
            self._texts.add(printable(short))


def log_to_handlers_alone() -> None:
    """Make transformers log its warnings to our handlers, and nothing to the terminal."""
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.disable_propagation()
    transformers.utils.logging.disable_progress_bar()

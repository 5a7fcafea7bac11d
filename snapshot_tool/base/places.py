"""Where in the user's code something is: what raised an exception, or a module's class."""

from __future__ import annotations

import inspect
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

from snapshot_tool.base.errors import EndedProcess, first_line

# Frames of these packages, and of the standard library, are not where a port is wrong.
_NOT_THE_PORT = {"snapshot_tool", "torch", "", *sys.stdlib_module_names}
_DEMO = "snapshot_tool.demo."  # its ports stand for a user's


@dataclass(frozen=True, slots=True)
class Place:
    """A line of the user's code.

    Args:
        file: its path, from the working folder if it is below that.
        line: counted from 1.
        name: the function or class there; "" if it is not known.
    """

    file: str
    line: int
    name: str = ""

    def __str__(self) -> str:
        """Return it as editors and terminals take it."""
        return f"{self.file}:{self.line}" + (f" in {self.name}" if self.name else "")


def path_from_here(path: str) -> str:
    """Return a path from the working folder if it is below that, else the path itself."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except (OSError, ValueError):
        return path


def place_of_error(error: BaseException) -> Place | None:
    """Return the innermost line outside of snap, torch and the standard library, or None."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        return Place(path_from_here(error.filename), error.lineno or 1)
    found = [frame for frame in traceback.walk_tb(error.__traceback__) if _is_own_frame(frame[0])]
    if not found:
        # What ends the process is raised again by snap.
        return place_of_error(error.__cause__) if error.__cause__ else None
    frame, line = found[-1]
    return Place(path_from_here(frame.f_code.co_filename), line, frame.f_code.co_qualname)


def place_of_class(kind: type) -> Place | None:
    """Return where a class of the user's code is declared, or None."""
    if not _is_the_ports(kind.__module__):
        return None
    try:
        file, line = inspect.getfile(kind), inspect.getsourcelines(kind)[1]
    except (OSError, TypeError):  # no source, or a class that is made by code
        return None
    return Place(path_from_here(file), line, kind.__qualname__)


def describe_error(error: BaseException) -> str:
    """Return an exception on one line: its type, the first line of its text, and its place."""
    text = first_line(error)
    if not isinstance(error, EndedProcess):  # its text says how
        text = f"{type(error).__name__}: {text}"
    place = place_of_error(error)
    # What ranks of torchrun raised has its place in the text.
    return f"{text}, at {place}" if place and str(place) not in text else text


def traceback_of(error: BaseException) -> str:
    """Return an exception's traceback as text, from the first frame that is not snap's."""
    frames: TracebackType | None = error.__traceback__
    while frames and not _is_own_frame(frames.tb_frame):
        frames = frames.tb_next
    shown = frames or error.__traceback__
    return "".join(traceback.format_exception(type(error), error, shown))


def _is_own_frame(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__", ""))
    return _is_the_ports(module) and Path(frame.f_code.co_filename).is_file()


def _is_the_ports(module: str) -> bool:
    return module.partition(".")[0] not in _NOT_THE_PORT or module.startswith(_DEMO)

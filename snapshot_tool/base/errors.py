"""What can go wrong, as types, and where in the user's code it does.

The command line turns each type into one message and an exit code.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import ClassVar


class SnapError(Exception):
    """Something kept snap from doing its work.

    Args:
        problem: what is wrong and where, on one line.
        remedy: what to do about it, on one line; "" if there is no advice.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        # Names and reasons may come from a stranger's file. A line of them stays a line.
        self.problem = printable(problem)
        self.remedy = printable(remedy)

    def __str__(self) -> str:
        return f"{self.problem}\n{self.remedy}" if self.remedy else self.problem


class UsageError(SnapError):
    """Options contradict each other or name something that does not exist."""

    exit_code = 2


class FamilyInvalid(SnapError):
    """What `--family` names is missing, raises, or declares no family that can work."""

    exit_code = 2


class GoldenNotFound(SnapError):
    """There is no such golden set."""


class GoldenExists(SnapError):
    """A recording would replace a golden set or an unfinished recording."""


class UpdateDeclined(SnapError):
    """A new golden version was shown and not confirmed."""


class GoldenDamaged(SnapError):
    """A file of a golden set is missing, cut short or altered."""


class TraceInvalid(SnapError):
    """A file is not a trace, is damaged, or was written by a newer snap."""


class GoldenLocked(SnapError):
    """Another process is recording the same golden set."""


class ManifestInvalid(GoldenDamaged):
    """A manifest breaks its schema, or follows a schema newer than this snap."""


class AnswersInvalid(SnapError):
    """Files of answers are missing, damaged, or answer no question of the golden set."""


class LockInvalid(SnapError):
    """goldens.lock breaks its schema."""


class RemoteUnavailable(SnapError):
    """The place where golden sets are shared cannot be reached, read or written."""


class CheckpointUnavailable(SnapError):
    """The checkpoint cannot be found, reached or read."""


class RevisionMismatch(SnapError):
    """The checkpoint's files are not those of the revision that is given or recorded."""


class CandidateUnavailable(SnapError):
    """The implementation under test cannot be imported or built."""


class DeviceUnavailable(SnapError):
    """The device is not available."""


class ReferenceUnavailable(SnapError):
    """The Hugging Face side cannot run here."""


class ReferenceWrong(SnapError):
    """The reference's answers cannot be a golden set."""


class InputRefused(Exception):
    """The reference itself refuses an input. The case is drawn again."""


class TemplateRefused(InputRefused):
    """The checkpoint has no chat template, or its template raises an error."""


class EndedProcess(Exception):
    """Foreign code tried to end the process, or raised something that is not an Exception."""


class PhaseUnsupported(Exception):
    """Raised by a candidate's method if it has no such phase; the text is the reason."""


_SHOWN_NAMES = 20
_MEMORY_SIGNS = ("can't allocate memory", "cannot allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python, the system or torch ran out of memory.

    torch raises RuntimeError for it on the CPU, and a subclass of RuntimeError on a GPU.
    """
    if isinstance(error, RuntimeError | OSError):
        return any(sign in str(error).lower() for sign in _MEMORY_SIGNS)
    return isinstance(error, MemoryError)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    return (str(error).strip() or "no message").splitlines()[0]


def suggest(name: str, names: Sequence[str]) -> str:
    """Return which of the valid names are nearest to one, or the first of them if none is near."""
    from difflib import get_close_matches  # only for errors

    if near := get_close_matches(name, names):
        return f"did you mean {' or '.join(near)}?"
    more = f", … {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return f"there are: {', '.join(names[:_SHOWN_NAMES])}{more}"


def printable(text: str) -> str:
    """Return the text with control characters, line ends and bidi marks as escapes."""
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )


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

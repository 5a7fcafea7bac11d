"""What can go wrong, as types. The command line turns each into one message and an exit code."""

from collections.abc import Sequence
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

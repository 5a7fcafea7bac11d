"""Whose fault an exception is: the candidate's, the machine's, or that of the golden set."""

from snapshot_tool.base.errors import GoldenDamaged, is_out_of_memory
from snapshot_tool.judge.watched import Guarded, raised_by_candidate


def require_candidates_fault(
    candidate: object, error: BaseException, *, case: str, phase: str
) -> None:
    """Return where a phase failed in the candidate's own code; raise where it failed elsewhere.

    What snap's own code stumbles over, with a guarded candidate, are tensors of the golden set that
    do not belong together. A lack of memory says nothing about the candidate either.
    """
    if is_out_of_memory(error):
        raise error
    if isinstance(candidate, Guarded) and not raised_by_candidate(error):
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise GoldenDamaged(
            f"{phase} of case {case}: the golden's tensors do not belong together ({what})",
            "record the set again, or get it from where it was recorded",
        ) from error

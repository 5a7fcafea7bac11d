"""The phases of a model run, in order, and the tensors that each is compared by."""

from enum import StrEnum


class Phase(StrEnum):
    """One stage of a run, whose output is recorded and compared on its own."""

    PREPROCESSING = "preprocessing"
    VISION = "vision"
    CONNECTOR = "connector"
    FORWARD = "forward"
    GENERATE = "generate"


PHASES: tuple[Phase, ...] = tuple(Phase)


def phase_order(phase: Phase) -> int:
    """Return the phase's place in the order of execution, from 0."""
    return PHASES.index(phase)

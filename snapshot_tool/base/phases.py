"""The phases of a model run, in order, and the tensors that each is compared by."""

from collections.abc import Collection
from enum import StrEnum


class Phase(StrEnum):
    """One stage of a run, whose output is recorded and compared on its own."""

    PREPROCESSING = "preprocessing"
    VISION = "vision"
    CONNECTOR = "connector"
    FORWARD = "forward"
    GENERATE = "generate"


PHASES: tuple[Phase, ...] = tuple(Phase)

# What a model does only for some inputs, besides its phases: `snap check --require` takes both.
END_TOKEN, ALL_END_TOKENS = "end-token", "all-end-tokens"
WINDOW, ROPE = "sliding-window", "rope-length"
LEFT, RIGHT, TOKEN_TYPES = "left-padding", "right-padding", "token-types"
COVERAGE_NAMES = (END_TOKEN, ALL_END_TOKENS, WINDOW, ROPE, LEFT, RIGHT, TOKEN_TYPES)


def phase_order(phase: Phase) -> int:
    """Return the phase's place in the order of execution, from 0."""
    return PHASES.index(phase)


def named_phases(names: Collection[str]) -> tuple[Phase, ...]:
    """Return the phases that are named, in the order of execution; "all" names all of them."""
    return tuple(phase for phase in PHASES if "all" in names or phase in names)

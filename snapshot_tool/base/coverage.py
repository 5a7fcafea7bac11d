"""What the cases of a golden set reach of a model."""

from __future__ import annotations

from dataclasses import dataclass

END_TOKEN, ALL_END_TOKENS = "end-token", "all-end-tokens"
WINDOW, ROPE = "sliding-window", "rope-length"
LEFT, RIGHT, TOKEN_TYPES = "left-padding", "right-padding", "token-types"
COVERAGE_NAMES = (END_TOKEN, ALL_END_TOKENS, WINDOW, ROPE, LEFT, RIGHT, TOKEN_TYPES)


@dataclass(frozen=True, slots=True)
class Coverage:
    """One thing that a model does only for some inputs.

    Args:
        name: one of COVERAGE_NAMES.
        reached: whether a case reaches it.
        text: what it is and how far the cases go, on one line.
    """

    name: str
    reached: bool
    text: str

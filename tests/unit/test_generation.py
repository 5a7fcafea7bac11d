"""A token that differs: near-tie, real divergence, or unknown."""

from __future__ import annotations

import pytest

from snapshot_tool.base.results import DivergenceKind, TokenDivergence


def diverge(
    *,
    margin: float | None = None,
    rounding: float | None = None,
    candidate_margin: float | None = None,
    actual: int | None = 9,
) -> TokenDivergence:
    """Return a divergence at step 4, from token 7."""
    return TokenDivergence(
        4,
        7,
        " cat",
        actual,
        None,
        margin=margin,
        margin_above=None if margin is not None else 3.5,
        rounding=rounding,
        candidate_margin=candidate_margin,
    )


@pytest.mark.parametrize(
    ("margin", "rounding", "kind"),
    [
        (1e-6, 2e-6, DivergenceKind.NEAR_TIE),
        (2e-6, 2e-6, DivergenceKind.NEAR_TIE),
        (3e-6, 2e-6, DivergenceKind.REAL),
        (1e-6, None, DivergenceKind.UNKNOWN),
        (None, 2e-6, DivergenceKind.REAL),
        (None, None, DivergenceKind.REAL),
    ],
)
def test_a_near_tie_is_a_margin_below_the_rounding_at_that_step(
    margin: float | None, rounding: float | None, kind: DivergenceKind
) -> None:
    """A token outside of the golden's best is real, whatever the rounding."""
    assert diverge(margin=margin, rounding=rounding).kind is kind


def test_the_generation_loop_is_named_if_the_forward_pass_agrees() -> None:
    """Only for a real divergence, and only where its forward clearly chooses the golden's token."""
    named = {
        margins: "its generation loop or cache is at fault"
        in str(diverge(margin=margins[0], rounding=2e-6, candidate_margin=margins[1]))
        for margins in ((0.25, 0.24), (0.25, -0.1), (0.25, 1e-7), (1e-7, 0.24))
    }
    assert [margins for margins, is_named in named.items() if is_named] == [(0.25, 0.24)]

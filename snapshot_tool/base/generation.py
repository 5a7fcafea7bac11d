"""Where a greedy generation leaves the golden, and whether rounding alone could have done it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class DivergenceKind(StrEnum):
    """Whether a token differs by chance: near-tie; real divergence; unknown without an oracle."""

    NEAR_TIE = "near-tie"
    REAL = "real divergence"
    UNKNOWN = "near-tie or not is unknown: the golden set has no oracle"


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """A token and its text; None where the generation has ended before."""

    token: int | None
    text: str | None

    def __str__(self) -> str:
        """Show the id and the text."""
        if self.token is None:
            return "nothing (it has ended)"
        return str(self.token) if self.text is None else f"{self.token} {self.text!r}"


@dataclass(frozen=True, slots=True)
class TokenDivergence:
    """The first step whose token is not the golden's.

    Args:
        step: counted from 0.
        expected: the golden's token.
        actual: the candidate's.
        margin: by how much the golden's logits prefer `expected` to `actual`; None where one of
            them is no token, or `actual` is not among the golden's best.
        margin_above: the same as a lower bound, where `actual` is not among the golden's best.
        rounding: how far rounding can part two margins at this very step: twice the error of a
            logit that the oracle measured there in the golden's dtype, and the same in the
            candidate's; None without an oracle.
        candidate_margin: the candidate's own margin at this step, given the golden's tokens before
            it; None where its forward cannot tell.
        golden: every token of the golden's generation.
        candidate: every token of the candidate's.
    """

    step: int
    expected: TokenChoice
    actual: TokenChoice
    margin: float | None = None
    margin_above: float | None = None
    rounding: float | None = None
    candidate_margin: float | None = None
    golden: tuple[TokenChoice, ...] = ()
    candidate: tuple[TokenChoice, ...] = ()

    @property
    def kind(self) -> DivergenceKind:
        """Say whether rounding could have chosen the other token."""
        if self.margin is None:
            return DivergenceKind.REAL
        if self.rounding is None:
            return DivergenceKind.UNKNOWN
        return DivergenceKind.NEAR_TIE if self.margin <= self.rounding else DivergenceKind.REAL

    @property
    def forward_agrees(self) -> bool:
        """Whether the candidate's forward pass would have chosen the golden's token, clearly."""
        chosen = self.candidate_margin is not None and self.candidate_margin > (self.rounding or 0)
        return chosen and self.kind is not DivergenceKind.NEAR_TIE

    def __str__(self) -> str:
        """Say it in words."""
        facts = [self.kind.value]
        if self.margin is not None:
            facts.append(f"the golden prefers the former by {self.margin:.3g}")
        elif self.margin_above is not None:
            facts.append(f"the golden prefers the former by more than {self.margin_above:.3g}")
        if self.rounding is not None:
            facts.append(f"rounding there reaches {self.rounding:.2g}")
        if self.candidate_margin is not None:
            prefers = f"given the golden's tokens the candidate does by {self.candidate_margin:.3g}"
            loop = ": its generation loop or cache is at fault, not its forward pass"
            facts.append(prefers + (loop if self.forward_agrees else ""))
        return (
            f"first other token at step {self.step}: expected {self.expected}, actual "
            f"{self.actual} ({'; '.join(facts)})"
        )

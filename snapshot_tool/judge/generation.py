"""Explaining a generation that leaves the golden, step by step, without the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.base.errors import GoldenDamaged
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import Candidate, CaseInputs
from snapshot_tool.base.results import DivergenceKind, Result, TokenDivergence, Verdict
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.oracle import step_noise

if TYPE_CHECKING:
    import torch


def token_texts(tokens: Sequence[int], checkpoint: Path | None) -> list[str | None]:
    """Return the tokens' texts by the checkpoint's tokenizer.json; None if there is none."""
    path = checkpoint / "tokenizer.json" if checkpoint else None
    unknown: list[str | None] = [None] * len(tokens)
    if path is None or not path.is_file():
        return unknown
    # Heavy enough to wait until a token differs.
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
        return [str(tokenizer.decode([token], skip_special_tokens=False)) for token in tokens]
    except Exception:  # the library raises bare Exception, and the text is a courtesy
        return unknown


def with_golden_tokens(golden: Golden, case: str) -> CaseInputs:
    """Return a case's prompt with the golden's tokens after it, all but the last."""
    import torch

    inputs = golden.inputs(case)
    given = golden.tensor(case, Phase.GENERATE, parts.TOKEN_IDS)[None, :-1]
    return replace(
        inputs,
        input_ids=torch.cat([inputs.input_ids, given], dim=1),
        attention_mask=torch.cat([inputs.attention_mask, torch.ones_like(given)], dim=1),
    )


def teacher_forced_logits(candidate: Candidate, golden: Golden, case: str) -> torch.Tensor | None:
    """Return the candidate's logits at every step, given the golden's tokens before it.

    (new, vocabulary) float64; None where forward does not return logits of every position.
    """
    import torch

    inputs = with_golden_tokens(golden, case)
    with torch.inference_mode():
        logits = candidate.forward(inputs)
    return step_logits(logits, golden, case)


def step_logits(logits: object, golden: Golden, case: str) -> torch.Tensor | None:
    """Return the rows of forward's logits that choose a token each, as teacher_forced_logits."""
    import torch

    steps = len(golden.tensor(case, Phase.GENERATE, parts.TOKEN_IDS))
    length = golden.text(case).input_ids.shape[1] + steps - 1
    if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != (1, length):
        return None
    return logits[0, -steps:].to("cpu", torch.float64)


def greedy_tokens(logits: torch.Tensor) -> torch.Tensor:
    """Return the token that each row chooses, (rows,) int64; -1 for a row that is not finite.

    argmax takes NaN for the greatest value: such a row must not look like a choice.
    """
    import torch

    return logits.argmax(-1).where(logits.isfinite().all(-1), torch.tensor(-1))


@dataclass(frozen=True, slots=True)
class GenerationExplainer:
    """Says where and why a generation leaves the golden.

    Args:
        golden: the set.
        checkpoint: its folder, for the tokens' text; None: ids alone.
        dtype: the candidate's, in which rounding is to be judged.
        allow_near_ties: whether a generation passes that differs at near-ties alone.
    """

    golden: Golden
    checkpoint: Path | None
    dtype: str
    allow_near_ties: bool = False

    def explain(self, result: Result, actual: object, candidate: Candidate) -> Result:
        """Return the result of the token ids with the first divergence, if there is one."""
        import torch

        if not isinstance(actual, torch.Tensor) or actual.dim() != 1:
            return result
        case = result.case
        found = find_divergence(
            self.golden, case, actual, dtype=self.dtype, checkpoint=self.checkpoint
        )
        if found is None:
            return result
        logits = _logits_or_none(candidate, self.golden, case)
        found = with_candidate_margin(found, logits)
        near_tie = self.allow_near_ties and found.kind is DivergenceKind.NEAR_TIE
        # What follows a near-tie answers another prompt: judged on the golden's tokens instead.
        if near_tie and logits is not None and self._only_near_ties(case, logits):
            reason = f"allowed: {found}"
            return replace(result, verdict=Verdict.PASS, reason=reason, divergence=found)
        return replace(result, reason=f"{found}; {result.reason}", divergence=found)

    def _only_near_ties(self, case: str, logits: torch.Tensor) -> bool:
        """Tell whether the candidate, given the golden's tokens, differs at near-ties alone."""
        expected = self.golden.tensor(case, Phase.GENERATE, parts.TOKEN_IDS)
        chosen = greedy_tokens(logits)
        for step in (chosen != expected).nonzero()[:, 0].tolist():
            found = TokenDivergence(step, int(expected[step]), None, int(chosen[step]), None)
            found = _with_margin(found, self.golden, case, dtype=self.dtype)
            if found.kind is not DivergenceKind.NEAR_TIE:
                return False
        return True


def _logits_or_none(candidate: Candidate, golden: Golden, case: str) -> torch.Tensor | None:
    try:
        return teacher_forced_logits(candidate, golden, case)
    except Exception:  # a candidate's forward that raises is reported in its own phase
        return None


def find_divergence(
    golden: Golden, case: str, actual: torch.Tensor, *, dtype: str, checkpoint: Path | None
) -> TokenDivergence | None:
    """Return the first step at which tokens (new,) leave the golden's, or None.

    dtype: the candidate's, in which rounding is to be judged.
    """
    expected = golden.tensor(case, Phase.GENERATE, parts.TOKEN_IDS).tolist()
    got = actual.tolist()
    both = min(len(expected), len(got))
    step = next((i for i in range(both) if expected[i] != got[i]), both)
    if step == len(expected) == len(got):
        return None
    expected_texts, got_texts = (token_texts(tokens, checkpoint) for tokens in (expected, got))
    found = TokenDivergence(
        step,
        expected[step] if step < len(expected) else None,
        expected_texts[step] if step < len(expected) else None,
        got[step] if step < len(got) else None,
        got_texts[step] if step < len(got) else None,
        golden=_token_lines(expected, expected_texts),
        candidate=_token_lines(got, got_texts),
    )
    return _with_margin(found, golden, case, dtype=dtype)


def _token_lines(tokens: Sequence[int], texts: Sequence[str | None]) -> tuple[str, ...]:
    """Return each token as "ID" or "ID TEXT"."""
    pairs = zip(tokens, texts, strict=True)
    return tuple(str(token) if text is None else f"{token} {text}" for token, text in pairs)


def _with_margin(
    found: TokenDivergence, golden: Golden, case: str, *, dtype: str
) -> TokenDivergence:
    """Add the golden's margin between both tokens and what rounding does to it."""
    other = found.actual
    if found.expected is None or other is None:
        return found
    values, ids = (
        _step(golden, case, name, found.step) for name in ("step_topk_values", "step_topk_ids")
    )
    # The golden's logits are rounded in its own dtype, the candidate's in another.
    noises = [step_noise(golden, case, dtype=d) for d in (golden.manifest.dtype, dtype)]
    known = [float(noise[found.step]) for noise in noises if noise is not None]
    return replace(
        found,
        margin=values[0] - values[ids.index(other)] if other in ids else None,
        margin_above=None if other in ids else values[0] - values[-1],
        # Two logits may be off in opposite directions.
        rounding=2 * sum(known) if len(known) == len(noises) else None,
    )


def _step(golden: Golden, case: str, name: str, step: int) -> list[float]:
    """Return one step's row of what generation keeps; raise GoldenDamaged where it has none."""
    rows = golden.tensor(case, Phase.GENERATE, name)
    if rows.dim() != 2 or not 0 <= step < len(rows):  # noqa: PLR2004 - steps, then logits
        raise GoldenDamaged(f"the {name} of {case} have no step {step}", "record the set again")
    row: list[float] = rows[step].tolist()
    return row


def with_candidate_margin(found: TokenDivergence, logits: torch.Tensor | None) -> TokenDivergence:
    """Add what the candidate itself prefers at that step; logits: see `teacher_forced_logits`."""
    one, other = found.expected, found.actual
    if logits is None or one is None or other is None or not 0 <= other < logits.shape[-1]:
        return found
    row = logits[found.step]
    return replace(found, candidate_margin=float(row[one] - row[other]))

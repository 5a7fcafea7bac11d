"""Explain how a generation differs from the recorded one, without the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from snapshot_tool.base.protocol import Candidate, CaseInputs, Phase
from snapshot_tool.base.results import DivergenceKind, Result, TokenDivergence, Verdict
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.golden import Golden, step_noise


def with_golden_tokens(golden: Golden, case: str, *, end: int = -1) -> CaseInputs:
    """Return a case's prompt followed by the recorded tokens before `end`, an index."""
    inputs = golden.inputs(case)
    given = golden.tensor(case, Phase.GENERATE, parts.TOKEN_IDS)[None, :end]
    return replace(
        inputs,
        input_ids=torch.cat([inputs.input_ids, given], dim=1),
        attention_mask=torch.cat([inputs.attention_mask, torch.ones_like(given)], dim=1),
    )


def step_logits(logits: object, golden: Golden, case: str) -> torch.Tensor | None:
    """Return the logits that choose each new token, (new, vocabulary) float64.

    logits: the output of forward for `with_golden_tokens`. Returns None if they are not logits of
    every position.
    """
    steps = len(golden.tensor(case, Phase.GENERATE, parts.TOKEN_IDS))
    length = golden.text(case).input_ids.shape[1] + steps - 1
    if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != (1, length):
        return None
    return logits[0, -steps:].to("cpu", torch.float64)


def greedy_tokens(logits: torch.Tensor) -> torch.Tensor:
    """Return the greedy token of each row, (rows,) int64; -1 for a row that is not finite.

    argmax would treat NaN as the greatest value.
    """
    return logits.argmax(-1).where(logits.isfinite().all(-1), torch.tensor(-1))


@dataclass(frozen=True, slots=True)
class GenerationExplainer:
    """Finds the first step at which a generation differs, and its kind.

    Args:
        checkpoint: the checkpoint's folder, for the tokens' text; None: only ids.
        dtype: the candidate's dtype, whose rounding errors count.
        allow_near_ties: whether a generation passes if it differs only at near-ties.
        runs: whether the candidate can run on the golden's tokens; answers from a file cannot.
    """

    golden: Golden
    checkpoint: Path | None
    dtype: str
    allow_near_ties: bool = False
    runs: bool = True

    def explain(self, result: Result, actual: object, candidate: Candidate) -> Result:
        """Return the result of the token ids with the first divergence, if there is one."""
        if not isinstance(actual, torch.Tensor) or actual.dim() != 1:
            return result
        found = self._find_divergence(result.case, actual.tolist())
        if found is None:
            return result
        logits = self._teacher_forced_logits(candidate, result.case) if self.runs else None
        one, other = found.expected, found.actual
        if logits is not None and one is not None and other in range(logits.shape[-1]):
            row = logits[found.step]
            found = replace(found, candidate_margin=float(row[one] - row[other]))
        near_tie = self.allow_near_ties and found.kind is DivergenceKind.NEAR_TIE
        # Tokens after a near-tie follow another prompt, so the logits after the golden's tokens are
        # judged instead.
        if near_tie and not self.runs:
            allowed = "allowed, and what follows is not compared"
        elif near_tie and logits is not None and self._has_only_near_ties(result.case, logits):
            allowed = "allowed"
        else:
            return replace(result, reason=f"{found}; {result.reason}", divergence=found)
        return replace(result, verdict=Verdict.PASS, reason=f"{allowed}: {found}", divergence=found)

    def _find_divergence(self, case: str, actual: list[int]) -> TokenDivergence | None:
        """Return the first step at which the new tokens differ from the golden's, or None."""
        expected = self.golden.tensor(case, Phase.GENERATE, parts.TOKEN_IDS).tolist()
        both = min(len(expected), len(actual))
        step = next((i for i in range(both) if expected[i] != actual[i]), both)
        if step == len(expected) == len(actual):
            return None
        texts, actual_texts = (
            _token_texts(tokens, self.checkpoint) for tokens in (expected, actual)
        )
        found = TokenDivergence(
            step,
            expected[step] if step < len(expected) else None,
            texts[step] if step < len(texts) else None,
            actual[step] if step < len(actual) else None,
            actual_texts[step] if step < len(actual_texts) else None,
            golden=_token_lines(expected, texts),
            candidate=_token_lines(actual, actual_texts),
        )
        return self._with_margin(found, case)

    def _with_margin(self, found: TokenDivergence, case: str) -> TokenDivergence:
        """Add the golden's margin between both tokens, and the rounding error at that step."""
        other = found.actual
        if found.expected is None or other is None:
            return found
        values, ids = (
            self.golden.tensor(case, Phase.GENERATE, name)[found.step].tolist()
            for name in ("step_topk_values", "step_topk_ids")
        )
        # The golden's logits are rounded in its dtype, the candidate's in its own.
        dtypes = (self.golden.manifest.dtype, self.dtype)
        noises = [step_noise(self.golden, case, dtype=dtype) for dtype in dtypes]
        known = [float(noise[found.step]) for noise in noises if noise is not None]
        return replace(
            found,
            margin=values[0] - values[ids.index(other)] if other in ids else None,
            margin_above=None if other in ids else values[0] - values[-1],
            # The errors of two logits may have opposite signs.
            rounding=2 * sum(known) if len(known) == len(noises) else None,
        )

    def _teacher_forced_logits(self, candidate: Candidate, case: str) -> torch.Tensor | None:
        """Return the candidate's logits at every step, given the golden's tokens before it."""
        try:
            with torch.inference_mode():
                logits = candidate.forward(with_golden_tokens(self.golden, case))
            return step_logits(logits, self.golden, case)
        except Exception:  # an exception of forward is reported in its own phase
            return None

    def _has_only_near_ties(self, case: str, logits: torch.Tensor) -> bool:
        """Return whether the candidate, after the golden's tokens, differs only at near-ties."""
        expected = self.golden.tensor(case, Phase.GENERATE, parts.TOKEN_IDS)
        chosen = greedy_tokens(logits)
        for step in (chosen != expected).nonzero()[:, 0].tolist():
            found = TokenDivergence(step, int(expected[step]), None, int(chosen[step]), None)
            found = self._with_margin(found, case)
            if found.kind is not DivergenceKind.NEAR_TIE:
                return False
        return True


def _token_texts(tokens: Sequence[int], checkpoint: Path | None) -> list[str | None]:
    """Return the tokens' texts by the checkpoint's tokenizer.json; None if there is none."""
    path = checkpoint / "tokenizer.json" if checkpoint else None
    unknown: list[str | None] = [None] * len(tokens)
    if path is None or not path.is_file():
        return unknown
    # Imported only if a generation differs.
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
        return [str(tokenizer.decode([token], skip_special_tokens=False)) for token in tokens]
    except Exception:  # the library raises Exception itself; the text is optional
        return unknown


def _token_lines(tokens: Sequence[int], texts: Sequence[str | None]) -> tuple[str, ...]:
    """Return each token as "ID" or "ID TEXT"."""
    pairs = zip(tokens, texts, strict=True)
    return tuple(str(token) if text is None else f"{token} {text}" for token, text in pairs)

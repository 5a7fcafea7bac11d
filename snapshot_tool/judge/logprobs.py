"""Compare the log-probabilities of the best tokens, which servers return in place of logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from snapshot_tool.base.results import Agreement

# What they are called in a report.
POSITION_LOGPROBS, STEP_LOGPROBS = "position_logprobs", "step_logprobs"
_LEAST = 1e-9  # probability; sums of float32 probabilities exceed 1 by less


@dataclass(frozen=True, slots=True)
class Best:
    """The best tokens of some positions.

    Args:
        ids: (rows, k) int64.
        logprobs: (rows, k) float64.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor

    @classmethod
    def of_logits(cls, ids: torch.Tensor, logits: torch.Tensor, logsumexp: torch.Tensor) -> Best:
        """Return recorded logits (rows, k) as log-probabilities."""
        return cls(ids, logits.double() - logsumexp.double()[:, None])


def align(golden: Best, answer: Best) -> tuple[torch.Tensor, torch.Tensor]:
    """Return expected and actual log-probabilities, (rows, golden's k + answer's k) float64.

    Both lists are cut off after k tokens. A token that only one side lists is at most as probable
    as the last token of the other list: this bound takes the place of its value if it is violated.
    """
    same = golden.ids[:, :, None] == answer.ids[:, None, :]
    listed, known = same.any(2), same.any(1)
    found = answer.logprobs.gather(1, same.int().argmax(2))
    bound = torch.minimum(golden.logprobs, answer.logprobs.amin(1, keepdim=True))
    own_bound = torch.minimum(answer.logprobs, golden.logprobs.amin(1, keepdim=True))
    expected = torch.cat([golden.logprobs, answer.logprobs.where(known, own_bound)], 1)
    actual = torch.cat([found.where(listed, bound), answer.logprobs], 1)
    return expected, actual


def measure_agreement(golden: Best, answer: Best) -> Agreement:
    """Return how far two lists of best tokens agree, over all positions."""
    size = golden.ids.shape[1]
    expected, actual = (side[:, :size] for side in align(golden, answer))
    rest, own_rest = ((1 - side.exp().sum(1)).clamp(min=_LEAST) for side in (expected, actual))
    divergence = (expected.exp() * (expected - actual)).sum(1) + rest * (rest / own_rest).log()
    best = golden.ids.gather(1, golden.logprobs.argmax(1, keepdim=True))
    own_best = answer.ids.gather(1, answer.logprobs.argmax(1, keepdim=True))
    return Agreement(
        len(best), int((best == own_best).sum()), float(divergence.clamp(min=0).mean())
    )

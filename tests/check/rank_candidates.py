"""Candidates for torchrun whose rank 1 goes wrong by itself."""

from __future__ import annotations

import os
import signal
from datetime import timedelta

import torch

from snapshot_tool.base.protocol import CandidateRequest, CaseInputs
from snapshot_tool.candidates import distributed as ranks


class _OnRankOne:
    """Answers forward with noughts, after a sum over all ranks."""

    def __init__(self, request: CandidateRequest) -> None:
        self.vocabulary = int(request.config["vocab_size"])
        self.rank = int(os.environ["RANK"])

    def forward(self, inputs: CaseInputs) -> torch.Tensor:
        """Return no likeness of logits."""
        logits = torch.zeros(1, inputs.input_ids.shape[1], self.vocabulary)
        torch.distributed.all_reduce(logits)
        return logits


class RaisesAfterwards(_OnRankOne):
    """Raises when the ranks have met: all can go on."""

    def forward(self, inputs: CaseInputs) -> torch.Tensor:
        """Raise on rank 1."""
        logits = super().forward(inputs)
        if self.rank == 1:
            raise ValueError("rank one is out of sorts")
        return logits


class RaisesBefore(_OnRankOne):
    """Raises while rank 0 waits inside of the model."""

    def __init__(self, request: CandidateRequest) -> None:
        super().__init__(request)
        ranks.RAISED_TIMEOUT = timedelta(seconds=2)

    def forward(self, inputs: CaseInputs) -> torch.Tensor:
        """Raise on rank 1."""
        if self.rank == 1:
            raise ValueError("rank one is out of sorts")
        return super().forward(inputs)


class Dies(_OnRankOne):
    """Is killed on rank 1, as the system does for lack of memory."""

    def forward(self, inputs: CaseInputs) -> torch.Tensor:
        """Die on rank 1."""
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(inputs)

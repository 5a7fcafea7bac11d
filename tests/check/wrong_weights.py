"""A candidate whose weights alone are wrong."""

import torch

from snapshot_tool.base.protocol import CandidateRequest
from snapshot_tool.candidates.fms.candidate import FmsCandidate, load_fms_candidate
from tests.candidates import CHECKOUT


def unused_embedding_doubled(request: CandidateRequest) -> FmsCandidate:
    """Return FMS with the embedding of a token doubled that no recorded prompt has."""
    candidate = load_fms_candidate(request, fms_path=CHECKOUT)
    with torch.no_grad():
        candidate.model.text_model.base_model.embedding.weight[0] *= 2
    return candidate
